"""What a method's name says of it: who chooses, among what, and whether it needs the Hessian."""

from typing import Literal

__all__ = ["Family", "family", "is_by_layer", "needs_curvature", "warm_twin"]

Family = Literal["reference", "hessian", "agent", "sampler"]

_REFERENCES = frozenset({"uniform", "weight-norm"})
_HESSIAN = frozenset({"hawq-v1", "hawq-v2", "exact", "channel", "largest-omega"})
_AGENTS = frozenset({"cw-hawq", "haq", "sac", "ppo"})
_WARM, _LAYERS = "warm-", "-layers"


def family(method: str) -> Family:
    """Tell who chooses: a rule without the Hessian, the Hessian, an agent, or a sampler.

    Samplers are all that try allocations and are no agents, hill climbing among them.
    """
    base = method.removeprefix(_WARM).removesuffix(_LAYERS)
    if base in _REFERENCES:
        return "reference"
    if base in _HESSIAN:
        return "hessian"
    return "agent" if base in _AGENTS else "sampler"


def is_by_layer(method: str) -> bool:
    """Whether a method gives all channels of a layer the same bits."""
    if family(method) in {"reference", "hessian"}:
        return method != "channel"
    return method.removeprefix(_WARM) == "haq" or method.endswith(_LAYERS)


def needs_curvature(method: str) -> bool:
    """Whether the curvature is part of a method's price.

    It is for the Hessian's own methods, for what starts from their choices, and for all that give
    ratios to channels, which are ranked by it.
    """
    found = family(method)
    if found in {"reference", "hessian"}:
        return found == "hessian"
    starts = method.startswith((_WARM, "hill-climbing"))
    return starts or not is_by_layer(method)


def warm_twin(method: str) -> str:
    """Name the method that does the same from the Hessian's choices."""
    return f"{_WARM}{method}"
