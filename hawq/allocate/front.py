"""A front: allocations of which none is both smaller and less sensitive than another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq.allocation import Allocation
from hawq.space import Space

__all__ = ["Front", "InfeasibleBudgetError", "Rows", "evenly", "merge_ties", "undominated"]


class InfeasibleBudgetError(ValueError):
    """No allocation fits the budget.

    Attributes:
        budget: What was asked.
        minimum: The least that would do, same unit.
    """

    def __init__(self, budget: int, minimum: int) -> None:
        super().__init__(f"budget must be at least {minimum}, got {budget}")
        self.budget, self.minimum = budget, minimum


@dataclass(frozen=True, slots=True)
class Front:
    """Undominated allocations of a space, cheapest first.

    Attributes:
        space: The space that was allocated.
        cost: Total costs, shape (F,), strictly increasing.
        sensitivity: Total Ω, shape (F,), strictly decreasing.
        choice: Column of each group in the tables, shape (F, L).
    """

    space: Space
    cost: NDArray[np.int64]
    sensitivity: NDArray[np.float64]
    choice: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.cost)

    def allocation(self, point: int) -> Allocation:
        """Return the allocation of one point."""
        widths = self.space.widths
        return Allocation.of(self.space, [widths[c] for c in self.choice[point]])

    def within(self, budget: int) -> int:
        """Return the point of least sensitivity that costs at most ``budget``.

        Raises:
            InfeasibleBudgetError: If even the cheapest allocation costs more.
        """
        fits = int(np.searchsorted(self.cost, budget, side="right"))
        if fits == 0:
            raise InfeasibleBudgetError(budget, int(self.cost[0]))
        return fits - 1


@dataclass(frozen=True, slots=True)
class Rows:
    """Tables whose rows choose freely: tied groups are summed into one row.

    Attributes:
        sensitivity: Shape (R, B); infinite where the row may not choose the column.
        cost: Shape (R, B).
        members: Groups behind each row.
    """

    sensitivity: NDArray[np.float64]
    cost: NDArray[np.int64]
    members: Sequence[tuple[int, ...]]

    def front(self, space: Space, choice: NDArray[np.integer[Any]]) -> Front:
        """Keep the undominated ones of some choices of rows, shape (F, R).

        Every front's totals are summed here, in one order, so that equal allocations have equal
        totals whichever algorithm found them.
        """
        every = np.arange(len(self.members))
        total_cost = self.cost[every, choice].sum(1)
        total = self.sensitivity[every, choice].sum(1)
        keep = undominated(total_cost, total)
        spread = np.empty((len(keep), len(space)), np.int8)
        for row, groups in enumerate(self.members):
            spread[:, list(groups)] = choice[keep, row, None]
        return Front(space, total_cost[keep], total[keep], spread)


def merge_ties(space: Space, sensitivity: NDArray[np.float64], cost: NDArray[np.int64]) -> Rows:
    """Sum the rows of tied groups.

    Raises:
        ValueError: If a table has another shape than the space, a NaN, or a negative cost, or if
            no width of some group has a finite sensitivity.
    """
    expected = (len(space), len(space.widths))
    if sensitivity.shape != expected or cost.shape != expected:
        raise ValueError(
            f"sensitivity and cost must have shape {expected}, "
            f"got {sensitivity.shape} and {cost.shape}"
        )
    if np.isnan(sensitivity).any() or (cost < 0).any():
        raise ValueError("sensitivity must not hold NaN, nor cost negative numbers")
    members = space.rows()
    barred = np.where(space.allowed(), sensitivity, np.inf)
    row_of = np.empty(len(space), np.int64)
    for row, groups in enumerate(members):
        row_of[list(groups)] = row
    merged = np.zeros((len(members), expected[1]))
    merged_cost = np.zeros(merged.shape, np.int64)
    np.add.at(merged, row_of, barred)  # in the order of the groups
    np.add.at(merged_cost, row_of, cost)
    finite = np.isfinite(merged).any(1)
    if not finite.all():
        name = space.names[members[int(np.argmin(finite))][0]]
        raise ValueError(f"sensitivity must be finite for some allowed width, got none for {name}")
    return Rows(merged, merged_cost, members)


def undominated(cost: NDArray[np.int64], sensitivity: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the indices of the points that no other beats, cheapest first.

    Barred points, of infinite sensitivity, are left out.
    """
    order = np.lexsort((sensitivity, cost))  # by cost, then sensitivity
    best = np.minimum.accumulate(sensitivity[order])
    improves = np.append(True, best[1:] < best[:-1])
    return order[improves & np.isfinite(best)]


def evenly(cost: NDArray[np.int64], num: int) -> NDArray[np.int64]:
    """Thin a front: return the indices of the last points within ``num`` evenly spaced costs.

    Both ends are among them, and for each that is left out one less than a spacing above it.

    Args:
        cost: Costs of the points, shape (F,), increasing.
        num: How many to keep at most, at least 2.
    """
    if len(cost) <= num:
        return np.arange(len(cost))
    # Whole numbers throughout: a rounded last cost would lose the last point.
    steps = np.arange(num, dtype=np.int64)
    budgets = cost[0] + (cost[-1] - cost[0]) * steps // (num - 1)
    found: NDArray[np.int64] = np.unique(np.searchsorted(cost, budgets, side="right") - 1)
    return found
