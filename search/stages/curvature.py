"""Stage 2: Hessian traces of all weights and, where searched, activations, on Ray workers.

Besides them the top eigenvalues of blocks, where a method goes by them.
"""

from typing import Any

import numpy as np

from hawq.curvature import Granularity, Subject
from search.artefacts import CurvatureArtefact, TraceArtefact
from search.folder import content_hash
from search.stages.eigenvalues import block_eigenvalues, eigenvalue_inputs
from search.stages.search import Search
from search.tracing import Traced, trace_on_cluster
from search.unit_file import UnitFile

__all__ = ["inputs", "make"]


def inputs(search: Search) -> dict[str, Any]:
    """The estimation's settings, what is traced, and the weights."""
    found = _trace_inputs(search)
    if search.config.by_block:
        found["eigenvalues"] = eigenvalue_inputs(search)
    return found


def _trace_inputs(search: Search) -> dict[str, Any]:
    """What traces depend on: they stay as they are where eigenvalues come to them."""
    found: dict[str, Any] = {
        "config": {
            "seed": search.config.seed,
            "curvature": search.config.curvature.model_dump(mode="json"),
        },
        "model": search.model.weights_sha256,
        "layers": search.layers,
    }
    # Named only where they are traced: a search without them goes on with what it has.
    if search.config.searches_activations:
        found["activations"] = search.activations
    if search.channels is not None:
        found["granularity"] = "channel"
    return found


def make(search: Search) -> CurvatureArtefact:
    """Choose an estimator, then probe until the error is small enough."""
    weights = _trace(search, "weights")
    activations = None
    if search.config.searches_activations:
        search.events.emit("curvature", "note", "activations")
        activations = TraceArtefact(**_trace(search, "activations"))
    blocks = None
    if search.config.by_block:
        blocks = block_eigenvalues(search, content_hash(inputs(search)))
    return CurvatureArtefact(**weights, activations=activations, blocks=blocks)


def _trace(search: Search, subject: Subject) -> dict[str, Any]:
    granularity: Granularity = "layer" if search.channels is None else "channel"
    file = "curvature.units.jsonl" if subject == "weights" else "curvature.activations.units.jsonl"
    traced = trace_on_cluster(
        search.task,
        search.weights,
        search.layers,
        settings=search.config.curvature,
        workers=search.config.workers,
        seed=search.config.seed,
        units=UnitFile(search.folder.path / file, content_hash(_trace_inputs(search))),
        subject=subject,
        granularity=granularity,
        progress=lambda *how: search.progress("curvature", *how),
        note=lambda text: search.events.emit("curvature", "note", text),
    )
    search.worker_cpu_seconds += traced.cpu_seconds
    if not traced.estimate.trace.any():
        search.events.emit(
            "curvature",
            "warning",
            f"all traces of {subject} are 0, so that no allocation is better than another: the "
            "outputs of a network that is not trained, or is sure of everything, may have no "
            "curvature in floating point",
        )
    return _data(traced)


def _data(traced: Traced) -> dict[str, Any]:
    plan, estimate = traced.plan, traced.estimate
    assert plan.population is not None
    drawn = plan.population.pool > estimate.num_examples
    sites = slice(0, plan.num_sites)
    by_channel = {}
    if plan.granularity == "channel":
        ends = np.cumsum([plan.num_sites, *(site.num_channels for site in plan.sites)])[:-1]
        errors = np.hypot(estimate.probe_error, estimate.data_error)
        by_channel = {
            "channel_trace": [part.tolist() for part in np.split(estimate.trace, ends)[1:]],
            "channel_error": [part.tolist() for part in np.split(errors, ends)[1:]],
        }
    return {
        "estimator": plan.estimator,
        "reason": traced.reason,
        "layers": [site.name for site in plan.sites],
        "num_elements": [site.num_elements for site in plan.sites],
        "trace": estimate.trace[sites].tolist(),
        "probe_error": estimate.probe_error[sites].tolist(),
        "data_error": estimate.data_error[sites].tolist(),
        "share_error": estimate.share_error[sites].tolist(),
        **by_channel,
        "num_probes": estimate.num_probes,
        "num_examples": estimate.num_examples,
        "pool_size": plan.population.pool if drawn else None,
        "rtol": plan.rtol,
        "converged": bool(estimate.converged(plan.rtol, plan.atol)[sites].all()),
        "num_negative": int((estimate.trace[sites] < 0).sum()),
    }
