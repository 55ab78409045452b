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

    A group whose menu is not that of the most elements, such as a pinned one, stands outside the
    order and chooses freely: the paper has one menu, and a narrow one inside the order would
    forbid widths to all that come before or after it.

    Args:
        space: What may be chosen; menus and ties are respected.
        sensitivity: Ω, shape (L, B).
        cost: Shape (L, B).
        traces: Hessian traces, shape (L,); tied groups are ordered by their average together.

    Raises:
        ValueError: If a shape or a value is wrong.
    """
    rows = merge_ties(space, sensitivity, cost)
    menus = [space.menu_of(members) for members in rows.members]
    if traces.shape != (len(space),) or not np.isfinite(traces).all():
        raise ValueError(f"traces must be {len(space)} finite numbers, got shape {traces.shape}")
    sizes = np.array([group.num_elements for group in space.groups])
    elements = [int(sizes[list(members)].sum()) for members in rows.members]
    average = [traces[list(m)].sum() / n for m, n in zip(rows.members, elements, strict=True)]
    common: dict[tuple[int, ...], int] = {}
    for menu, n in zip(menus, elements, strict=True):
        common[menu] = common.get(menu, 0) + n * (len(menu) > 1)
    shared = max(common, key=lambda menu: common[menu])
    inside = [i for i, menu in enumerate(menus) if menu == shared]
    outside = [i for i, menu in enumerate(menus) if menu != shared]
    order = sorted(inside, key=lambda i: -average[i])

    # Those outside first: their undominated choices are where the staircases begin.
    beginnings = _choices(rows, outside)
    every = np.arange(len(menus))
    total_cost = rows.cost[every[outside], beginnings].sum(1)
    total = rows.sensitivity[every[outside], beginnings].sum(1)
    descending = np.searchsorted(space.widths, shared)[::-1]
    staircases, beginning = _staircases(rows, order, descending, total_cost, total)
    choice = np.empty((len(staircases), len(menus)), np.int8)
    choice[:, order] = staircases
    choice[:, outside] = beginnings[beginning]
    return rows.front(space, choice)


def _choices(rows: Rows, outside: list[int]) -> NDArray[np.int64]:
    """Columns, shape (F, len(outside)), of all undominated choices of a few rows."""
    choice = np.empty((1, 0), np.int64)
    total_cost, total = np.zeros(1, np.int64), np.zeros(1)
    for row in outside:
        cost = np.add.outer(total_cost, rows.cost[row]).ravel()
        candidate = np.add.outer(total, rows.sensitivity[row]).ravel()
        keep = undominated(cost, candidate)
        total_cost, total = cost[keep], candidate[keep]
        parent, option = np.divmod(keep, rows.cost.shape[1])
        choice = np.column_stack([choice[parent], option])
    return choice


def _staircases(
    rows: Rows,
    order: list[int],
    descending: NDArray[np.int64],
    total_cost: NDArray[np.int64],
    total: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Columns, shape (F, len(order)), of all staircases that may be undominated, and their starts.

    The totals, shape (S,), are those that they may start with.
    """
    step = np.zeros(len(total), np.int64)  # where on `descending` each beginning stands
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
    return choice, point
