"""Sensitivity tables: what each group's quantization costs the loss, at each width.

Ω_g(b) = t̄_g · ‖Q_b(W_g) − W_g‖², with t̄_g = Tr(H_g) / n_g the average Hessian trace (Dong et al.,
2020, equation 10). The second-order loss increase is Ω/2; constants do not move the optimum.
"""

import numpy as np
from numpy.typing import NDArray

from hawq.space import Space

__all__ = ["omega"]


def omega(
    space: Space, traces: NDArray[np.float64], squared_errors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute the table Ω, shape (L, B); widths off a group's menu are infinite.

    Args:
        space: Its groups are the rows, its widths the columns.
        traces: Hessian trace of each group, shape (L,). A negative one counts as zero: away from
            a minimum the model promises a gain that no allocation should be paid for.
        squared_errors: ‖Q_b(W) − W‖², shape (L, B).

    Raises:
        ValueError: If a shape is wrong or a value is not finite, naming the first such group.
    """
    expected = (len(space), len(space.widths))
    if traces.shape != expected[:1] or squared_errors.shape != expected:
        raise ValueError(
            f"traces and squared_errors must have shapes {expected[:1]} and {expected}, "
            f"got {traces.shape} and {squared_errors.shape}"
        )
    finite = np.isfinite(traces) & np.isfinite(squared_errors).all(1)
    if not finite.all():
        name = space.names[int(np.argmin(finite))]
        raise ValueError(
            f"traces and squared errors must be finite, got a NaN or infinity in {name}"
        )
    sizes = np.array([group.num_elements for group in space.groups])
    average = np.maximum(traces, 0) / sizes
    table: NDArray[np.float64] = average[:, None] * squared_errors
    return np.where(space.allowed(), table, np.inf)
