"""Traces with their errors, from partial sums that any worker may have computed.

Work is cut into units: one batch of examples and a few probes. A unit's sums depend on the unit
alone, and units are added in the order of their indices, so the estimate has the same bits
whoever computed them. With S_jk the trace of batch j's *summed* loss under probe k,

    Tr = (1/N) Σ_j mean_k S_jk,

its probe error comes from the spread of S_jk over k, and its data error from the spread of the
batches' means, less what the probes put into it.

An exact estimator has no probes. Its units hold the examples' own traces t_n with their weights
w_n (1 unless the examples were drawn by importance), Tr = (1/N) Σ_n w_n t_n without probe error,
and the data error is that of a mean of N numbers. Where the N were drawn from a pool, the pool's
own choice is added: its mean varies with Var(t), for which (1/N) Σ_n w_n t_n² − Tr² stands.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["NonFiniteTraceError", "TraceEstimate", "UnitSums", "summarize"]


class NonFiniteTraceError(ValueError):
    """A trace came out as NaN or infinity; the message names the first such group."""


@dataclass(frozen=True, slots=True)
class UnitSums:
    """What one unit of work found.

    Attributes:
        batch: Which batch of examples.
        num_examples: Examples in it.
        num_probes: Probes drawn on it; 0 for an exact estimator.
        total: Σ_k S_jk of each group, shape (G,); Σ_n w_n t_n where exact.
        square: Σ_k S_jk², shape (G,); Σ_n (w_n t_n)² where exact.
        moment: Σ_n w_n t_n², shape (G,), where exact; else zeros.
    """

    batch: int
    num_examples: int
    num_probes: int
    total: NDArray[np.float64]
    square: NDArray[np.float64]
    moment: NDArray[np.float64]

    @staticmethod
    def of(batch: int, num_examples: int, samples: NDArray[np.float64]) -> "UnitSums":
        """Sum samples, shape (K, G)."""
        total = samples.sum(0)
        square = np.square(samples).sum(0)
        return UnitSums(batch, num_examples, len(samples), total, square, np.zeros_like(total))

    @staticmethod
    def exact(
        batch: int, examples: NDArray[np.float64], weights: NDArray[np.float64]
    ) -> "UnitSums":
        """Sum the traces of single examples, shape (N, G), with weights, shape (N,)."""
        weighted = weights[:, None] * examples
        return UnitSums(
            batch,
            len(examples),
            0,
            weighted.sum(0),
            np.square(weighted).sum(0),
            (weighted * examples).sum(0),
        )


@dataclass(frozen=True, slots=True)
class TraceEstimate:
    """Hessian traces of the mean loss, with both of their errors.

    Attributes:
        trace: Traces, shape (G,), in loss per squared weight.
        probe_error: Standard error over the random probes, for these examples; same unit.
        data_error: Standard error over the choice of examples; same unit.
        num_probes: Probes on every example; 0 for an exact estimator.
        num_examples: Examples.
    """

    trace: NDArray[np.float64]
    probe_error: NDArray[np.float64]
    data_error: NDArray[np.float64]
    num_probes: int
    num_examples: int

    def converged(self, rtol: float, atol: float = 0.0) -> NDArray[np.bool_]:
        """Which groups' probe error is at most rtol·|trace| + atol·Σ|trace|, shape (G,)."""
        size = np.abs(self.trace)
        allowed: NDArray[np.bool_] = self.probe_error <= rtol * size + atol * size.sum()
        return allowed


def summarize(
    units: Sequence[UnitSums], names: Sequence[str], pool_variance: float = 0.0
) -> TraceEstimate:
    """Add units up, in the order given.

    Args:
        units: At least two batches, each with at least two probes and all with equally many; or
            exact ones.
        names: The groups' names, for errors.
        pool_variance: Of exact units drawn from a pool: variance of the pool's mean as a multiple
            of the examples' variance, 1/M − 1/P for M of P examples.

    Raises:
        ValueError: If there are too few batches or probes.
        NonFiniteTraceError: If a sum is NaN or infinite.
    """
    batches = sorted({unit.batch for unit in units})
    shape = (len(batches), len(names))
    row = {batch: i for i, batch in enumerate(batches)}
    examples, probes = np.zeros(len(batches)), np.zeros(len(batches), np.int64)
    total, square, moment = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for unit in units:
        i = row[unit.batch]
        examples[i] = unit.num_examples
        probes[i] += unit.num_probes
        total[i] += unit.total
        square[i] += unit.square
        moment[i] += unit.moment
    finite = np.isfinite(total).all(0) & np.isfinite(square).all(0)
    if not finite.all():
        raise NonFiniteTraceError(
            f"the trace of {names[int(np.argmin(finite))]} must be finite, got NaN or infinity: "
            "the loss or its derivatives overflow on these examples"
        )
    if not probes.any():
        sums = total.sum(0), square.sum(0), moment.sum(0)
        return _summarize_exact(int(examples.sum()), *sums, pool_variance)
    if len(batches) < 2 or probes.min() < 2 or len(set(probes.tolist())) > 1:
        raise ValueError(
            "an estimate needs at least 2 batches with at least 2 probes each, as many on each, "
            f"got {len(batches)} batches with {sorted(set(probes.tolist()))} probes"
        )
    count, num_batches = int(probes[0]), len(batches)
    mean = total / count
    share = examples / examples.sum()
    trace = mean.sum(0) / examples.sum()
    # Sample variance over probes of each batch's sum, at least 0 against rounding.
    spread = np.maximum(square - count * mean**2, 0) / (count - 1)
    probe_variance = (spread / count).sum(0) / examples.sum() ** 2
    residual = share[:, None] * (mean / examples[:, None] - trace)
    both = num_batches / (num_batches - 1) * np.square(residual).sum(0)
    data_variance = np.maximum(both - probe_variance, 0)
    return TraceEstimate(
        trace, np.sqrt(probe_variance), np.sqrt(data_variance), count, int(examples.sum())
    )


def _summarize_exact(
    num_examples: int,
    total: NDArray[np.float64],
    square: NDArray[np.float64],
    moment: NDArray[np.float64],
    pool_variance: float,
) -> TraceEstimate:
    mean = total / num_examples
    drawn = np.maximum(square - num_examples * mean**2, 0) / (num_examples - 1) / num_examples
    pool = pool_variance * np.maximum(moment / num_examples - mean**2, 0)
    return TraceEstimate(mean, np.zeros_like(mean), np.sqrt(drawn + pool), 0, num_examples)
