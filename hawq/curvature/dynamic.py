"""Traces of weights that moved a little, from few probes on both networks.

A step of fine-tuning hardly changes what a probe gives. With the same probes k on the network
before and after, h and h′, and the estimate t of before,

    t′ = mean_k [h′_k − a·(h_k − t)]

is unbiased for any a that does not depend on probe k, and has the variance

    a²·Var t + Var(h′ − a·h) / K,  least at  a = Cov(h′, h) / (Var h + K·Var t)

(DeltaShift with a = 1 − γ; Dharangutte & Musco, 2021). a = 0 is an estimate from scratch. The
paper bounds these variances by norms, we take them from the probes, pooled over the batches of
examples: the coefficient of probe k from all probes but k, so that it cannot bias, and one for
each group. The error that is left carries over from estimate to estimate, shrunk by a each time.

It pays while the probes agree: Var(h′ − a·h) / Var h′ was 0.1 in the median layer of a trained
ResNet20 after 3 steps of SGD (its weights had moved by 0.08 %), for both kinds of probes, but 0.5
(Hutchinson) and 0.8 (Gauss–Newton) after 20 (0.8 %), and every probe costs two.

An estimator without probes has no error for given examples. Seen on M of its N examples alone,
drawn at random, batches take the place of probes: their spread counts with the share 1 − M/N.
Many small batches tell that spread better than few large ones, and better still where the examples
were drawn by importance: from uniformly drawn ones, most of whose traces are next to nothing, a
stated error is easily too small (two of them covered 76 to 93 %, simulated).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hawq.curvature.estimate import TraceEstimate, UnitSums, summarize
from hawq.curvature.plan import TracePlan
from hawq.curvature.reducer import estimate_traces
from hawq.curvature.units import run_unit
from hawq.task import Objective

__all__ = ["reestimate_traces", "shifted"]

Values = NDArray[np.float64]

# A coefficient from fewer degrees of freedom costs more than it saves, and hides it: with two of
# them, stated errors of two standard deviations covered 89 % (simulated), with six 93 to 95 %.
_MIN_FREEDOM = 6
# A ratio of few numbers can be anything. One beyond 2 would say that the curvature doubled.
_LARGEST = 2.0


def shifted(
    previous: TraceEstimate,
    before: Values,
    after: Values,
    *,
    num_sites: int | None = None,
    unseen: float = 1.0,
) -> TraceEstimate:
    """Move an estimate along with the weights.

    Args:
        previous: Of the weights before, from other probes than these.
        before: Parts of its traces, shape (J, K, G): batch j under repetition k, drawn anew for
            each; Σ_j mean_k is an estimate of the same traces.
        after: The same of the weights after, under the same probes.
        num_sites: The first groups are the sites, of whose sum shares are taken; None for all.
        unseen: Share of the spread over k that is an error: below 1 where the repetitions are
            parts of the examples that ``previous`` rests on.

    Returns:
        The traces after, with their probe errors; all else is that of ``previous``.

    Raises:
        ValueError: If the shapes differ, J·(K − 2) is below 6, or a value is no number.
    """
    if before.shape != after.shape:
        raise ValueError(
            f"before and after must have one shape, got {before.shape} and {after.shape}"
        )
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("before and after must be finite, got NaN or infinity")
    _check_freedom(*before.shape[:2])
    count = before.shape[1]
    a = _coefficients(before, after, previous.probe_error, unseen)
    trace = (after.sum(0) - a * (before.sum(0) - previous.trace)).mean(0)
    kept = np.sqrt(np.square(a).mean(0))
    left = _centred(after) - a * _centred(before)

    def error(residual: Values, carried: Values) -> Values:
        own = unseen * np.square(residual).sum((0, 1)) / (count * (count - 1))
        root: Values = np.sqrt(own + np.square(carried))
        return root

    total, old_total = (t[:num_sites].sum() for t in (trace, previous.trace))
    share_error = np.zeros_like(trace)
    if total != 0:
        common = left[..., :num_sites].sum(-1, keepdims=True)
        carried = kept * previous.share_probe_error * old_total / total
        share_error = error((left - trace / total * common) / total, carried)
    return replace(
        previous,
        trace=trace,
        probe_error=error(left, kept * previous.probe_error),
        share_probe_error=share_error,
    )


def _check_freedom(batches: int, repetitions: int) -> None:
    if batches * (repetitions - 2) < _MIN_FREEDOM:
        raise ValueError(
            f"batches × (repetitions − 2) must be at least {_MIN_FREEDOM}, "
            f"got {batches} and {repetitions}"
        )


def _coefficients(before: Values, after: Values, error: Values, unseen: float) -> Values:
    """Estimate each repetition's a from the others, shape (K, G)."""
    count = before.shape[1]
    found = np.zeros(before.shape[1:])
    if unseen == 0:
        return found
    for k in range(count):
        old, new = (_centred(np.delete(values, k, 1)) for values in (before, after))
        covariance, variance = (old * new).sum((0, 1)), np.square(old).sum((0, 1))
        allowed = variance + (count - 2) * count * np.square(error) / unseen
        np.divide(covariance, allowed, out=found[k], where=allowed > 0)
    return found.clip(0, _LARGEST)


def _centred(values: Values) -> Values:
    centred: Values = values - values.mean(1, keepdims=True)
    return centred


def reestimate_traces(
    task: Objective,
    before: nn.Module,
    after: nn.Module,
    plan: TracePlan,
    previous: TraceEstimate,
    num_probes: int = 0,
) -> TraceEstimate:
    """Estimate the traces of a network from those of one whose weights are close.

    Args:
        task: Builds the examples.
        before: The network that ``previous`` is of.
        after: The network whose traces are wanted.
        plan: The plan of ``previous``. Where it has probes, its next ones are drawn, which
            ``previous`` has not seen, on all examples. Where it has none, it may hold a part of
            the examples, drawn at random, in whole batches.
        previous: By ``estimate_traces`` or this function, with the plan's seed.
        num_probes: Probes on every example, in whole units, for each of the two networks; without
            meaning where the plan has none. Batches × (units − 2) must be at least 6; without
            probes, batches − 2.

    Returns:
        The traces after. ``num_probes`` counts all probes so far; the data errors changed as those
        of the two networks under the new probes.

    Raises:
        ValueError: If the plan cannot be that of ``previous``, or the probes are too few.
        NonFiniteTraceError: If a loss or a trace is NaN or infinite.
    """
    num, known, exact = len(plan.examples), previous.num_examples, not previous.num_probes
    whole = num == known or (exact and num < known and num % plan.batch_size == 0)
    if len(plan.names) != len(previous.trace) or not whole:
        raise ValueError(
            f"plan must be that of previous, with {len(previous.trace)} groups and {known} "
            "examples (without probes: or whole batches of them), "
            f"got {len(plan.names)} groups, {num} examples and batches of {plan.batch_size}"
        )
    if exact and num == known:
        return estimate_traces(task, after, plan)
    first = -(-previous.num_probes // plan.probes_per_unit)
    visits = range(1) if exact else range(first, first + num_probes // plan.probes_per_unit)
    _check_freedom(*((1, plan.num_batches) if exact else (plan.num_batches, len(visits))))
    indices = [v * plan.num_batches + j for v in visits for j in range(plan.num_batches)]
    units = [[run_unit(task, model, plan, i) for i in indices] for model in (before, after)]
    old, new = (summarize(own, plan.names, plan.population) for own in units)
    moved = shifted(
        previous,
        *(_parts(own, len(visits), plan) for own in units),
        num_sites=plan.num_sites,
        unseen=1 - num / known if exact else 1.0,
    )
    return replace(
        moved,
        num_probes=0 if exact else visits.stop * plan.probes_per_unit,
        data_error=_scaled(previous.data_error, old.data_error, new.data_error),
        share_data_error=_scaled(
            previous.share_data_error, old.share_data_error, new.share_data_error
        ),
    )


def _parts(units: Sequence[UnitSums], visits: int, plan: TracePlan) -> Values:
    """Arrange units as parts of the trace, shape (J, K, G)."""
    totals = np.stack([unit.total for unit in units])  # Σ over probes and examples
    if not units[0].num_probes:
        return totals[None] * plan.num_batches / len(plan.examples)
    parts: Values = totals.reshape(visits, plan.num_batches, -1).transpose(1, 0, 2)
    return parts / (plan.probes_per_unit * len(plan.examples))


def _scaled(error: Values, old: Values, new: Values) -> Values:
    """Change errors as those of fewer probes or examples did, at most by a factor of two."""
    ratio = np.divide(new, old, out=np.ones_like(new), where=old > 0)
    changed: Values = error * ratio.clip(1 / _LARGEST, _LARGEST)
    return changed
