"""A trace estimation on the cluster, from the config to the estimate."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hawq.curvature import (
    Granularity,
    Reducer,
    Subject,
    TraceEstimate,
    TracePlan,
    fitting_examples,
    plan_traces,
)
from hawq.space import evaluating
from hawq.task import Task, curved
from search.cluster import num_workers
from search.config import CurvatureConfig, WorkersConfig
from search.errors import InputError
from search.events import Measures
from search.probes import WorkerPool, estimate_on_workers
from search.unit_file import UnitFile

__all__ = ["Progress", "Traced", "trace_on_cluster"]


class Progress(Protocol):
    """Told how far something is: done, of how many, what, a remark, and measures."""

    def __call__(
        self,
        done: float,
        total: float,
        unit: str,
        message: str,
        measures: Measures | None = None,
        /,
    ) -> None: ...


_FEW = 4


@dataclass(frozen=True, slots=True)
class Traced:
    """A finished estimation.

    Attributes:
        plan: What was done.
        reason: Why with this estimator.
        estimate: What came out.
        workers: How many there were.
        cpu_seconds: Of all of them.
        seconds: From the start of the workers to the end.
    """

    plan: TracePlan
    reason: str
    estimate: TraceEstimate
    workers: int
    cpu_seconds: float
    seconds: float


def trace_on_cluster(
    task: Task,
    state: dict[str, Tensor],
    layers: Sequence[str],
    *,
    settings: CurvatureConfig,
    workers: WorkersConfig,
    seed: int,
    units: UnitFile,
    subject: Subject = "weights",
    granularity: Granularity = "layer",
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> Traced:
    """Estimate the traces of a network on Ray workers.

    Args:
        task: The network, its data and its loss.
        state: The weights.
        layers: Names of the layers whose weights, or inputs, are traced.
        settings: To what error, on how many examples.
        workers: How many, and how large.
        seed: Of the draw and of all probes.
        units: Where finished units are kept; those that are there are not done again.
        subject: Weights or activations.
        granularity: Whether each channel is traced, too.
        progress: Told how far it is.
        note: Told which estimator was chosen and why, and when memory ran short.

    Raises:
        InputError: If the estimator needs what the task does not give.
        NonFiniteTraceError: If an output, a loss or a trace is NaN or infinite.
    """
    started = time.monotonic()
    task, smoothing = curved(task)
    model = task.model()
    model.load_state_dict(state)
    few = task.batch("train", torch.arange(_few(task, settings)))
    _refuse_flicker(task, few, _few(task, settings))
    micro_batch = None
    if settings.memory_gib is not None:
        with evaluating(model):
            micro_batch = fitting_examples(
                task,
                model,
                list(layers),
                few,
                _few(task, settings),
                estimator="hutchinson" if settings.estimator == "auto" else settings.estimator,
                subject=subject,
                budget_bytes=settings.memory_gib * 2**30,
            )
        micro_batch = min(micro_batch, settings.batch_size)
        if micro_batch < settings.batch_size:
            note(f"{micro_batch} of {settings.batch_size} examples at once, within memory_gib")
    count = num_workers(workers.count, workers.cpus, workers.gpus)
    with WorkerPool(
        task,
        state,
        workers=count,
        cpus=workers.cpus,
        gpus=workers.gpus,
        micro_batch=micro_batch,
    ) as pool:

        def look(examples: Sequence[int]) -> Tensor:
            return pool.look(
                "train",
                examples,
                settings.batch_size,
                lambda done: progress(done, len(examples), "images", "which examples matter"),
            )

        try:
            plan, reason = plan_traces(
                task,
                model,
                layers,
                look=look,
                subject=subject,
                granularity=granularity,
                num_examples=settings.examples,
                seed=seed,
                **settings.model_dump(exclude={"examples", "memory_gib"}),
            )
        except ValueError as error:
            if type(error) is not ValueError:
                raise
            raise InputError(f"curvature: {error}") from error
        reason = "; ".join(filter(None, (reason, smoothing)))
        note(f"{plan.estimator}: {reason}")
        estimate = estimate_on_workers(
            pool,
            plan,
            units=units,
            on_unit=lambda reducer: _report(reducer, progress),
            on_note=note,
        )
        seconds = time.monotonic() - started
        return Traced(plan, reason, estimate, count, pool.cpu_seconds, seconds)


def _few(task: Task, settings: CurvatureConfig) -> int:
    return min(_FEW, settings.batch_size, task.size("train"))


def _refuse_flicker(task: Task, few: object, num: int) -> None:
    """Refuse a loader whose examples change: a unit that is done again must see the same."""
    again = task.batch("train", torch.arange(num))
    leaves, others = (torch.utils._pytree.tree_leaves(x) for x in (few, again))
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, Tensor) and not torch.equal(a, b):
            raise InputError(
                "task: batch() must return the same examples for the same indices, got others "
                "the second time: switch augmentation and shuffling off (see hawq.testing)"
            )


def _report(reducer: Reducer, progress: Progress) -> None:
    plan, estimate = reducer.plan, reducer.estimate
    done = plan.num_units - len(reducer.missing)
    if estimate is None:
        progress(done, plan.num_batches, "units", "first look at every batch")
        return
    if not estimate.num_probes:
        progress(plan.num_units, plan.num_units, "units", "no probe error")
        return
    rounds = estimate.num_probes // plan.probes_per_unit
    met = estimate.converged(plan.rtol, plan.atol)
    size = np.maximum(np.abs(estimate.trace), 1e-300)
    worst = float((estimate.probe_error / size).max())
    if reducer.finished:
        done = expected = rounds * plan.num_batches
    else:
        # Errors fall with the root of the probes: a forecast, not a promise.
        factor = max(1.0, (worst / plan.rtol) ** 2)
        expected = min(plan.num_units, int(np.ceil(factor * rounds)) * plan.num_batches)
    message = f"{met.sum()} of {len(met)} within tolerance"
    measures: Measures = {"probes": estimate.num_probes, "relative_error": worst}
    progress(done, max(done, expected), "units", message, measures)
