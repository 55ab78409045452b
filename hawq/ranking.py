"""Which rows are the most sensitive: the order in which channels receive their bits.

CW-HAWQ (Qian et al., 2020) orders channels by their average Hessian trace. That order depends on
how a network happens to be written: W₁ → αW₁, W₂ → W₂/α leaves a ReLU network as it is, and
multiplies the trace of the first layer by α⁻². What Ω falls by does not change, so it is the
default.
"""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.front import Rows, merge_ties
from hawq.space import Space

__all__ = ["RankingKey", "ranking"]

RankingKey = Literal["omega_gain", "trace"]


def ranking(
    space: Space,
    key: RankingKey = "omega_gain",
    *,
    traces: NDArray[np.float64],
    sensitivity: NDArray[np.float64],
) -> NDArray[np.int64]:
    """Order the rows of a space, the most sensitive first; equal ones as they stand.

    Args:
        space: The groups; tied ones are one row.
        key: ``omega_gain`` is what Ω falls by for each bit spent, between the least and the most
            width of the row: (Ω(b₀) − Ω(b₁)) / (n·(b₁ − b₀)) for n elements. A row of one width
            gains nothing and comes after all others. ``trace`` is the average trace, Tr/n (Qian et
            al., 2020), of every row.
        traces: Hessian traces, shape (L,).
        sensitivity: Ω of group l at width b, shape (L, B); infinite where it is barred.

    Returns:
        Indices of ``space.rows()``, shape (R,).

    Raises:
        ValueError: If there is no such key, or a shape or a value is wrong.
    """
    if key not in get_args(RankingKey):
        raise ValueError(f"key must be one of {', '.join(get_args(RankingKey))}, got {key!r}")
    if traces.shape != (len(space),) or not np.isfinite(traces).all():
        raise ValueError(f"traces must be {len(space)} finite numbers, got shape {traces.shape}")
    rows = merge_ties(space, sensitivity, np.zeros(sensitivity.shape, np.int64))
    elements = np.array([group.num_elements for group in space.groups])
    num_elements = np.array([elements[list(members)].sum() for members in rows.members])
    if key == "trace":
        total = np.array([traces[list(members)].sum() for members in rows.members])
        return np.argsort(-total / num_elements, kind="stable")
    return np.argsort(-_omega_gain(space, rows) / num_elements, kind="stable")


def _omega_gain(space: Space, rows: Rows) -> NDArray[np.float64]:
    """Return what Ω falls by for each bit of width, shape (R,); −∞ of a row of one width."""
    allowed = np.isfinite(rows.sensitivity)
    least = allowed.argmax(1)
    most = allowed.shape[1] - 1 - allowed[:, ::-1].argmax(1)
    every = np.arange(len(rows.members))
    fall = rows.sensitivity[every, least] - rows.sensitivity[every, most]
    widths = np.array(space.widths)
    span = widths[most] - widths[least]
    return np.where(span > 0, fall / np.maximum(span, 1), -np.inf)
