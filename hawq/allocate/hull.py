"""Very many groups: the convex hull of the whole front, in one sweep.

For a price λ of one unit of cost, every group takes the width of least Ω + λ·cost, whatever the
others take (Everett, 1963). As λ falls, each group walks up its own lower convex hull; all walks
merged by slope are the hull of the front of all allocations, and every point of it is an
allocation (Sinha & Zoltners, 1979). Between two points the hull is a lower bound of the front.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.front import InfeasibleBudgetError

__all__ = ["Hull", "lower_hull", "reduced_costs"]


@dataclass(frozen=True, slots=True, eq=False)
class Hull:
    """Lower convex hull of (cost, Ω) over all allocations, cheapest first.

    Kept as the order of the steps from point to point, each of which changes one row, so that
    10⁵ points of 10⁵ rows take megabytes. F points have F − 1 steps.

    Attributes:
        sensitivity: The tables: Ω of row r at option b, shape (R, B); infinite where barred.
        cost: Cost of the same, shape (R, B).
        start: Options of the cheapest point, shape (R,).
        row: The row that each step changes, shape (F − 1,).
        option: What the step changes it to, shape (F − 1,).
        slope: Ω that the step saves for one unit of cost, shape (F − 1,), not increasing.
        total_cost: Costs of the points, shape (F,), increasing.
        total: Ω of the points, shape (F,), decreasing.
    """

    sensitivity: NDArray[np.float64]
    cost: NDArray[np.int64]
    start: NDArray[np.int64]
    row: NDArray[np.int64]
    option: NDArray[np.int64]
    slope: NDArray[np.float64]
    total_cost: NDArray[np.int64]
    total: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.total_cost)

    def choice(self, point: int) -> NDArray[np.int64]:
        """Return the option of every row at a point, shape (R,)."""
        last = np.arange(len(self))[point]  # also counts from the end
        choice = self.start.copy()
        choice[self.row[:last]] = self.option[:last]  # a row's last step is the one that stays
        return choice

    def within(self, budget: int) -> int:
        """Return the last point that costs at most ``budget``.

        Raises:
            InfeasibleBudgetError: If even the cheapest allocation costs more.
        """
        fits = int(np.searchsorted(self.total_cost, budget, side="right"))
        if fits == 0:
            raise InfeasibleBudgetError(budget, int(self.total_cost[0]))
        return fits - 1

    def price(self, budget: int) -> float:
        """Return λ: Ω that one more unit of cost would save at a budget."""
        point = self.within(budget)
        return float(self.slope[point]) if point < len(self) - 1 else 0.0

    def bound(self, budget: int) -> float:
        """Return an Ω that no allocation within a budget is below.

        The dual function Σ_r min_b (Ω + λ·cost) − λ·budget, which bounds from below for every
        λ ≥ 0. It is summed as differences to the point below the budget, all of which vanish but
        for rounding.
        """
        point, price = self.within(budget), self.price(budget)
        reduced = reduced_costs(self.sensitivity, self.cost, self.choice(point), price)
        slack = budget - int(self.total_cost[point])
        return float(self.total[point]) - price * slack + float(reduced.min(1).sum())


def lower_hull(sensitivity: NDArray[np.float64], cost: NDArray[np.int64]) -> Hull:
    """Find the lower convex hull of all allocations.

    Args:
        sensitivity: Ω of row r at option b, shape (R, B), infinite where the row may not choose
            it. A row is a group, or tied groups summed (``merge_ties``); an option is any column,
            0 bits as well.
        cost: Cost of the same, shape (R, B).

    Raises:
        ValueError: If a shape or a value is wrong, or a row may choose nothing.
    """
    check_tables(sensitivity, cost)
    every = np.arange(len(cost))
    cheapest = np.where(np.isfinite(sensitivity), cost, np.iinfo(np.int64).max).min(1)
    start = np.where(cost == cheapest[:, None], sensitivity, np.inf).argmin(1)
    at, walking = start.copy(), every
    slope_so_far = np.full(len(cost), np.inf)
    rows, options, slopes = [], [], []
    while len(walking):
        added = cost[walking] - cost[walking, at[walking], None]
        saved = sensitivity[walking, at[walking], None] - sensitivity[walking]
        useful = (added > 0) & (saved > 0)
        rate = np.where(useful, saved / np.where(useful, added, 1), 0)
        best = rate.max(1, keepdims=True)
        furthest = np.where(rate == best, added, -1).argmax(1)  # of equal slopes one step
        goes_on = best[:, 0] > 0
        walking, furthest = walking[goes_on], furthest[goes_on]
        # Rounding may not turn a hull around, or its steps would be sorted out of order.
        slope_so_far[walking] = np.minimum(slope_so_far[walking], best[goes_on, 0])
        at[walking] = furthest
        rows.append(walking)
        options.append(furthest)
        slopes.append(slope_so_far[walking])
    row, option, slope = (np.concatenate(x) for x in (rows, options, slopes))
    order = np.argsort(-slope, kind="stable")
    row, option, slope = row[order], option[order], slope[order]
    before = _previous(start, row, option)
    added = cost[row, option] - cost[row, before]
    saved = sensitivity[row, before] - sensitivity[row, option]
    total_cost = int(cost[every, start].sum()) + np.append(0, np.cumsum(added))
    # Summed from the last point back, where Ω is small: then no digits of it are lost.
    total = float(sensitivity[every, at].sum()) + np.append(0, np.cumsum(saved[::-1]))[::-1]
    return Hull(sensitivity, cost, start, row, option, slope, total_cost, total)


def reduced_costs(
    sensitivity: NDArray[np.float64],
    cost: NDArray[np.int64],
    choice: NDArray[np.int64],
    price: float,
) -> NDArray[np.float64]:
    """Return how much dearer, at a price λ, each option is than the chosen one, shape (R, B)."""
    at = np.arange(len(cost)), choice
    dearer: NDArray[np.float64] = (sensitivity - sensitivity[at][:, None]) + price * (
        cost - cost[at][:, None]
    )
    return dearer


def check_tables(sensitivity: NDArray[np.float64], cost: NDArray[np.int64]) -> None:
    """Refuse tables that make no sense.

    Raises:
        ValueError: If the shapes differ, there is no row, a cost is negative or not an integer,
            an Ω is NaN or −∞, or a row has no finite Ω.
    """
    if sensitivity.ndim != 2 or not sensitivity.size or sensitivity.shape != cost.shape:
        raise ValueError(
            f"sensitivity and cost must be of one shape, R × B, "
            f"got {sensitivity.shape} and {cost.shape}"
        )
    if not np.issubdtype(cost.dtype, np.integer) or (cost < 0).any():
        raise ValueError("cost must hold integers that are not negative")
    if np.isnan(sensitivity).any() or np.isneginf(sensitivity).any():
        raise ValueError("sensitivity must not hold NaN nor −∞")
    finite = np.isfinite(sensitivity).any(1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ValueError(f"sensitivity must be finite for some option, got none for row {row}")


def _previous(
    start: NDArray[np.int64], row: NDArray[np.int64], option: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return what each step's row had chosen before it."""
    order = np.lexsort((np.arange(len(row)), row))
    before = np.empty_like(option)
    first = np.append(True, row[order][1:] != row[order][:-1])[: len(row)]
    before[order] = np.where(first, start[row[order]], np.roll(option[order], 1))
    return before
