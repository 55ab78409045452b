"""``hawq trace``: the curvature of a network, without a search."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hawq.curvature import Granularity, Subject
from hawq.curvature.blocks import grouped_blocks, residual_blocks
from search.config import SearchConfig
from search.eigenvalues import eigenvalues_on_cluster
from search.errors import InputError
from search.events import Listener
from search.folder import content_hash
from search.machine import machine, versions
from search.pipeline import trained
from search.stages.search import Search
from search.traced import EigenvalueDocument, LossSurface, TraceDocument, TraceGroup
from search.tracing import trace_on_cluster
from search.unit_file import UnitFile

__all__ = ["trace_blocks", "trace_network"]


def trace_network(
    config: SearchConfig,
    out: Path,
    *,
    name: str,
    subject: Subject = "weights",
    granularity: Granularity = "layer",
    listeners: Iterable[Listener] = (),
) -> TraceDocument:
    """Trace a network's weights or activations, by layer or by channel.

    Args:
        config: The network and its data; ``curvature`` says to what error.
        out: A run's folder: a trained network is found or left there, and finished units too, so
            that a stopped estimation goes on.
        name: For titles.
        subject: Weights or activations.
        granularity: Whether each channel is traced, too.
        listeners: Called with every event.

    Raises:
        InputError: If something that was given is wrong.
        NonFiniteTraceError: If an output, a loss or a trace is NaN or infinite.
    """
    with trained(config, out, listeners=listeners) as search:
        settings = config.curvature
        inputs = content_hash(
            {
                "seed": config.seed,
                "curvature": settings.model_dump(mode="json"),
                "model": search.model.weights_sha256,
                "layers": search.layers,
                "subject": subject,
                "granularity": granularity,
            }
        )
        search.events.emit("trace", "started")
        traced = trace_on_cluster(
            search.task,
            search.weights,
            search.layers,
            settings=settings,
            workers=config.workers,
            seed=config.seed,
            units=UnitFile(out / f"trace.{subject}.{granularity}.units.jsonl", inputs),
            subject=subject,
            granularity=granularity,
            progress=lambda *how: search.progress("trace", *how),
            note=lambda text: search.events.emit("trace", "note", text),
        )
        search.events.emit("trace", "finished", f"{traced.seconds:.1f} s")
    plan, e = traced.plan, traced.estimate
    assert plan.population is not None
    assert plan.population.size is not None
    columns = zip(
        plan.names,
        plan.elements,
        e.trace.tolist(),
        e.probe_error.tolist(),
        e.data_error.tolist(),
        (e.trace / (e.trace[: plan.num_sites].sum() or 1.0)).tolist(),
        e.share_error.tolist(),
        strict=True,
    )
    return TraceDocument(
        **_common(config, name),
        subject=subject,
        granularity=granularity,
        estimator=plan.estimator,
        reason=traced.reason,
        num_sites=plan.num_sites,
        num_probes=e.num_probes,
        num_examples=e.num_examples,
        pool_size=plan.population.pool,
        population_size=plan.population.size,
        rtol=plan.rtol,
        converged=bool(e.converged(plan.rtol, plan.atol).all()),
        num_negative=int((e.trace < 0).sum()),
        workers=traced.workers,
        seconds=traced.seconds,
        cpu_seconds=traced.cpu_seconds,
        groups=[
            TraceGroup(
                group=group, n=n, trace=t, probe_error=p, data_error=d, share=s, share_error=se
            )
            for group, n, t, p, d, s, se in columns
        ],
    )


def trace_blocks(
    config: SearchConfig,
    out: Path,
    *,
    name: str,
    groups: Mapping[str, Sequence[str]] | None = None,
    listeners: Iterable[Listener] = (),
) -> EigenvalueDocument:
    """Find the top Hessian eigenvalue of every block of layers (Dong et al., 2019).

    Args:
        config: As for ``trace_network``; ``curvature.rtol`` is of the eigenvalue's residual, and
            ``curvature.max_probes`` the products at most.
        out: A run's folder.
        name: For titles.
        groups: Block names to globs of layers; None for the network's residual blocks.
        listeners: Called with every event.

    Raises:
        InputError: If something that was given is wrong.
        NonFiniteTraceError: If a loss or a product is NaN or infinite.
    """
    with trained(config, out, listeners=listeners) as search:
        blocks, state = _blocks(search, groups), search.weights
        search.events.emit("trace", "started")
        result = eigenvalues_on_cluster(
            search.task,
            state,
            blocks,
            settings=config.curvature,
            workers=config.workers,
            seed=config.seed,
            progress=lambda *how: search.progress("trace", *how),
            note=lambda text: search.events.emit("trace", "note", text),
        )
        search.events.emit("trace", "finished", f"{result.seconds:.1f} s")
        weights_sha256 = search.model.weights_sha256
    population = result.drawn.population
    return EigenvalueDocument(
        **_common(config, name),
        weights_sha256=weights_sha256,
        num_examples=len(result.drawn.examples),
        pool_size=population.pool,
        population_size=population.size or population.pool,
        rtol=config.curvature.rtol,
        workers=result.workers,
        seconds=result.seconds,
        cpu_seconds=result.cpu_seconds,
        blocks=list(result.found.values()),
        surfaces=[
            LossSurface(
                block=surface.block,
                eigenvalues=list(surface.eigenvalues),
                offsets=surface.offsets.tolist(),
                losses=surface.losses.tolist(),
            )
            for surface in result.surfaces
        ],
    )


def _blocks(
    search: Search, groups: Mapping[str, Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    if groups is None:
        return residual_blocks(search.task.model())
    try:
        return grouped_blocks(search.layers, groups)
    except ValueError as error:
        raise InputError(f"--blocks: {error}") from error


def _common(config: SearchConfig, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "seed": config.seed,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }
