"""Two fronts, one of the weights and one of the activations, under budgets that join them.

Bit operations are products of both, so neither front alone knows what fits. Of all pairs of a point
of one and a point of the other, the one of least Ω that is within every budget.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.front import Front
from hawq.allocate.milp import Budget

__all__ = ["best_pair"]

_CHUNK = 256


def best_pair(
    first: Front,
    first_rows: Sequence[int],
    second: Front,
    second_rows: Sequence[int],
    widths: Sequence[int],
    budgets: Sequence[Budget],
) -> tuple[int, int] | None:
    """Find the two points of least Ω together within all budgets.

    Args:
        first: A front of some groups.
        first_rows: Their rows in the costs' tables.
        second: A front of the others.
        second_rows: Their rows.
        widths: The columns of the costs' tables.
        budgets: What limits both.

    Returns:
        Indices into both fronts; None if no pair is within the budgets.
    """
    one, two = (
        np.searchsorted(widths, np.array(front.space.widths)[front.choice])
        for front in (first, second)
    )
    place = {row: (0, i) for i, row in enumerate(first_rows)}
    place |= {row: (1, i) for i, row in enumerate(second_rows)}
    best: tuple[float, int, int] | None = None
    for start in range(0, len(first), _CHUNK):
        part = one[start : start + _CHUNK]
        fits = np.ones((len(part), len(second)), np.bool_)
        for budget in budgets:
            total: NDArray[np.int64] | None = None
            for step in budget.cost.steps:
                sums = _sums(step, first_rows, part)[:, None] + _sums(step, second_rows, two)
                total = sums if total is None else np.maximum(total, sums)
            assert total is not None
            for pair in budget.cost.pairs:
                (a, i), (b, j) = place[pair.first], place[pair.second]
                columns = (part, two)[a][:, i], (part, two)[b][:, j]
                if a == b:
                    together = pair.table[columns]
                    total = total + (together[:, None] if a == 0 else together)
                elif a == 0:
                    total = total + pair.table[columns[0][:, None], columns[1]]
                else:
                    total = total + pair.table[columns[0], columns[1][:, None]]
            fits &= total <= budget.limit
        omega = first.sensitivity[start : start + _CHUNK, None] + second.sensitivity
        omega = np.where(fits, omega, np.inf)
        at = int(omega.argmin())
        found = float(omega.flat[at])
        if np.isfinite(found) and (best is None or found < best[0]):
            best = (found, start + at // len(second), at % len(second))
    return None if best is None else best[1:]


def _sums(
    step: NDArray[np.int64], rows: Sequence[int], columns: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Sum a table over some rows, for each of several choices of columns, shape (F,)."""
    sums: NDArray[np.int64] = step[list(rows), columns].sum(1)
    return sums
