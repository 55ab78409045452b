"""Stage 2: Hessian traces of all layers' weights, on Ray workers."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from hawq.curvature import (
    Choice,
    Reducer,
    TracePlan,
    choose_estimator,
    draw_examples,
    output_curvature,
    supports_exact,
)
from hawq.task import Task, moved
from search.artefacts import CurvatureArtefact
from search.cluster import num_workers
from search.errors import InputError
from search.folder import content_hash
from search.probes import UnitFile, estimate_on_workers
from search.stages.search import Search

__all__ = ["inputs", "make"]

_EXAMPLES_TO_CHOOSE_BY = 4
# Examples a task of scoring the pool, and a forward pass in it.
_POOL_CHUNK, _POOL_BATCH = 2048, 256


def inputs(search: Search) -> dict[str, Any]:
    """The estimation's settings and the weights."""
    return {
        "config": {
            "seed": search.config.seed,
            "curvature": search.config.curvature.model_dump(mode="json"),
        },
        "model": search.model.weights_sha256,
        "layers": search.layers,
    }


def make(search: Search) -> CurvatureArtefact:
    """Choose an estimator, then probe until the error is small enough."""
    choice = _choice(search)
    search.events.emit("curvature", "note", f"{choice.estimator}: {choice.reason}")
    (plan, pool_size), workers = _plan(search, choice), search.config.workers
    estimate, cpu_seconds = estimate_on_workers(
        search.task,
        search.weights,
        plan,
        units=UnitFile(search.folder.path / "curvature.units.jsonl", content_hash(inputs(search))),
        workers=num_workers(workers.count, workers.cpus, workers.gpus),
        cpus=workers.cpus,
        gpus=workers.gpus,
        on_unit=lambda reducer: _report(search, reducer),
    )
    search.worker_cpu_seconds += cpu_seconds
    return CurvatureArtefact(
        estimator=plan.estimator,
        reason=choice.reason,
        layers=list(plan.layers),
        num_elements=[group.num_elements for group in search.space.groups],
        trace=estimate.trace.tolist(),
        probe_error=estimate.probe_error.tolist(),
        data_error=estimate.data_error.tolist(),
        num_probes=estimate.num_probes,
        num_examples=estimate.num_examples,
        pool_size=pool_size,
        rtol=plan.rtol,
        converged=bool(estimate.converged(plan.rtol).all()),
        num_negative=int((estimate.trace < 0).sum()),
    )


def _choice(search: Search) -> Choice:
    wanted = search.config.curvature.estimator
    model = search.task.model()
    model.load_state_dict(search.weights)
    size = min(_EXAMPLES_TO_CHOOSE_BY, search.task.size("train"))
    few = search.task.batch("train", torch.arange(size))
    if wanted.endswith("gauss_newton") and search.task.curvature(model, few) is None:
        raise InputError(
            f"curvature.estimator: {wanted} needs a task that gives the factors of its loss's "
            "Hessian, got none: use auto or hutchinson"
        )
    odd = [n for n in search.layers if not supports_exact(model.get_submodule(n))]
    if wanted == "exact_gauss_newton" and odd:
        raise InputError(
            "curvature.estimator: exact_gauss_newton takes linear layers and 1-D and 2-D "
            f"convolutions with zero padding, got {odd[0]}: use auto or gauss_newton"
        )
    if wanted != "auto":
        return Choice(wanted, "asked for by the config")
    rtol = search.config.curvature.rtol
    return choose_estimator(search.task, model, search.layers, few, rtol=rtol)


def _plan(search: Search, choice: Choice) -> tuple[TracePlan, int | None]:
    """Return the plan, and the size of the pool that its examples were drawn from."""
    settings, seed = search.config.curvature, search.config.seed
    size = search.task.size("train")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    plan = TracePlan(
        layers=tuple(search.layers),
        estimator=choice.estimator,
        split="train",
        examples=tuple(order[: settings.examples]),
        batch_size=settings.batch_size,
        probes_per_unit=settings.probes_per_unit,
        rtol=settings.rtol,
        max_probes=settings.max_probes,
        seed=seed,
    )
    num = len(plan.examples)
    if settings.pool is None or choice.estimator != "exact_gauss_newton" or size == num:
        return plan, None
    pool = order[: max(settings.pool, num)]
    draw = draw_examples(_pool_curvature(search, pool), num, seed)
    examples = tuple(pool[i] for i in draw.examples)
    spread = 1 / len(pool) - 1 / size
    return replace(plan, examples=examples, weights=draw.weights, pool_variance=spread), len(pool)


def _pool_curvature(search: Search, pool: Sequence[int]) -> Tensor:
    """Look once, forward only, at every example of the pool, on Ray workers."""
    workers, state = search.config.workers, ray.put(search.weights)
    remote = _output_curvature.options(num_cpus=workers.cpus, num_gpus=workers.gpus)
    chunks = [pool[i : i + _POOL_CHUNK] for i in range(0, len(pool), _POOL_CHUNK)]
    pending = [
        remote.remote(search.task, state, chunk, workers.cpus, workers.gpus > 0) for chunk in chunks
    ]
    for done in range(1, len(pending) + 1):
        ray.wait(pending, num_returns=done)
        search.progress("curvature", done, len(pending), "chunks", "which examples matter")
    found = []
    for values, cpu_seconds in ray.get(pending):
        search.worker_cpu_seconds += cpu_seconds
        found.append(torch.tensor(values))
    return torch.cat(found)


@ray.remote(max_retries=3)
def _output_curvature(
    task: Task, state: dict[str, Tensor], examples: Sequence[int], cpus: float, gpu: bool
) -> tuple[Any, float]:
    torch.set_num_threads(max(1, int(cpus)))
    started = time.process_time()
    device = "cuda" if gpu else "cpu"
    model = task.model()
    model.load_state_dict(state)
    model.to(device).eval()
    parts = [
        output_curvature(task, model, moved(task.batch("train", part), device))
        for part in torch.tensor(examples).split(_POOL_BATCH)
    ]
    return torch.cat(parts).numpy(), time.process_time() - started


def _report(search: Search, reducer: Reducer) -> None:
    plan, estimate = reducer.plan, reducer.estimate
    done = expected = plan.num_units - len(reducer.missing)
    if estimate is None:
        search.progress("curvature", done, plan.num_units, "units")
        return
    if not estimate.num_probes:
        search.progress("curvature", plan.num_units, plan.num_units, "units", "no probe error")
        return
    relative = estimate.probe_error / np.maximum(np.abs(estimate.trace), 1e-300)
    rounds = estimate.num_probes // plan.probes_per_unit
    if reducer.finished:
        done = expected = rounds * plan.num_batches
    else:
        # Errors fall with the root of the probes: a forecast, not a promise.
        factor = max(1.0, float(relative.max() / plan.rtol) ** 2)
        expected = min(plan.num_units, int(np.ceil(factor * rounds)) * plan.num_batches)
    worst = f"largest probe error {100 * relative.max():.1f} %"
    search.progress("curvature", done, max(done, expected), "units", worst)
