"""Traces with their errors, from partial sums that any worker may have computed.

Work is cut into units: one batch of examples and a few probes. A unit's sums depend on the unit
alone, and units are added in the order of their indices, so the estimate has the same bits
whoever computed them. With S_jk the trace of batch j's *summed* loss under probe k,

    Tr = (1/N) Σ_j mean_k S_jk,

and its probe error comes from the spread of S_jk over k. Examples may have weights w_n, where they
were drawn from a pool of M with unequal probabilities π_n (w_n = N / (M π_n)).

The error over the choice of examples has two parts. The draw from the pool: with c_n = 1 − π_n,
v_n = w_n t_n and v̄ their mean under c, its variance is Σ c_n (v_n − v̄)² / (N (N − 1)) (Hájek,
1964; c = 1 is the usual one). The pool's own choice from a population of P: (1/M − 1/P)·Var(t),
for which (1/N) Σ w_n t_n² − Tr² stands. Where an estimator does not see examples one by one, the
spread of the batches stands for the draw, less what the probes put into it.

An allocation depends on the groups' shares of the total alone: their errors are those of a ratio,
which are smaller, since an example with a large trace has one in every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["NonFiniteTraceError", "Population", "TraceEstimate", "UnitSums", "summarize"]

Values = NDArray[np.float64]

# Rows of a unit's sums. Over its probes: Σ S, then Σ (S − S̄)² and Σ (S − S̄)(S_all − S̄_all), taken
# example by example where they are seen; over its examples: Σ c v, Σ c v², Σ c v·v_all, Σ w t²,
# Σ w t·t_all; last what a batch adds without probes, once. "All" is the sum over the sites.
_TOTAL, _SPREAD, _CROSS, _DRAWN, _DRAWN_SQUARE, _DRAWN_CROSS = range(6)
_MOMENT, _MOMENT_CROSS, _KNOWN = range(6, 9)
_ROWS = 9


class NonFiniteTraceError(ValueError):
    """A trace came out as NaN or infinity; the message names the first such group."""


@dataclass(frozen=True, slots=True)
class Population:
    """Where the examples come from.

    Attributes:
        pool: Examples M that they were drawn from.
        size: Examples P that the pool was drawn from; None for infinitely many.
        spread: Variance of an example's curvature in the pool, relative to its squared mean; stands
            for that of the traces where an estimator does not see examples one by one.
    """

    pool: int
    size: int | None = None
    spread: float = 0.0

    @property
    def choice(self) -> float:
        """Variance of the pool's mean, as a multiple of an example's."""
        return 1 / self.pool - (0.0 if self.size is None else 1 / self.size)


@dataclass(frozen=True, slots=True)
class UnitSums:
    """What one unit of work found.

    Attributes:
        batch: Which batch of examples.
        num_examples: Examples in it.
        num_probes: Probes drawn on it; 0 for an exact estimator.
        sums: Shape (9, G + 1): the rows above, the last column for all sites together.
        drawn: Σ c over the examples; NaN where they were not seen one by one.
    """

    batch: int
    num_examples: int
    num_probes: int
    sums: Values
    drawn: float

    @property
    def total(self) -> Values:
        """Σ_k S_jk of each group, shape (G,)."""
        total: Values = self.sums[_TOTAL, :-1]
        return total

    @staticmethod
    def of(
        batch: int,
        num_examples: int,
        samples: Values,
        num_sites: int,
        known: Values | None = None,
    ) -> "UnitSums":
        """Sum samples of a batch, shape (K, G), whose first groups are the sites.

        ``known``, shape (G,), is added to them without an error.
        """
        sums = np.zeros((_ROWS, samples.shape[1] + 1))
        if known is not None:
            sums[_KNOWN] = _with_all(known, num_sites)
        s = _with_all(samples, num_sites)
        off = s - s.mean(0)
        sums[_TOTAL], sums[_SPREAD] = s.sum(0), np.square(off).sum(0)
        sums[_CROSS] = (off * off[:, -1:]).sum(0)
        return UnitSums(batch, num_examples, len(samples), sums, float("nan"))

    @staticmethod
    def of_examples(
        batch: int,
        traces: Values,
        num_sites: int,
        *,
        weights: Values,
        excluded: Values,
        num_probes: int,
    ) -> "UnitSums":
        """Sum examples' traces.

        Args:
            batch: Which batch.
            traces: Shape (K, N, G); one probe where there are none.
            num_sites: The first groups are the sites.
            weights: w, shape (N,).
            excluded: c = 1 − π, shape (N,).
            num_probes: K, or 0 where the traces are exact.
        """
        t = _with_all(traces, num_sites)
        mean = t.mean(0)
        v = weights[:, None] * mean
        off = weights[:, None] * (t - mean)
        # A square of a mean over probes is too large by the mean's own variance, known from them.
        scale = len(t) * max(len(t) - 1, 1)
        noise = np.square(t - mean).sum(0) / scale
        noise_cross = ((t - mean) * (t - mean)[..., -1:]).sum(0) / scale
        w, c = weights[:, None], excluded[:, None]
        sums = np.stack(
            [
                len(t) * v.sum(0),
                np.square(off).sum((0, 1)),
                (off * off[..., -1:]).sum((0, 1)),
                (c * v).sum(0),
                (c * w**2 * (mean**2 - noise)).sum(0),
                (c * w**2 * (mean * mean[:, -1:] - noise_cross)).sum(0),
                (w * (mean**2 - noise)).sum(0),
                (w * (mean * mean[:, -1:] - noise_cross)).sum(0),
                np.zeros(t.shape[2]),
            ]
        )
        return UnitSums(batch, t.shape[1], num_probes, sums, float(excluded.sum()))


def _with_all(values: Values, num_sites: int) -> Values:
    """Append the sum over the sites as a last group."""
    everything: Values = values[..., :num_sites].sum(-1, keepdims=True)
    return np.concatenate([values, everything], -1)


@dataclass(frozen=True, slots=True)
class TraceEstimate:
    """Hessian traces of the mean loss, with both of their errors.

    Attributes:
        trace: Traces, shape (G,), in loss per squared weight (or activation).
        probe_error: Standard error over the random probes, for these examples; same unit.
        data_error: Standard error over the choice of examples; same unit.
        num_probes: Probes on every example; 0 for an exact estimator.
        num_examples: Examples.
        share_probe_error: Standard error of each share of the total, trace / Σ trace, over probes.
        share_data_error: The same over the choice of examples.
    """

    trace: Values
    probe_error: Values
    data_error: Values
    num_probes: int
    num_examples: int
    share_probe_error: Values
    share_data_error: Values

    @property
    def error(self) -> Values:
        """Standard error over probes and examples together, shape (G,)."""
        both: Values = np.hypot(self.probe_error, self.data_error)
        return both

    @property
    def share_error(self) -> Values:
        """Standard error of the shares, over probes and examples together, shape (G,)."""
        both: Values = np.hypot(self.share_probe_error, self.share_data_error)
        return both

    def converged(self, rtol: float, atol: float = 0.0) -> NDArray[np.bool_]:
        """Which groups' probe error is at most rtol·|trace| + atol·Σ|trace|, shape (G,)."""
        size = np.abs(self.trace)
        allowed: NDArray[np.bool_] = self.probe_error <= rtol * size + atol * size.sum()
        return allowed

    def ordered(self, averages: Values) -> bool:
        """Whether the probes leave no doubt, at 95 %, about the order of the average traces.

        Args:
            averages: Divisors of the traces, shape (G,): elements of each group.
        """
        order = np.argsort(self.trace / averages)
        mean, error = (values[order] / averages[order] for values in (self.trace, self.probe_error))
        doubt = 1.645 * np.hypot(error[1:], error[:-1])  # one-sided: which of two is larger
        return bool((np.diff(mean) >= doubt).all())


def summarize(
    units: Sequence[UnitSums], names: Sequence[str], population: Population | None = None
) -> TraceEstimate:
    """Add units up, in the order given.

    Args:
        units: At least two batches, each with at least two probes and all with equally many; or
            exact ones.
        names: The groups' names, for errors.
        population: Where the examples come from; None for no choice but theirs, from infinitely
            many.

    Raises:
        ValueError: If there are too few batches or probes.
        NonFiniteTraceError: If a sum is NaN or infinite.
    """
    batches = _stacked(units)
    # Of the rows that are a group's own: a product with all sites would blame every group.
    own = np.delete(batches.sums, (_CROSS, _DRAWN_CROSS, _MOMENT_CROSS), 1)
    finite = np.isfinite(own).all((0, 1))
    if not finite.all():
        raise NonFiniteTraceError(
            f"the trace of {[*names, 'all sites'][int(np.argmin(finite))]} must be finite, got NaN "
            "or infinity: the loss or its derivatives overflow on these examples"
        )
    trace = batches.mean.sum(0) / batches.num
    probe, probe_cross = _over_probes(units, batches)
    where = population or Population(batches.num)
    if batches.drawn is None:
        data, data_cross = _over_batches(batches, trace, where)
        data, data_cross = data - probe, data_cross - probe_cross
    else:
        data, data_cross = _over_examples(batches, batches.drawn, trace, where)
    return TraceEstimate(
        trace[:-1],
        _root(probe)[:-1],
        _root(data)[:-1],
        batches.count,
        batches.num,
        _ratio_error(trace, probe, probe_cross),
        _ratio_error(trace, data, data_cross),
    )


@dataclass(frozen=True, slots=True)
class _Batches:
    """Units added up batch by batch.

    Attributes:
        row: Batch to row.
        examples: Of each batch, shape (J, 1).
        sums: Shape (J, 9, G + 1).
        mean: mean_k S_jk, shape (J, G + 1).
        count: Probes on each batch; 0 for an exact estimator.
        visits: Units of each batch.
        drawn: Σ c of all examples; None where they were not seen one by one.
    """

    row: dict[int, int]
    examples: Values
    sums: Values
    mean: Values
    count: int
    visits: int
    drawn: float | None

    @property
    def num(self) -> int:
        return int(self.examples.sum())


def _stacked(units: Sequence[UnitSums]) -> _Batches:
    row = {batch: i for i, batch in enumerate(sorted({unit.batch for unit in units}))}
    examples, drawn = np.zeros((len(row), 1)), np.zeros(len(row))
    probes, visits = np.zeros(len(row), np.int64), np.zeros(len(row), np.int64)
    sums = np.zeros((len(row), *units[0].sums.shape))
    for unit in units:
        i = row[unit.batch]
        examples[i], drawn[i] = unit.num_examples, unit.drawn
        probes[i] += unit.num_probes
        visits[i] += 1
        sums[i] += unit.sums
    seen, count = not np.isnan(drawn).any(), int(probes[0])
    even = len(set(probes.tolist())) == 1 and len(set(visits.tolist())) == 1
    if not even or count == 1 or (not seen and (count < 2 or len(row) < 2)):
        raise ValueError(
            "an estimate needs at least 2 batches with at least 2 probes each, as many on each, "
            f"got {len(row)} batches with {sorted(set(probes.tolist()))} probes"
        )
    mean = sums[:, _TOTAL] / (count or visits[0]) + sums[:, _KNOWN]
    return _Batches(
        row, examples, sums, mean, count, int(visits[0]), float(drawn.sum()) if seen else None
    )


def _over_probes(units: Sequence[UnitSums], batches: _Batches) -> tuple[Values, Values]:
    """Variance over the probes, and covariance with the sum of all sites, shape (G + 1,) each."""
    spread, cross = batches.sums[:, _SPREAD].sum(0), batches.sums[:, _CROSS].sum(0)
    if not batches.count:
        return np.zeros_like(spread), np.zeros_like(cross)
    freedom = batches.count - batches.visits
    if batches.drawn is None:  # the means of the visits vary as their probes do, too
        sampled = batches.mean - batches.sums[:, _KNOWN]
        off = np.stack(
            [u.sums[_TOTAL] / u.num_probes - sampled[batches.row[u.batch]] for u in units]
        )
        size = np.array([[unit.num_probes] for unit in units])
        spread = spread + (size * off**2).sum(0)
        cross = cross + (size * off * off[:, -1:]).sum(0)
        freedom = batches.count - 1
    scale = freedom * batches.count * batches.num**2
    return spread / scale, cross / scale


def _over_batches(batches: _Batches, trace: Values, where: Population) -> tuple[Values, Values]:
    """Variance over the choice of examples, from the spread of the batches."""
    num = batches.num
    residual = batches.mean / num - batches.examples / num * trace
    everyone = where.pool == num
    scale = len(batches.row) / (len(batches.row) - 1) * (num * where.choice if everyone else 1.0)
    pool = 0.0 if everyone else where.choice * where.spread
    return (
        scale * np.square(residual).sum(0) + pool * trace**2,
        scale * (residual * residual[:, -1:]).sum(0) + pool * trace * trace[-1],
    )


def _over_examples(
    batches: _Batches, drawn: float, trace: Values, where: Population
) -> tuple[Values, Values]:
    """Variance over the choice of examples, from the examples: the draw's and the pool's."""
    sums, num = batches.sums.sum(0) / batches.visits, batches.num
    pool = where.choice * num / (num - 1)
    data = pool * (sums[_MOMENT] / num - trace**2)
    cross = pool * (sums[_MOMENT_CROSS] / num - trace * trace[-1])
    if drawn:
        scale = num * (num - 1)
        data += (sums[_DRAWN_SQUARE] - sums[_DRAWN] ** 2 / drawn) / scale
        cross += (sums[_DRAWN_CROSS] - sums[_DRAWN] * sums[_DRAWN, -1] / drawn) / scale
    return data, cross


def _root(variance: Values) -> Values:
    root: Values = np.sqrt(np.maximum(variance, 0))
    return root


def _ratio_error(trace: Values, variance: Values, cross: Values) -> Values:
    """Standard error of trace / Σ trace, by its first-order expansion."""
    everything = trace[-1]
    if everything == 0:
        return np.zeros_like(trace[:-1])
    share = trace / everything
    expanded = variance - 2 * share * cross + share**2 * variance[-1]
    error: Values = _root(expanded) / abs(everything)
    return error[:-1]
