"""Fronts that are meant to be worse: what Ω and its traces are worth, measured against them.

HAWQ-V2 (Dong et al., 2020, table 3) fine-tunes an allocation of large Ω beside the one of small Ω
at the same size, and one that goes by ‖Q(W) − W‖² alone, without the Hessian.
"""

import numpy as np
from numpy.typing import NDArray

from hawq.allocate import Front, pareto_front
from search.tables import Part

__all__ = ["largest_omega_front", "norm_front"]


def largest_omega_front(part: Part, cost: NDArray[np.int64]) -> Front:
    """Find the allocations that none of at least their cost exceeds in Ω: the worst for their size.

    They are the exact front of the problem turned around, of the least Ω* − Ω within the least
    C* − cost, with Ω* and C* the largest that there are. The largest of them that fits a budget is
    as near to it as any.

    Args:
        part: The tables.
        cost: Shape (R, C).

    Returns:
        The front, cheapest first, of falling Ω. Groups whose Ω is zero at every width have their
        most bits throughout: a budget without room for them is below its first point.
    """
    allowed = part.space.allowed()
    most = np.where(allowed, part.sensitivity, -np.inf).max(1, keepdims=True)
    dearest = np.where(allowed, cost, 0).max(1, keepdims=True)
    turned = pareto_front(
        part.space,
        most - np.where(allowed, part.sensitivity, -np.inf),
        np.where(allowed, dearest - cost, 0),
    )
    choice, rows = turned.choice[::-1], np.arange(len(part.space))
    return Front(
        part.space, cost[rows, choice].sum(1), part.sensitivity[rows, choice].sum(1), choice
    )


def norm_front(part: Part, cost: NDArray[np.int64]) -> Front:
    """Find the exact front of Σ ‖Q(W) − W‖², or of activations their mean over examples.

    Args:
        part: The tables.
        cost: Shape (R, C).
    """
    return pareto_front(part.space, part.squared_errors, cost)
