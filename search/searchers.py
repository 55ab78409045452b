"""Searchers by name: each proposes allocations for a budget, the best of which is its candidate.

``SEARCHERS`` is the table that a config's ``methods`` names. A searcher gets a problem and yields
evaluations, one for each distinct allocation that it scored. The Hessian methods need no more
than one, by proxy; an agent or a sampler yields as many as it may and scores them as it likes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hawq.allocate import Front, monotone_front, pareto_front
from hawq.allocation import Allocation
from hawq.cost import total
from hawq.space import Space
from search.evaluate import Evaluate, Evaluation

__all__ = ["SEARCHERS", "Problem", "Searcher", "Tables"]


@dataclass(frozen=True, slots=True)
class Tables:
    """What the Hessian says about a space.

    Attributes:
        space: What may be chosen.
        sensitivity: Ω, shape (L, B).
        weight_bits: Size in bits, shape (L, B).
        traces: Hessian traces, shape (L,).
    """

    space: Space
    sensitivity: NDArray[np.float64]
    weight_bits: NDArray[np.int64]
    traces: NDArray[np.float64]

    def omega(self, allocation: Allocation) -> float:
        """Return Ω of a whole allocation."""
        rows = np.arange(len(self.space))
        return float(self.sensitivity[rows, allocation.choice(self.space)].sum())

    def proxy(self, allocation: Allocation) -> Evaluation:
        """Score an allocation by −Ω."""
        return Evaluation(allocation, -self.omega(allocation), "proxy")


@dataclass(frozen=True, slots=True)
class Problem:
    """What a searcher is asked.

    Attributes:
        tables: The space with its costs and sensitivities.
        limit_bits: Size that no proposed allocation may exceed.
        evaluate: Scores an allocation; costs what its fidelity costs.
    """

    tables: Tables
    limit_bits: int
    evaluate: Evaluate

    def fits(self, allocation: Allocation) -> bool:
        """Whether an allocation is within the budget."""
        used = total(self.tables.weight_bits, self.tables.space, allocation)
        return used <= self.limit_bits


class Searcher(Protocol):
    """A way of searching."""

    def front(self, tables: Tables) -> Front | None:
        """Return every point the method can offer over all budgets, where it knows them."""
        ...

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterable[Evaluation]:
        """Yield scored allocations, each distinct and within the budget.

        Args:
            problem: What to search.
            evaluations: How many allocations may be scored, at most.
            seed: Of whatever is random.
        """
        ...


@dataclass(frozen=True, slots=True)
class FrontSearcher:
    """Take the least sensitive point of a front that fits the budget."""

    make_front: Callable[[Tables], Front]

    def front(self, tables: Tables) -> Front:
        """Return the front."""
        return self.make_front(tables)

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:  # noqa: ARG002
        """Yield one allocation, scored by −Ω."""
        front = self.make_front(problem.tables)
        yield problem.tables.proxy(front.allocation(front.within(problem.limit_bits)))


@dataclass(frozen=True, slots=True)
class UniformSearcher:
    """The reference that knows nothing: the same bits everywhere.

    The largest width b that fits; what is left of the budget gives the next width to layers in a
    seeded random order, wherever it still fits. At a budget of exactly b bits a weight this is
    plain uniform quantization. Pinned layers keep their bits; a menu that lacks b gives its
    largest width below it, or else its least.
    """

    def front(self, tables: Tables) -> None:  # noqa: ARG002
        """There is none: the order is random."""
        return

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:  # noqa: ARG002
        """Yield one allocation, scored by −Ω."""
        space = problem.tables.space
        uniform = [_uniform(space, width) for width in space.widths]
        fitting = [bits for bits in uniform if problem.fits(Allocation.of(space, bits))]
        bits = fitting[-1] if fitting else _uniform(space, min(space.widths))
        if len(fitting) < len(uniform):
            wider = uniform[len(fitting)]
            rows = space.rows()
            for row in np.random.default_rng(seed).permutation(len(rows)):
                trial = list(bits)
                for i in rows[row]:
                    trial[i] = wider[i]
                if problem.fits(Allocation.of(space, trial)):
                    bits = trial
        yield problem.tables.proxy(Allocation.of(space, bits))


def _uniform(space: Space, width: int) -> list[int]:
    bits = [0] * len(space)
    for members in space.rows():
        menu = space.menu_of(members)
        below = [b for b in menu if b <= width]
        for i in members:
            bits[i] = below[-1] if below else menu[0]
    return bits


SEARCHERS: dict[str, Searcher] = {
    "uniform": UniformSearcher(),
    "hawq-v2": FrontSearcher(
        lambda t: monotone_front(t.space, t.sensitivity, t.weight_bits, t.traces)
    ),
    "exact": FrontSearcher(lambda t: pareto_front(t.space, t.sensitivity, t.weight_bits)),
}
