"""Choices of the weights and choices of the activations, under budgets that join them.

Bit operations are products of both, so neither front alone knows what fits. Of all pairs of a point
of one and a point of the other, the one of least Ω that is within every budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.milp import Budget

__all__ = ["Options", "best_pair"]

_CHUNK = 256


@dataclass(frozen=True, slots=True, eq=False)
class Options:
    """Choices of some rows of a space's tables.

    Attributes:
        rows: Which rows, shape (R,).
        columns: The column of each row in each choice, shape (F, R).
        sensitivity: Ω of each choice, shape (F,).
    """

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    sensitivity: NDArray[np.float64]

    @staticmethod
    def none() -> "Options":
        """Return the one choice of no rows."""
        return Options(np.zeros(0, np.int64), np.zeros((1, 0), np.int64), np.zeros(1))


def best_pair(first: Options, second: Options, budgets: Sequence[Budget]) -> tuple[int, int] | None:
    """Find the two choices of least Ω together within all budgets.

    Args:
        first: Choices of some rows of the costs' tables.
        second: Choices of all others.
        budgets: What limits both.

    Returns:
        Indices of the choices; None if no pair is within the budgets.
    """
    halves = (first, second)
    place = {row: (h, i) for h, half in enumerate(halves) for i, row in enumerate(half.rows)}
    best: tuple[float, int, int] | None = None
    for start in range(0, len(first.columns), _CHUNK):
        columns = (first.columns[start : start + _CHUNK], second.columns)
        fits = np.ones((len(columns[0]), len(columns[1])), np.bool_)
        for budget in budgets:
            sums = [
                _sums(step, first.rows, columns[0])[:, None] + _sums(step, second.rows, columns[1])
                for step in budget.cost.steps
            ]
            total = np.maximum.reduce(sums)
            for pair in budget.cost.pairs:
                at = []
                for row in (pair.first, pair.second):
                    half, i = place[row]
                    chosen = columns[half][:, i]
                    at.append(chosen if half else chosen[:, None])
                total = total + pair.table[at[0], at[1]]
            fits &= total <= budget.limit
        omega = first.sensitivity[start : start + _CHUNK, None] + second.sensitivity
        omega = np.where(fits, omega, np.inf)
        least = int(omega.argmin())
        found = float(omega.flat[least])
        if np.isfinite(found) and (best is None or found < best[0]):
            i, j = divmod(least, len(second.columns))
            best = (found, start + i, j)
    return None if best is None else best[1:]


def _sums(
    step: NDArray[np.int64], rows: NDArray[np.int64], columns: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Sum a table over some rows, for each of several choices of columns, shape (F,)."""
    sums: NDArray[np.int64] = step[rows, columns].sum(1)
    return sums
