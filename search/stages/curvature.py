"""Stage 2: Hessian traces of all layers' weights, on Ray workers."""

from typing import Any

from search.artefacts import CurvatureArtefact
from search.folder import content_hash
from search.probes import UnitFile
from search.stages.search import Search
from search.tracing import trace_on_cluster

__all__ = ["inputs", "make"]


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
    traced = trace_on_cluster(
        search.task,
        search.weights,
        search.layers,
        settings=search.config.curvature,
        workers=search.config.workers,
        seed=search.config.seed,
        units=UnitFile(search.folder.path / "curvature.units.jsonl", content_hash(inputs(search))),
        progress=lambda *how: search.progress("curvature", *how),
        note=lambda text: search.events.emit("curvature", "note", text),
    )
    search.worker_cpu_seconds += traced.cpu_seconds
    plan, estimate = traced.plan, traced.estimate
    assert plan.population is not None
    drawn = plan.population.pool > estimate.num_examples
    return CurvatureArtefact(
        estimator=plan.estimator,
        reason=traced.reason,
        layers=list(plan.layers),
        num_elements=[group.num_elements for group in search.space.groups],
        trace=estimate.trace.tolist(),
        probe_error=estimate.probe_error.tolist(),
        data_error=estimate.data_error.tolist(),
        share_error=estimate.share_error.tolist(),
        num_probes=estimate.num_probes,
        num_examples=estimate.num_examples,
        pool_size=plan.population.pool if drawn else None,
        rtol=plan.rtol,
        converged=bool(estimate.converged(plan.rtol, plan.atol).all()),
        num_negative=int((estimate.trace < 0).sum()),
    )
