"""Searchers by name: each proposes allocations for a budget, the best of which is its candidate.

``SEARCHERS`` is the table that a config's ``methods`` names. A searcher gets a problem and yields
evaluations, one for each distinct allocation that it scored. The Hessian methods need no more
than one, by proxy; an agent or a sampler yields as many as it may and scores them as it likes.

Weights and activations are chosen each by itself wherever no budget joins them: Ω is a sum, so the
best of both is the best of all.
"""

from hawq.allocate import monotone_front, pareto_front
from search.searchers.blocks import block_front, fine_tuning_order
from search.searchers.channels import ChannelSearcher
from search.searchers.controls import largest_omega_front, norm_front
from search.searchers.fronts import FrontSearcher
from search.searchers.problem import Problem, Rules, Searcher
from search.searchers.uniform import UniformSearcher

__all__ = ["SEARCHERS", "Problem", "Rules", "Searcher", "fine_tuning_order"]

_HAWQ = FrontSearcher(block_front, needs_blocks=True)

SEARCHERS: dict[str, Searcher] = {
    "uniform": UniformSearcher(),
    "hawq-v1": _HAWQ,
    "hawq-v2": FrontSearcher(
        lambda part, cost: monotone_front(part.space, part.sensitivity, cost, part.traces)
    ),
    "exact": FrontSearcher(
        lambda part, cost: pareto_front(part.space, part.sensitivity, cost), exact=True
    ),
    "channel": ChannelSearcher(),
    # Controls. The first three choose as hawq-v1 does, and are fine-tuned in another order.
    "hawq-v1-reverse": _HAWQ,
    "hawq-v1-random": _HAWQ,
    "hawq-v1-together": _HAWQ,
    "largest-omega": FrontSearcher(largest_omega_front, needs_sums=True),
    "weight-norm": FrontSearcher(norm_front, needs_sums=True),
}
