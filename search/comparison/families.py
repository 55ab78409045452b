"""What a method is: who chooses, among what, and whether it needs the Hessian."""

from typing import Literal

from search.searchers import SEARCHERS

__all__ = ["Family", "family", "is_by_layer", "needs_curvature", "warm_twin"]

Family = Literal["reference", "hessian", "agent", "sampler"]

_REFERENCES = frozenset({"uniform", "weight-norm"})
_AGENTS = frozenset({"cw-hawq", "haq", "sac", "ppo"})
_WARM, _LAYERS = "warm-", "-layers"


def family(method: str) -> Family:
    """Tell who chooses: a rule without the Hessian, the Hessian, an agent, or a sampler.

    Samplers are all that try allocations and are no agents, hill climbing among them.
    """
    if not SEARCHERS[method].needs_scores:
        return "reference" if method in _REFERENCES else "hessian"
    base = method.removeprefix(_WARM).removesuffix(_LAYERS)
    return "agent" if base in _AGENTS else "sampler"


def is_by_layer(method: str) -> bool:
    """Whether a method gives all channels of a layer the same bits."""
    return not SEARCHERS[method].by_channel


def needs_curvature(method: str) -> bool:
    """Whether the curvature is part of a method's price.

    It is for the Hessian's own methods, for what starts from their choices, and for all that give
    ratios to channels, which are ranked by it.
    """
    if not SEARCHERS[method].needs_scores:
        return method not in _REFERENCES
    return SEARCHERS[method].by_channel or bool(SEARCHERS[method].starts)


def warm_twin(method: str) -> str:
    """Name the method that does the same from the Hessian's choices."""
    return f"{_WARM}{method}"
