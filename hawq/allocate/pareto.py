"""The exact front: every undominated allocation, for all budgets at once.

The multiple-choice knapsack of HAWQ-V3 (Yao et al., 2021) by dominance pruning (Nemhauser &
Ullmann, 1969): partial allocations of the first rows that another one beats can never be part of
an undominated whole.
"""

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.front import Front, merge_ties, undominated
from hawq.space import Space

__all__ = ["pareto_front"]


def pareto_front(space: Space, sensitivity: NDArray[np.float64], cost: NDArray[np.int64]) -> Front:
    """Find all undominated allocations.

    Args:
        space: What may be chosen; menus and ties are respected.
        sensitivity: Ω of group l at width b, shape (L, B).
        cost: Cost of the same, shape (L, B). The front holds at most one point per unit of the
            greatest common divisor of all costs.

    Raises:
        ValueError: If a table's shape or values are wrong.
    """
    rows = merge_ties(space, sensitivity, cost)
    total_cost = np.zeros(1, np.int64)
    total = np.zeros(1)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for row_sensitivity, row_cost in zip(rows.sensitivity, rows.cost, strict=True):
        candidate_cost = np.add.outer(total_cost, row_cost).ravel()
        candidate = np.add.outer(total, row_sensitivity).ravel()
        keep = undominated(candidate_cost, candidate)
        total_cost, total = candidate_cost[keep], candidate[keep]
        parent, option = np.divmod(keep, len(row_cost))
        history.append((parent, option))
    # Choices are read backwards, so that the loop above never copies them.
    choice = np.empty((len(total), len(history)), np.int8)
    point = np.arange(len(total))
    for row in range(len(history) - 1, -1, -1):
        parent, option = history[row]
        choice[:, row] = option[point]
        point = parent[point]
    return rows.front(space, choice)
