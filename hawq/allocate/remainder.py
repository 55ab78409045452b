"""What is left of a budget below a point of the hull: spend it as well as can be.

The best allocation for a budget differs from the hull's point below it in a few rows, those whose
next-best option is nearly as good at the budget's price λ (the core of Balas & Zemel, 1980;
Pisinger, 1995). A row's option that is dearer by more than the whole gap is in no better
allocation, and the rest is searched by dominance, most promising rows first. Where nothing had to
be dropped the answer is optimal, and its bound is its own Ω.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.front import undominated
from hawq.allocate.hull import Hull, reduced_costs

__all__ = ["Choice", "spend"]


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """A choice of options within a budget.

    Attributes:
        options: The option of every row, shape (R,).
        sensitivity: Its Ω.
        cost: What it costs.
        bound: No choice within the budget has a smaller Ω.
    """

    options: NDArray[np.int64]
    sensitivity: float
    cost: int
    bound: float


def spend(found: Hull, budget: int, *, max_states: int = 4000, max_rows: int = 400) -> Choice:
    """Improve the hull's point below a budget.

    Args:
        found: The hull.
        budget: Largest cost.
        max_states: Partial changes kept after each row; those that look worst at the price λ are
            dropped, and the bound says what that may have cost.
        max_rows: Rows that may change.

    Raises:
        InfeasibleBudgetError: If even the cheapest choice costs more.
    """
    point, price = found.within(budget), found.price(budget)
    options = found.choice(point)
    slack = budget - int(found.total_cost[point])
    bound = found.bound(budget)
    gap = float(found.total[point]) - bound  # of the best so far; it shrinks below
    dearer = np.maximum(reduced_costs(found.sensitivity, found.cost, options, price), 0)
    dearer[np.arange(len(options)), options] = np.inf
    nearest = dearer.min(1)
    core = np.argsort(nearest, kind="stable")

    total_cost, total = np.zeros(1, np.int64), np.zeros(1)  # changes that are undominated so far
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    best, dropped = (0, 0), np.inf
    for row in core[:max_rows].tolist():
        if nearest[row] >= gap:
            break
        columns = np.append(options[row], np.flatnonzero(dearer[row] < gap))
        added = found.cost[row, columns] - found.cost[row, options[row]]
        gained = found.sensitivity[row, columns] - found.sensitivity[row, options[row]]
        cost = np.add.outer(total_cost, added).ravel()
        change = np.add.outer(total, gained).ravel()
        keep = undominated(cost, change)
        reduced = change[keep] + price * cost[keep]
        keep, reduced = keep[reduced < gap], reduced[reduced < gap]
        if len(keep) > max_states:
            promising = np.sort(np.argpartition(reduced, max_states)[:max_states])
            dropped = min(dropped, float(reduced[promising].max()))
            keep = keep[promising]
        parent, option = np.divmod(keep, len(columns))
        history.append((parent, columns[option]))
        total_cost, total = cost[keep], change[keep]
        fits = int(np.searchsorted(total_cost, slack, side="right"))
        if fits and total[fits - 1] + price * slack < gap:
            gap, best = float(total[fits - 1]) + price * slack, (len(history), fits - 1)

    # A better choice would need a change that was dropped, or a row that was never looked at.
    unseen = nearest[core[len(history)]] if len(history) < len(core) else np.inf
    length, state = best
    for row, (parent, option) in zip(core[:length][::-1], history[:length][::-1], strict=True):
        options[row] = option[state]
        state = parent[state]
    every = np.arange(len(options))
    sensitivity = float(found.sensitivity[every, options].sum())
    bound += min(gap, dropped, float(unseen))
    return Choice(
        options, sensitivity, int(found.cost[every, options].sum()), min(bound, sensitivity)
    )
