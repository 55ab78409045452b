"""The reference that knows nothing."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hawq.allocation import Allocation
from hawq.space import Kind, Space
from search.evaluate import Evaluation
from search.searchers.problem import KINDS, Problem, Searcher, refuse
from search.tables import Tables

__all__ = ["UniformSearcher"]


@dataclass(frozen=True, slots=True)
class UniformSearcher:
    """The reference that knows nothing: the same bits everywhere.

    The largest width of weights and of activations that fit together, the lesser of the two as
    large as can be; what is left of the budgets gives the next width to layers and tensors in a
    seeded random order, wherever it still fits. At a budget of exactly b bits a weight this is
    plain uniform quantization. Pinned layers keep their bits; a menu that lacks b gives its
    largest width below it, or else its least.
    """

    by_channel: bool = False
    is_random: bool = True
    needs_sums: bool = False
    needs_blocks: bool = False
    needs_scores: bool = False
    starts: tuple[Searcher, ...] = ()

    def front(self, tables: Tables, kind: Kind) -> None:  # noqa: ARG002
        """There is none: the order is random."""
        return

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:  # noqa: ARG002
        """Yield one allocation, scored by −Ω."""
        space = problem.tables.space
        of = {kind: part.widths for kind in KINDS if (part := space.part(kind)) is not None}
        weights, tensors = of.get("weights", (0,)), of.get("activations", (0,))
        pairs = sorted(
            ((w, a) for w in weights for a in tensors),
            key=lambda pair: (min(pair), sum(pair), pair),
        )
        uniform = [_uniform(space, w, a) for w, a in pairs]
        fits = [i for i, bits in enumerate(uniform) if problem.fits(Allocation.of(space, bits))]
        # Least bits fit wherever anything does, but for latency, which may favour many bits.
        if not fits:
            refuse(problem, "uniform bits")
        chosen = fits[-1]
        bits = list(uniform[chosen])
        w, a = pairs[chosen]
        wider = _uniform(space, _next(weights, w), _next(tensors, a))
        rows = space.rows()
        for row in np.random.default_rng(seed).permutation(len(rows)):
            trial = list(bits)
            for i in rows[row]:
                trial[i] = wider[i]
            if trial != bits and problem.fits(Allocation.of(space, trial)):
                bits = trial
        yield problem.tables.proxy(Allocation.of(space, bits))


def _uniform(space: Space, weight_width: int, activation_width: int) -> list[int]:
    bits = [0] * len(space)
    for members in space.rows():
        menu = space.menu_of(members)
        is_weight = space.names[members[0]].startswith("w:")
        width = weight_width if is_weight else activation_width
        below = [b for b in menu if b <= width]
        for i in members:
            bits[i] = below[-1] if below else menu[0]
    return bits


def _next(widths: tuple[int, ...], width: int) -> int:
    return min((b for b in widths if b > width), default=width)
