"""From a network with its quantizers attached to a packed one, and to the bytes of its file."""

import json
import zlib
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hawq.allocation import Bits
from hawq.channels import channels_first
from hawq.export.packed import (
    FORMAT,
    Floats,
    Form,
    Integers,
    Packed,
    QuantizedTensor,
    QuantizedWeight,
)
from hawq.finetune.attachment import detach
from hawq.finetune.fake_quantizers import ActivationQuantizer, WeightQuantizer
from hawq.space import sharing_layers

__all__ = ["encode", "pack"]

_SMALLEST = 1e-12  # of scales in training


@torch.no_grad()
def pack(model: nn.Module, about: Mapping[str, Any] | None = None) -> Packed:
    """Take the integers out of a quantized network.

    Args:
        model: With its quantizers attached, activations calibrated; left as it was. What is not
            quantized, or whose quantizer is not active, stays in floating point.
        about: Plain data to go with it.

    Raises:
        ValueError: If the codes of a layer do not give its quantized weight back, bit for bit.
    """
    copied = deepcopy(model).cpu().eval()
    quantizers = dict(_weight_quantizers(copied))
    tensors, reads = _tensors(copied)
    rounded = {name: _weight(of[0]) for name, of in sharing_layers(copied).items()}
    detach(copied)
    plain = {name: _weight(of[0]) for name, of in sharing_layers(copied).items()}
    named = _by_storage(copied)
    weights = []
    for name, quantizer in quantizers.items():
        names = named.pop(plain[name].data_ptr())[0]
        weight = _quantized(names, quantizer, plain[name], rounded[name])
        if not np.array_equal(weight.values, rounded[name].numpy()):
            raise ValueError(f"the codes of {name} must give its weight back, got another one")
        weights.append(weight)
    rest = {
        names: value.numpy()
        for names, value in named.values()
        if not names[0].endswith("num_batches_tracked")  # which evaluation never reads
    }
    return Packed(tuple(weights), tensors, reads, rest, dict(about or {}))


def encode(packed: Packed) -> bytes:
    """Write a packed network as ``hawq.export.read`` reads it."""
    streams = _Streams()
    weights = [_weight_entry(weight, streams) for weight in packed.weights]
    tensors = [_tensor_entry(tensor, streams) for tensor in packed.tensors]
    rest = []
    for names, value in packed.rest.items():
        rest.append([list(names), list(value.shape), str(value.dtype)])
        streams.add_tensor(value)
    index = {
        "weights": weights,
        "tensors": tensors,
        "reads": {name: list(calls) for name, calls in packed.reads.items()},
        "rest": rest,
        "about": packed.about,
    }
    text = json.dumps(index, separators=(",", ":"), ensure_ascii=False)
    parts = {
        "index": np.frombuffer(zlib.compress(text.encode(), 9), np.uint8),
        "codes": np.frombuffer(b"".join(streams.codes), np.uint8),
        "floats": np.concatenate([np.zeros(0, np.float32), *streams.floats]),
    }
    if streams.others:
        parts["bytes"] = np.frombuffer(b"".join(streams.others), np.uint8)
    return save(parts, {"format": FORMAT})


@dataclass(slots=True)
class _Streams:
    """What a file will hold, in order."""

    codes: list[bytes] = field(default_factory=list)
    floats: list[Floats] = field(default_factory=list)
    others: list[bytes] = field(default_factory=list)

    def add_integers(self, values: Integers, width: int) -> None:
        """Add integers in 0 … 2^width−1, any shape."""
        bits = values.reshape(-1, 1) >> np.arange(width) & 1
        self.codes.append(np.packbits(bits.astype(np.uint8), bitorder="little").tobytes())

    def add_tensor(self, value: NDArray[Any]) -> None:
        """Add a tensor that is not quantized."""
        if value.dtype == np.float32:
            self.floats.append(value.ravel())
        else:
            self.others.append(np.ascontiguousarray(value).tobytes())

    def add_widths(self, widths: Integers) -> int | list[int]:
        """Add which width each channel has; return their one width, or which there are."""
        menu = np.unique(widths)
        if len(menu) == 1:
            return int(menu[0])
        self.add_integers(np.searchsorted(menu, widths), (len(menu) - 1).bit_length())
        return list(map(int, menu))

    def add_ranges(self, form: Form, widths: Integers, scale: Floats, zero_point: Integers) -> int:
        """Add scales and zero points, but those of pruned channels; return how many."""
        kept = widths > 0 if len(scale) == len(widths) and form != "dorefa" else slice(None)
        self.floats.append(scale[kept])
        if form == "asymmetric":
            self.add_integers(zero_point[kept], 8)
        return len(scale[kept])


def _weight_entry(weight: QuantizedWeight, streams: _Streams) -> dict[str, Any]:
    entry = {
        "names": list(weight.names),
        "form": weight.form,
        "shape": list(weight.codes.shape),
        "bits": streams.add_widths(weight.widths),
        "scales": streams.add_ranges(weight.form, weight.widths, weight.scale, weight.zero_point),
    }
    if weight.transposed_groups:
        entry["transposed_groups"] = weight.transposed_groups
    for width in np.unique(weight.widths[weight.widths > 0]).tolist():
        streams.add_integers(weight.codes[weight.widths == width], width)
    return entry


def _tensor_entry(tensor: QuantizedTensor, streams: _Streams) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "form": tensor.form,
        "axis": tensor.axis,
        "channels": len(tensor.widths),
        "bits": streams.add_widths(tensor.widths),
        "scales": streams.add_ranges(tensor.form, tensor.widths, tensor.scale, tensor.zero_point),
    }


def _weight_quantizers(model: nn.Module) -> Iterator[tuple[str, WeightQuantizer]]:
    for name, (layer, *_) in sharing_layers(model).items():
        if not parametrize.is_parametrized(layer, "weight"):
            continue
        parametrizations = layer.parametrizations
        assert isinstance(parametrizations, nn.ModuleDict)
        of_weight = parametrizations["weight"]
        assert isinstance(of_weight, nn.ModuleList)
        quantizer = of_weight[0]
        if isinstance(quantizer, WeightQuantizer) and quantizer.active:
            yield name, quantizer


def _by_storage(model: nn.Module) -> dict[int, tuple[tuple[str, ...], Tensor]]:
    """Return a network's tensors with all of their names, each once, by where they lie."""
    found: dict[int, tuple[tuple[str, ...], Tensor]] = {}
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        value = tensor.detach()
        place = value.data_ptr() or -1 - i  # what is empty lies nowhere
        names, first = found.get(place, ((), value))
        found[place] = ((*names, name), first)
    return found


def _quantized(
    names: tuple[str, ...], quantizer: WeightQuantizer, plain: Tensor, rounded: Tensor
) -> QuantizedWeight:
    """Read the codes off a quantized weight: whole numbers once scale and offset are known."""
    groups = quantizer.transposed_groups
    plain, rounded = channels_first(plain, groups), channels_first(rounded, groups)
    widths = _channel_widths(quantizer.bits, len(plain))
    shape = (-1, *[1] * (plain.ndim - 1))
    columns = widths.reshape(shape)
    values = rounded.double().numpy()
    if quantizer.scheme.learning == "dorefa":
        scale = np.array([plain.tanh().abs().amax().clamp_min(_SMALLEST), plain.abs().mean()])
        steps = (values / scale[0] + 1) / 2 * (2.0**columns - 1)
        codes = np.where(columns > 1, steps.round(), values > 0) * (columns > 0)
        return _packed_weight(names, "dorefa", widths, codes, scale, np.zeros(2), groups)
    form: Form = "symmetric" if quantizer.scheme.symmetric else "asymmetric"
    scale = quantizer.scale.detach().clamp_min(_SMALLEST).flatten().numpy()
    zero_point = quantizer.zero_point.flatten().numpy()
    q = values / scale.reshape(shape)
    odd = (columns == 1) | (columns == 2)
    if form == "asymmetric":
        codes = q + zero_point.reshape(shape)
    else:
        codes = np.where(odd, (q - 1) / 2, q) + 2.0 ** (columns - 1)
    codes = codes.round() * (columns > 0)
    return _packed_weight(names, form, widths, codes, scale, zero_point, groups)


def _packed_weight(
    names: tuple[str, ...],
    form: Form,
    widths: Integers,
    codes: NDArray[Any],
    scale: NDArray[Any],
    zero_point: NDArray[Any],
    transposed_groups: int,
) -> QuantizedWeight:
    return QuantizedWeight(
        names,
        form,
        widths,
        codes.astype(np.int64),
        scale.astype(np.float32),
        zero_point.astype(np.int64),
        transposed_groups,
    )


def _channel_widths(bits: Bits, num_channels: int) -> Integers:
    return np.full(num_channels, bits) if isinstance(bits, int) else np.array(bits)


def _tensors(
    model: nn.Module,
) -> tuple[tuple[QuantizedTensor, ...], dict[str, tuple[int | None, ...]]]:
    """Return the tensors that are rounded, and who reads which."""
    found: dict[str, QuantizedTensor] = {}
    reads: dict[str, tuple[int | None, ...]] = {}
    for name, layer in model.named_modules():
        attached = getattr(layer, "input_quantizer", None)
        if attached is None:
            continue
        calls = list(attached) if isinstance(attached, nn.ModuleList) else [attached]
        indices: list[int | None] = []
        for quantizer in calls:
            if not isinstance(quantizer, ActivationQuantizer) or not _rounds(quantizer):
                indices.append(None)
                continue
            found.setdefault(quantizer.name, _tensor(quantizer))
            indices.append(list(found).index(quantizer.name))
        if any(i is not None for i in indices):
            reads[name] = tuple(indices)
    return tuple(found.values()), reads


def _rounds(quantizer: ActivationQuantizer) -> bool:
    return quantizer.active and bool(quantizer.calibrated)


def _tensor(quantizer: ActivationQuantizer) -> QuantizedTensor:
    form: Form = "asymmetric"
    if quantizer.scheme.symmetric:
        form = "symmetric" if quantizer.signed else "unsigned"
    scale = quantizer.scale.detach().clamp_min(_SMALLEST).flatten().numpy()
    return QuantizedTensor(
        quantizer.name,
        form,
        _channel_widths(quantizer.bits, len(scale)),
        scale.copy(),
        quantizer.zero_point.flatten().numpy().astype(np.int64),
        quantizer.axis,
    )


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
