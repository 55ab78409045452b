"""Searchers that have a front: every point that they can offer over all sizes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hawq.allocate import Front, Options, best_pair, milp_solution
from hawq.allocation import Allocation
from hawq.space import Kind
from search.evaluate import Evaluation
from search.searchers.problem import KINDS, Problem, Searcher, halves_of, refuse, together
from search.tables import Part, Tables

__all__ = ["FrontSearcher"]

# Makes a front of a part, over a cost of shape (R, C).
MakeFront = Callable[[Part, NDArray[np.int64]], Front]


@dataclass(frozen=True, slots=True)
class FrontSearcher:
    """Take the largest point of a front that fits: the best there by the front's own objective.

    Where budgets join weights and activations, or are several: with ``exact`` an integer programme;
    without, the best pair of a point of the weights' front over size and one of the activations'.
    A front whose objective is not Ω has nothing to weigh a weight against an activation with, and
    ``needs_sums`` or ``needs_blocks``.
    """

    make_front: MakeFront
    exact: bool = False
    by_channel: bool = False
    is_random: bool = False
    needs_sums: bool = False
    needs_blocks: bool = False
    needs_scores: bool = False
    starts: tuple[Searcher, ...] = ()

    def front(self, tables: Tables, kind: Kind) -> Front | None:
        """Return the front over the size of all weights, or of one example's activations.

        Raises:
            ValueError: If the tables lack what the method goes by.
        """
        part = tables.part(kind)
        if part is None:
            return None
        front = self.make_front(part, part.size)
        rows = np.arange(len(part.space))
        return replace(front, sensitivity=part.sensitivity[rows, front.choice].sum(1))

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:  # noqa: ARG002
        """Yield one allocation, scored by −Ω.

        Raises:
            ValueError: If without ``exact`` no pair of points is within the budgets, though
                another allocation is; if the tables lack what the method goes by, or hold more.
        """
        tables = problem.tables
        if self.needs_blocks and tables.part("activations") is not None:
            raise ValueError("activations must not be searched: it orders blocks of weights alone")
        halves = halves_of(problem) if self.needs_sums else problem.halves()
        if halves is not None:
            chosen = []
            for half in halves:
                front = self.make_front(half.part, half.cost)
                chosen.append(front.allocation(front.within(half.limit)))
            allocation = together(tables.space, chosen)
            yield tables.proxy(allocation, tables.omega(allocation) if self.exact else None)
        elif self.exact:
            solution = milp_solution(tables.space, tables.sensitivity, problem.budgets)
            yield tables.proxy(solution.allocation, solution.bound)
        else:
            yield tables.proxy(self._pair(problem))

    def _pair(self, problem: Problem) -> Allocation:
        tables = problem.tables
        fronts: list[Front] = []
        options: list[Options] = []
        for kind in KINDS:
            part = tables.part(kind)
            if part is not None:
                front = self.make_front(part, part.size)
                fronts.append(front)
                options.append(Options(part.rows, part.columns[front.choice], front.sensitivity))
        first, second = [*options, Options.none()][:2]
        pair = best_pair(first, second, problem.budgets)
        if pair is None:
            refuse(problem, "its fronts over size")
        points = zip(fronts, pair, strict=False)  # of a missing half there is no front
        return together(tables.space, [front.allocation(point) for front, point in points])
