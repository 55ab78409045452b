"""How a search goes: its best score by evaluations and by price, over several seeds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Band", "band", "best_at", "best_so_far", "evaluations_to_reach"]

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Median and quartiles over seeds, each of shape (T,)."""

    median: Vector
    low: Vector
    high: Vector


def best_so_far(scores: Sequence[float], length: int) -> Vector:
    """Return the best score after each evaluation, shape (length,).

    A search that ended early keeps its best.

    Args:
        scores: In the order of scoring, at least one.
        length: Evaluations of the whole budget.

    Raises:
        ValueError: If there are no scores, or more than ``length``.
    """
    if not 1 <= len(scores) <= length:
        raise ValueError(f"scores must number 1 to {length}, got {len(scores)}")
    best = np.maximum.accumulate(np.asarray(scores, np.float64))
    return np.pad(best, (0, length - len(scores)), mode="edge")


def best_at(costs: Sequence[float], scores: Sequence[float], grid: Vector) -> Vector:
    """Return the best score that each cost of a grid buys, shape (T,).

    Args:
        costs: Spent when each score was there, never falling.
        scores: Of the same, in the order of scoring.
        grid: Costs, shape (T,), none below the first score's.

    Raises:
        ValueError: If the lengths differ, costs fall, or the grid begins before the first score.
    """
    if len(costs) != len(scores) or np.any(np.diff(costs) < 0):
        raise ValueError(
            f"costs must be one a score and never fall, got {len(costs)} for {len(scores)}"
        )
    if len(costs) == 0 or grid.min() < costs[0]:
        raise ValueError(f"grid must begin at the first score or later, got {grid.min():g}")
    bought = np.searchsorted(np.asarray(costs, np.float64), grid, side="right") - 1
    best: Vector = best_so_far(scores, len(scores))[bought]
    return best


def band(curves: NDArray[np.float64]) -> Band:
    """Summarize curves of several seeds, shape (S, T)."""
    low, median, high = np.quantile(curves, [0.25, 0.5, 0.75], axis=0)
    return Band(median, low, high)


def evaluations_to_reach(searches: Sequence[Sequence[float]], target: float) -> float | None:
    """Return how many evaluations a method needs until its best reaches a score.

    Args:
        searches: The scores of each seed, in the order of scoring.
        target: To be reached or passed.

    Returns:
        The median over seeds; None if half of the searches or more never reach it.
    """
    needed = [
        next((i for i, score in enumerate(scores, 1) if score >= target), np.inf)
        for scores in searches
    ]
    middle = np.sort(needed)[(len(needed) - 1) // 2 : len(needed) // 2 + 1]
    return None if np.isinf(middle).any() else float(middle.mean())
