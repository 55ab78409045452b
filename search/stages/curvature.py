"""Stage 2: Hessian traces of all layers' weights, on Ray workers."""

from typing import Any

import numpy as np
import torch

from hawq.curvature import Choice, Reducer, TracePlan, choose_estimator, supports_exact
from search.artefacts import CurvatureArtefact
from search.cluster import num_workers
from search.errors import InputError
from search.folder import content_hash
from search.probes import UnitFile, estimate_on_workers
from search.stages.search import Search

__all__ = ["inputs", "make"]

_EXAMPLES_TO_CHOOSE_BY = 4


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
    plan, workers = _plan(search, choice), search.config.workers
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


def _plan(search: Search, choice: Choice) -> TracePlan:
    settings = search.config.curvature
    generator = torch.Generator().manual_seed(search.config.seed)
    order = torch.randperm(search.task.size("train"), generator=generator)
    return TracePlan(
        layers=tuple(search.layers),
        estimator=choice.estimator,
        split="train",
        examples=tuple(order[: settings.examples].tolist()),
        batch_size=settings.batch_size,
        probes_per_unit=settings.probes_per_unit,
        rtol=settings.rtol,
        max_probes=settings.max_probes,
        seed=search.config.seed,
    )


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
