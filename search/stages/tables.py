"""Stage 3: Ω of every layer, tensor and channel at every width, and what costs come of."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hawq.channels import channels_first, transposed_groups
from hawq.cost import FLOAT_BITS
from hawq.finetune import attach, sample_activations
from hawq.quantizers import Scheme
from hawq.ranges import activation_errors, weight_errors
from hawq.reads import Reads
from hawq.sensitivity import omega
from hawq.space import Space, quantizable_layers, unquantizable_weights
from search.artefacts import (
    CostSources,
    GroupTables,
    LayerLatency,
    OperationEntry,
    TablesArtefact,
    TraceArtefact,
)
from search.folder import content_hash
from search.latency import read_latency
from search.stages.search import Search
from search.trials import calibration_inputs, num_calibration_batches

__all__ = ["inputs", "make", "sources"]

# Squared errors of every channel: of each weight and each activation, shape (C, B).
_Errors = dict[str, NDArray[np.float64]]


def inputs(search: Search) -> dict[str, Any]:
    """What may be chosen, the traces, and the latency table."""
    config = search.config
    found = {
        "config": {
            "weights": config.weights.model_dump(mode="json"),
            "activations": config.activations.model_dump(mode="json"),
        },
        "space": search.space.fingerprint,
        "channels": None if search.channels is None else search.channels.fingerprint,
        "model": search.model.weights_sha256,
        "curvature": content_hash(search.curvature.model_dump(mode="json")),
    }
    if config.latency is not None:
        found["latency"] = content_hash(
            [e.model_dump() for e in _latency(config.latency, search.reads)]
        )
    return found


def make(search: Search) -> TablesArtefact:
    """Price every group at every width, with the quantizers that the trials use."""
    model = search.task.model()
    model.load_state_dict(search.weights)
    samples = _activation_samples(search)

    def groups(space: Space) -> dict[str, Any]:
        errors = _weight_errors(search, model, space) | _activation_errors(
            samples, space, search.config.schemes.activations
        )
        return _groups(search, space, errors)

    return TablesArtefact(
        **groups(search.space),
        **dict(sources(search)),
        channels=GroupTables(**groups(search.channels)) if search.channels else None,
        blocks=search.curvature.blocks,
    )


def sources(search: Search) -> CostSources:
    """Return what costs are made of, besides the groups' elements.

    Raises:
        InputError: If the latency table is none.
    """
    reads, fixed = search.reads, search.fixed_activations
    path = search.config.latency
    searched = set(search.activations) if search.config.searches_activations else set()

    def bits(name: str) -> str | int:
        """What tells the bits of a tensor: its group, or their number."""
        return f"a:{name}" if name in searched else fixed.get(f"a:{name}", FLOAT_BITS)

    return CostSources(
        operations=[
            OperationEntry(weight=f"w:{r.layer}", activation=bits(r.activation), macs=r.macs)
            for r in (reads.reads if fixed or searched else ())
        ],
        alive=[[f"a:{name}" for name in step] for step in reads.alive],
        latency_ns=None if path is None else _latency(path, reads),
        float_weights=_float_weights(search),
        scale_bits=16 if search.config.schemes.weights.symmetric else 24,
    )


def _float_weights(search: Search) -> dict[str, int]:
    """Count, by name, the weights that stay in floating point, as they must or should."""
    model = search.task.model()
    kept = {
        f"{name}.weight": layer.weight.numel()
        for name, layer in quantizable_layers(model).items()
        if name not in search.layers and isinstance(layer.weight, Tensor)
    }
    return kept | unquantizable_weights(model)


def _groups(search: Search, space: Space, errors: _Errors) -> dict[str, Any]:
    """Put the groups of a space together, whatever they are of."""
    traces, trace_errors = _traces(search, space)
    squared = np.concatenate([errors[owner] for owner in _owners(space)])
    scales = _num_scales(search)
    table = omega(space, traces, squared)
    return {
        "space": space.to_json(),
        "space_fingerprint": space.fingerprint,
        "widths": list(space.widths),
        "sensitivity": [[v if np.isfinite(v) else None for v in row] for row in table.tolist()],
        "squared_error": squared.tolist(),
        "trace": traces.tolist(),
        "trace_error": trace_errors.tolist(),
        "num_scales": [1 if g.is_channel else scales.get(g.name, 1) for g in space.groups],
    }


def _num_scales(search: Search) -> dict[str, int]:
    """Count the scales of each layer and tensor that its scheme gives one a channel."""
    weights = search.reads.layers if search.config.schemes.weights.per == "channel" else ()
    tensors = search.reads.activations if search.config.schemes.activations.per == "channel" else ()
    return {f"w:{layer.name}": layer.num_channels for layer in weights} | {
        f"a:{tensor.name}": tensor.num_channels for tensor in tensors
    }


def _owners(space: Space) -> list[str]:
    """Name each layer and tensor once, in the order of the groups."""
    return list(dict.fromkeys(f"{group.name[:2]}{group.owner}" for group in space.groups))


def _traces(search: Search, space: Space) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    found: dict[str, tuple[float, float]] = {}
    for prefix, traced in (("w:", search.curvature), ("a:", search.curvature.activations)):
        if traced is None:
            continue
        errors = np.hypot(traced.probe_error, traced.data_error).tolist()
        for name, trace, error in zip(traced.layers, traced.trace, errors, strict=True):
            found[f"{prefix}{name}"] = (trace, error)
        found |= _channel_traces(prefix, traced)
    pairs = np.array([found[name] for name in space.names])
    return pairs[:, 0], pairs[:, 1]


def _channel_traces(prefix: str, traced: TraceArtefact) -> dict[str, tuple[float, float]]:
    if traced.channel_trace is None or traced.channel_error is None:
        return {}
    return {
        f"{prefix}{name}[{c}]": pair
        for name, traces, errors in zip(
            traced.layers, traced.channel_trace, traced.channel_error, strict=True
        )
        for c, pair in enumerate(zip(traces, errors, strict=True))
    }


def _weight_errors(search: Search, model: nn.Module, space: Space) -> _Errors:
    layers = quantizable_layers(model)
    errors: _Errors = {}
    for name in search.layers:
        weight = layers[name].weight
        assert isinstance(weight, Tensor)
        rows = channels_first(weight, transposed_groups(layers[name]))
        found = weight_errors(rows, space.widths, search.config.schemes.weights).numpy()
        errors[f"w:{name}"] = found if space.groups[0].is_channel else found.sum(0, keepdims=True)
    return errors


def _activation_samples(search: Search) -> dict[str, Tensor]:
    """Sample what trials calibrate ranges on: of each tensor (1, n), or (C, n) if channels count.

    One pass over the data serves tensors and channels alike.
    """
    part = (search.channels or search.space).part("activations")
    if part is None:
        return {}
    model = search.task.model()
    model.load_state_dict(search.weights)
    example = search.task.inputs(search.task.batch("train", torch.arange(1)))
    some_bits = {group.name: group.menu[0] for group in part.groups}  # any: nothing is rounded
    attach(model, some_bits, example, search.config.schemes)

    def batches() -> Iterator[Tensor]:
        for done, batch in enumerate(calibration_inputs(search.task, "cpu")):
            search.progress("tables", done, num_calibration_batches(search.task), "batches")
            yield batch

    return sample_activations(model, batches())


def _activation_errors(samples: dict[str, Tensor], space: Space, scheme: Scheme) -> _Errors:
    """E‖Q_b(a) − a‖² of each tensor, or channel, in the ranges of least error."""
    part = space.part("activations")
    errors: _Errors = {}
    for group in part.groups if part else ():
        name = f"a:{group.owner}"
        if name not in errors:
            rows = samples[group.owner]
            if not group.is_channel and scheme.per == "tensor":
                rows = rows.reshape(1, -1)
            own = replace(scheme, per="channel") if group.is_channel else scheme
            mean = (activation_errors(rows, space.widths, own) / rows.shape[1]).numpy()
            if not group.is_channel:
                mean = mean.mean(0, keepdims=True)
            errors[name] = group.num_elements * mean
    return errors


def _latency(path: str, reads: Reads) -> list[LayerLatency]:
    """Read the table; a layer that reads several tensors has its times by weight bits alone."""
    read: dict[str, set[str]] = {}
    for call in reads.reads:
        read.setdefault(call.layer, set()).add(call.activation)
    several = [layer for layer, tensors in read.items() if len(tensors) > 1]
    found = []
    for layer, by_bits in read_latency(Path(path)).by_bits(several).items():
        for key, ns in by_bits.items():
            w, a = (key, None) if isinstance(key, int) else key
            found.append(LayerLatency(layer=layer, weight_bits=w, activation_bits=a, ns=ns))
    return found
