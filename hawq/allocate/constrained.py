"""The exact front over one cost while another one is limited.

Weights and activations at once: the front over size, for a limit of activation memory. Rows that
the limited cost touches come first, by dominance in both costs and Ω; once they are chosen the
limit is applied, and the others follow by dominance in cost and Ω alone (Nemhauser & Ullmann,
1969). Where no row has both costs, as with weights and activations that are not tied, the first
part is itself a front of two quantities, and small.
"""

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.front import Front, InfeasibleBudgetError, merge_ties, undominated
from hawq.space import Space

__all__ = ["FrontTooLargeError", "constrained_front", "undominated_in_three"]

_FEW = 48  # points that are compared each with each


class FrontTooLargeError(ValueError):
    """More partial allocations are undominated than may be kept.

    Attributes:
        num_points: How many there were.
        max_points: How many were allowed.
    """

    def __init__(self, num_points: int, max_points: int) -> None:
        super().__init__(
            f"the front must stay within {max_points} points, got {num_points}; solve for one "
            "budget with milp_solution, or let costs be multiples of a larger unit"
        )
        self.num_points, self.max_points = num_points, max_points


def constrained_front(
    space: Space,
    sensitivity: NDArray[np.float64],
    cost: NDArray[np.int64],
    limited: NDArray[np.int64],
    limit: int,
    *,
    max_points: int = 200_000,
) -> Front:
    """Find all allocations that are undominated in (cost, Ω) among those within a limit.

    Args:
        space: What may be chosen; menus and ties are respected.
        sensitivity: Ω of group l at width b, shape (L, B).
        cost: Cost of the same that the front is over, shape (L, B).
        limited: The other cost of the same, shape (L, B).
        limit: The most that the other cost may be in total.
        max_points: Partial allocations, undominated in all three quantities, that may be kept.

    Raises:
        InfeasibleBudgetError: If no allocation is within the limit.
        FrontTooLargeError: If more than ``max_points`` would have to be kept.
        ValueError: If a table's shape or values are wrong.
    """
    rows = merge_ties(space, sensitivity, cost)
    other = merge_ties(space, sensitivity, limited).cost
    barred = ~np.isfinite(rows.sensitivity)
    least = np.where(barred, np.iinfo(np.int64).max, other).min(1)
    if least.sum() > limit:
        raise InfeasibleBudgetError(limit, int(least.sum()))
    touched = (np.where(barred, least[:, None], other) > least[:, None]).any(1)
    slack = limit - int(least.sum())  # what rows may cost above their least
    above = other - least[:, None]

    order = np.argsort(~touched, kind="stable")
    total_cost, total_above, total = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for step, row in enumerate(order.tolist()):
        if step == touched.sum():
            total_above = np.zeros_like(total_above)  # within the limit, whatever follows
        columns = np.flatnonzero(~barred[row])
        candidate_cost = np.add.outer(total_cost, rows.cost[row, columns]).ravel()
        candidate = np.add.outer(total, rows.sensitivity[row, columns]).ravel()
        if touched[row]:
            candidate_above = np.add.outer(total_above, above[row, columns]).ravel()
            within = np.flatnonzero(candidate_above <= slack)
            keep = within[
                undominated_in_three(
                    candidate_cost[within], candidate_above[within], candidate[within]
                )
            ]
            total_above = candidate_above[keep]
        else:
            keep = undominated(candidate_cost, candidate)
        if len(keep) > max_points:
            raise FrontTooLargeError(len(keep), max_points)
        total_cost, total = candidate_cost[keep], candidate[keep]
        parent, option = np.divmod(keep, len(columns))
        history.append((parent, columns[option]))
    choice = np.empty((len(total), len(order)), np.int8)
    point = np.arange(len(total))
    for row, (parent, option) in zip(order[::-1], history[::-1], strict=True):
        choice[:, row] = option[point]
        point = parent[point]
    return rows.front(space, choice)


def undominated_in_three(
    first: NDArray[np.int64], second: NDArray[np.int64], sensitivity: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the indices of the points that no other beats in all three quantities."""
    order = np.lexsort((sensitivity, second, first))

    def kept(points: NDArray[np.int64]) -> NDArray[np.int64]:
        # A point is beaten by an earlier one alone: later ones are dearer, or equal to it.
        if len(points) <= _FEW:
            a, b = second[points], sensitivity[points]
            beats = (a[:, None] <= a) & (b[:, None] <= b)
            return points[~np.triu(beats, 1).any(0)]
        left, right = kept(points[: len(points) // 2]), kept(points[len(points) // 2 :])
        by_second = left[np.argsort(second[left], kind="stable")]
        best = np.minimum.accumulate(sensitivity[by_second])
        cheaper = np.searchsorted(second[by_second], second[right], side="right")
        beaten = (cheaper > 0) & (best[cheaper - 1] <= sensitivity[right])
        return np.append(left, right[~beaten])

    return kept(order)
