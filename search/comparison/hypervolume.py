"""How much a set of sizes and scores dominates."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["covered_share", "hypervolume"]


def hypervolume(points: NDArray[np.float64], reference: tuple[float, float]) -> float:
    """Return the area of what some point dominates, up to a reference (Zitzler & Thiele, 1998).

    Args:
        points: Size to be small and score to be large, shape (F, 2).
        reference: Size and score; a point that is not better in both adds nothing.
    """
    size, score = reference
    area, reached = 0.0, score
    order = np.lexsort((-points[:, 1], points[:, 0]))
    for x, y in points[order].tolist():
        if x < size and y > reached:
            area += (size - x) * (y - reached)
            reached = y
    return area


def covered_share(
    points: NDArray[np.float64], *, ideal: tuple[float, float], reference: tuple[float, float]
) -> float:
    """Return the hypervolume as a share of the rectangle from an ideal point to a reference.

    Raises:
        ValueError: If the ideal is not smaller and better than the reference.
    """
    width, height = reference[0] - ideal[0], ideal[1] - reference[1]
    if width <= 0 or height <= 0:
        raise ValueError(f"ideal must be better than the reference in both, got {ideal}")
    inside = np.column_stack(
        [np.maximum(points[:, 0], ideal[0]), np.minimum(points[:, 1], ideal[1])]
    )
    return hypervolume(inside, reference) / (width * height)
