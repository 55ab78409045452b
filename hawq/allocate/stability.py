"""How far the errors of the traces move an allocation.

The traces are drawn again within their standard errors, Ω is built from them, and the allocation is
solved again: what share of the bits stays, and how much of Ω is lost by having believed a draw.

The draws are independent over groups. The errors over the choice of examples are not: an example
that a network is unsure of has more curvature in every layer, so the errors of layers are
positively correlated, and what all traces have in common moves no allocation. Independent draws
therefore overstate how far it moves.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hawq.allocation import Allocation
from hawq.sensitivity import omega
from hawq.space import Space

__all__ = ["Solve", "Stability", "stability"]

# From Ω, shape (L, B), and the traces that it was built from, shape (L,).
Solve = Callable[[NDArray[np.float64], NDArray[np.float64]], Allocation]


@dataclass(frozen=True, slots=True, eq=False)
class Stability:
    """What became of an allocation over K draws of the traces.

    Attributes:
        chosen: The allocation for the traces as estimated.
        kept: Share of the groups whose bits stay as chosen, in [0, 1], the mean over the draws.
        kept_error: Its standard error over the draws.
        least: Fewest bits that each group got in a draw, shape (L,).
        median: Their median, one that a draw gave, shape (L,).
        most: The most bits, shape (L,).
        regret: Ω of a draw's allocation over that of the chosen one, minus 1, both with the traces
            as estimated; the mean over the draws. Never negative where the chosen one has the least
            Ω. None where its Ω is zero, to which nothing can be compared.
        regret_error: Its standard error over the draws.
        regret_95: The 95 % quantile over the draws.
    """

    chosen: Allocation
    kept: float
    kept_error: float
    least: NDArray[np.int64]
    median: NDArray[np.int64]
    most: NDArray[np.int64]
    regret: float | None
    regret_error: float | None
    regret_95: float | None


def stability(
    space: Space,
    traces: NDArray[np.float64],
    trace_errors: NDArray[np.float64],
    squared_errors: NDArray[np.float64],
    solve: Solve,
    *,
    draws: int = 100,
    seed: int = 0,
) -> Stability:
    """Draw the traces again, independently and normally, and solve again.

    Args:
        space: What may be chosen.
        traces: Hessian traces, shape (L,); a negative one, estimated or drawn, counts as zero.
        trace_errors: Their standard errors, shape (L,).
        squared_errors: ‖Q_b(W) − W‖², shape (L, B).
        solve: Chooses within a fixed budget.
        draws: How often, K, at least 2.
        seed: Of the draws.

    Raises:
        ValueError: If there are fewer than two draws, a shape is wrong, or an error is negative or
            not finite.
    """
    if draws < 2:
        raise ValueError(f"draws must be at least 2, got {draws}")
    if trace_errors.shape != traces.shape:
        raise ValueError(
            f"trace_errors must have shape {traces.shape}, got shape {trace_errors.shape}"
        )
    odd = ~(np.isfinite(trace_errors) & (trace_errors >= 0))
    if odd.any():
        raise ValueError(f"trace_errors must be finite and at least 0, got {trace_errors[odd][0]}")
    table = omega(space, traces, squared_errors)
    rows = np.arange(len(space))

    def cost_to_the_loss(allocation: Allocation) -> float:
        return float(table[rows, allocation.choice(space)].sum())

    chosen = solve(table, traces)
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(draws):
        drawn = traces + trace_errors * generator.standard_normal(len(traces))
        found.append(solve(omega(space, drawn, squared_errors), drawn))
    bits = np.array([allocation.bits for allocation in found])
    kept = (bits == np.array(chosen.bits)).mean(1)
    reference = cost_to_the_loss(chosen)
    regrets = None
    if reference > 0:
        regrets = np.array([cost_to_the_loss(allocation) for allocation in found]) / reference - 1
    return Stability(
        chosen,
        float(kept.mean()),
        _standard_error(kept),
        bits.min(0),
        np.quantile(bits, 0.5, axis=0, method="inverted_cdf"),
        bits.max(0),
        None if regrets is None else float(regrets.mean()),
        None if regrets is None else _standard_error(regrets),
        None if regrets is None else float(np.quantile(regrets, 0.95)),
    )


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5)
