"""HAWQ-V2's front: a layer with a larger average trace never receives fewer bits.

Dong et al. (2020) sort the layers by average Hessian trace and admit only bit vectors that do not
increase along that order: C(L+m−1, m−1) of them for L layers and m widths, 23,426 for 50 layers
and 4 widths but 436 million for 54 layers and 8. They enumerate; we walk the order once and keep,
for each width that the last layer received, the undominated beginnings. The front is the same.
"""

from math import comb

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.front import Front, Rows, merge_ties, undominated
from hawq.space import Space

__all__ = ["monotone_count", "monotone_front"]


def monotone_count(num_layers: int, num_widths: int) -> int:
    """Count HAWQ-V2's admissible bit vectors."""
    return comb(num_layers + num_widths - 1, num_widths - 1)


def monotone_front(
    space: Space,
    sensitivity: NDArray[np.float64],
    cost: NDArray[np.int64],
    traces: NDArray[np.float64],
) -> Front:
    """Find the undominated allocations among HAWQ-V2's monotone ones.

    A pinned group keeps its bits and stands outside the order: the paper does not pin, and a pin
    inside the order would forbid other widths before or after it.

    Args:
        space: What may be chosen. Groups that are free must share one menu.
        sensitivity: Ω, shape (L, B).
        cost: Shape (L, B).
        traces: Hessian traces, shape (L,); tied groups are ordered by their average together.

    Raises:
        ValueError: If a shape is wrong, or free groups have different menus.
    """
    rows = merge_ties(space, sensitivity, cost)
    menus = [space.menu_of(members) for members in rows.members]
    free = [i for i, menu in enumerate(menus) if len(menu) > 1]
    if len({menus[i] for i in free}) > 1:
        raise ValueError("free groups must share one menu for a monotone front, got several")
    if traces.shape != (len(space),) or not np.isfinite(traces).all():
        raise ValueError(f"traces must be {len(space)} finite numbers, got shape {traces.shape}")

    # Pins first (one column each), then the free rows from the largest average trace down.
    choice = np.empty((1, len(menus)), np.int8)
    for i, menu in enumerate(menus):
        choice[:, i] = np.searchsorted(space.widths, menu[0])
    if free:
        sizes = np.array([group.num_elements for group in space.groups])
        average = [traces[list(m)].sum() / sizes[list(m)].sum() for m in rows.members]
        order = sorted(free, key=lambda i: -average[i])
        descending = np.searchsorted(space.widths, menus[free[0]])[::-1]
        staircases = _staircases(rows, order, descending)
        choice = np.repeat(choice, len(staircases), 0)
        choice[:, order] = staircases
    return rows.front(space, choice)


def _staircases(rows: Rows, order: list[int], descending: NDArray[np.int64]) -> NDArray[np.int64]:
    """Columns, shape (F, len(order)), of all staircases that may be undominated."""
    step = np.zeros(1, np.int64)  # where on `descending` each beginning stands
    total_cost, total = np.zeros(1, np.int64), np.zeros(1)
    history = []
    for row in order:
        parents, steps, costs, totals = [], [], [], []
        for s, column in enumerate(descending):
            reachable = np.flatnonzero(step <= s)
            kept = reachable[undominated(total_cost[reachable], total[reachable])]
            parents.append(kept)
            steps.append(np.full(len(kept), s))
            costs.append(total_cost[kept] + rows.cost[row, column])
            totals.append(total[kept] + rows.sensitivity[row, column])
        step, total_cost, total = map(np.concatenate, (steps, costs, totals))
        history.append((np.concatenate(parents), step))
    choice = np.empty((len(step), len(order)), np.int64)
    point = np.arange(len(step))
    for i in range(len(order) - 1, -1, -1):
        parent, taken = history[i]
        choice[:, i] = descending[taken[point]]
        point = parent[point]
    return choice
