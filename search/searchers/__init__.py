"""Searchers by name: each proposes allocations for a budget, the best of which is its candidate.

``SEARCHERS`` is the table that a config's ``methods`` names. A searcher gets a problem and yields
evaluations, one for each distinct allocation that it scored. The Hessian methods need no more
than one, by proxy; an agent or a sampler yields as many as it may and scores them as it likes.

Whoever scores what it tries goes through a decision process of ``envs``, so that agents, samplers
and their controls choose among the same allocations: CW-HAWQ's ratios of the channels, or, with
``-layers``, HAQ's bits of the layers. ``warm-`` begins with what the Hessian chose.

Weights and activations are chosen each by itself wherever no budget joins them: Ω is a sum, so the
best of both is the best of all.
"""

from hawq.allocate import monotone_front, pareto_front
from search.searchers.agents import agent
from search.searchers.blocks import block_front, fine_tuning_order
from search.searchers.channels import ChannelSearcher
from search.searchers.climbing import ClimbingSearcher, around
from search.searchers.controls import largest_omega_front, norm_front
from search.searchers.fronts import FrontSearcher
from search.searchers.problem import Effort, Problem, Ratios, Reward, Rules, Searcher
from search.searchers.processes import ProcessSearcher
from search.searchers.samplers import sampler
from search.searchers.uniform import UniformSearcher

__all__ = [
    "SEARCHERS",
    "Effort",
    "Problem",
    "Ratios",
    "Reward",
    "Rules",
    "Searcher",
    "around",
    "fine_tuning_order",
]

_HAWQ = FrontSearcher(block_front, needs_blocks=True)
_MONOTONE = FrontSearcher(
    lambda part, cost: monotone_front(part.space, part.sensitivity, cost, part.traces)
)
_EXACT = FrontSearcher(
    lambda part, cost: pareto_front(part.space, part.sensitivity, cost), exact=True
)
_CHANNEL = ChannelSearcher()


def _processes() -> dict[str, Searcher]:
    """Cross every driver with the two processes, cold and from the Hessian's choices."""
    found: dict[str, Searcher] = {}
    drivers = {
        "ddpg": agent("ddpg"),
        "sac": agent("sac"),
        "ppo": agent("ppo"),
        "random": sampler("random"),
        "tpe": sampler("tpe"),
        "cma-es": sampler("cma-es"),
        "nsga2": sampler("nsga2"),
    }
    named = {("ddpg", True): "cw-hawq", ("ddpg", False): "haq"}
    for name, drive in drivers.items():
        for by_channel in (True, False):
            method = named.get((name, by_channel), name if by_channel else f"{name}-layers")
            found[method] = ProcessSearcher(drive, by_channel)
            if name in {"ddpg", "tpe", "cma-es", "nsga2"}:
                starts = (_CHANNEL,) if by_channel else (_EXACT, _MONOTONE)
                found[f"warm-{method}"] = ProcessSearcher(drive, by_channel, starts)
    return found


SEARCHERS: dict[str, Searcher] = {
    "uniform": UniformSearcher(),
    "hawq-v1": _HAWQ,
    "hawq-v2": _MONOTONE,
    "exact": _EXACT,
    "channel": _CHANNEL,
    **_processes(),
    "hill-climbing": ClimbingSearcher(_CHANNEL),
    "hill-climbing-layers": ClimbingSearcher(_EXACT),
    # Controls. The first three choose as hawq-v1 does, and are fine-tuned in another order.
    "hawq-v1-reverse": _HAWQ,
    "hawq-v1-random": _HAWQ,
    "hawq-v1-together": _HAWQ,
    "largest-omega": FrontSearcher(largest_omega_front, needs_sums=True),
    "weight-norm": FrontSearcher(norm_front, needs_sums=True),
}
