"""Packed networks: integers at their real width, read back to the values that were tested.

This page defines the file and, but for a network's attention, needs numpy and torch alone. It is a
safetensors file with

    index    zlib-compressed JSON: what follows in the streams, in order, and ``about``
    codes    uint8: bit streams, the lowest bit first, each filled up to a whole byte
    floats   float32: scales, and every tensor that is not quantized
    bytes    tensors of other types, where there are any

A weight has: where channels differ, which of its widths each channel has; zero points, 8 bits each;
then the codes of its channels, width by width. A channel of 0 bits is pruned: it has no codes and
no scale. Output channels come first; ``transposed_groups`` tells of a transposed convolution, which
keeps them elsewhere. Codes are 0 … 2^b−1 in the file and stand for

    symmetric    s·(c − 2^(b−1)), and from one and two bits s·(2c + 1 − 2^b): no zero, no middle
    unsigned     s·c
    asymmetric   s·(c − z)
    dorefa       (2c/(2^b−1) − 1)·m, and from one bit ±e: all of a layer's scales are m and e

Products are rounded as they are in training, so a network that is loaded computes the same bits.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["Form", "Packed", "QuantizedTensor", "QuantizedWeight", "Rounding", "load", "read"]

Form = Literal["symmetric", "unsigned", "asymmetric", "dorefa"]
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

FORMAT = "hawq-packed-1"


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """The weight of a layer as integers.

    Attributes:
        names: In the network's state; several where layers share it.
        form: What a code stands for.
        widths: Bits of each output channel, shape (C,), 0..8.
        codes: 0 … 2^b−1, shape (C, …); 0 where a channel is pruned.
        scale: Shape (C,), or (1,) for one of all; of dorefa m and e, shape (2,).
        zero_point: As many as scales; 0 but where the form is asymmetric.
        transposed_groups: Of a transposed convolution, whose layer keeps the weight in shape
            (I, C / groups, …); 0 of any other.
    """

    names: tuple[str, ...]
    form: Form
    widths: Integers
    codes: Integers
    scale: Floats
    zero_point: Integers
    transposed_groups: int = 0

    @property
    def values(self) -> Floats:
        """What the codes stand for, as the layer keeps it."""
        return self.as_kept(self._rows())

    def as_kept(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Bring what has output channels first, shape (C, …), into the layer's own order."""
        if self.transposed_groups == 0:
            return rows
        outputs, inputs, *kernel = rows.shape
        grouped = rows.reshape(self.transposed_groups, -1, inputs, *kernel).swapaxes(1, 2)
        return grouped.reshape(-1, outputs // self.transposed_groups, *kernel)

    def _rows(self) -> Floats:
        shape = (-1, *[1] * (self.codes.ndim - 1))
        widths, codes = self.widths.reshape(shape), self.codes.astype(np.float32)
        values: Floats
        if self.form == "dorefa":
            largest, mean = self.scale
            levels = np.maximum(2.0**widths - 1, 1).astype(np.float32)
            values = (2 * codes / levels - 1) * largest
            values = np.where(widths > 1, values, np.where(codes > 0, mean, -mean))
            return np.where(widths > 0, values, np.float32(0))
        low, _, step, offset = _lines(self.form, widths, self.zero_point.reshape(shape))
        scale = self.scale.reshape(shape)
        values = (codes + low) * (scale * step) + scale * offset
        return values


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """How an activation tensor is rounded.

    Attributes:
        name: Of the tensor.
        form: What a code stands for; never dorefa.
        widths: Bits, shape (1,), or of each channel, shape (C,).
        scale: Shape (1,) or (C,).
        zero_point: As many.
        axis: Of the channels.
    """

    name: str
    form: Form
    widths: Integers
    scale: Floats
    zero_point: Integers
    axis: int

    @property
    def lines(self) -> tuple[Floats, Floats, Floats, Floats]:
        """Least and largest k, step and offset of the codes q = step·k + offset."""
        return _lines(self.form, self.widths, self.zero_point)


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A quantized network, but for its code.

    Attributes:
        weights: Of the quantized layers.
        tensors: The activations that are quantized.
        reads: Name of a module to the indices of the tensors that it reads, call by call; None
            for one in floating point.
        rest: Every other tensor of the network's state, by all of its names.
        about: Where it came from: plain data.
    """

    weights: tuple[QuantizedWeight, ...]
    tensors: tuple[QuantizedTensor, ...]
    reads: Mapping[str, tuple[int | None, ...]]
    rest: Mapping[tuple[str, ...], NDArray[Any]]
    about: Mapping[str, Any]

    @property
    def state(self) -> dict[str, Tensor]:
        """The network's state in floating point, quantized weights rounded."""
        weights = {name: torch.from_numpy(w.values) for w in self.weights for name in w.names}
        rest = {name: torch.from_numpy(v) for names, v in self.rest.items() for name in names}
        return weights | rest


class Rounding(nn.Module):
    """Rounds what a layer reads to the values that have a code."""

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.name, self.axis = tensor.name, tensor.axis
        self.size = len(tensor.scale)
        low, high, step, offset = tensor.lines
        unit, shift = tensor.scale * step, tensor.scale * offset
        # Of tensors, for the reciprocal must be the one of training.
        rows = {"unit": unit, "shift": shift, "start": offset / step, "low": low, "high": high}
        for name, row in rows.items():
            self.register_buffer(name, torch.from_numpy(np.broadcast_to(row, self.size).copy()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded values, same shape."""
        unit, shift, start, low, high = (
            self._along(row, x) for row in (self.unit, self.shift, self.start, self.low, self.high)
        )
        k = (x * unit.reciprocal() - start).round()
        return torch.maximum(torch.minimum(k, high), low) * unit + shift

    def _along(self, row: Tensor | nn.Module, x: Tensor) -> Tensor:
        assert isinstance(row, Tensor)
        if self.size == 1:
            return row
        axis = self.axis % x.ndim
        return row.view(*[1] * axis, -1, *[1] * (x.ndim - 1 - axis))


def read(data: bytes) -> Packed:
    """Read a packed file.

    Raises:
        ValueError: If it is none.
    """
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        form = header.pop("__metadata__")["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("the file must be a packed network, got something else") from error
    if form != FORMAT:
        raise ValueError(f"the file must have the format {FORMAT}, got {form}")
    start = 8 + size
    parts = {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items()
    }
    index = json.loads(zlib.decompress(parts["index"]))
    stream = _Stream(parts["codes"], np.frombuffer(parts["floats"], np.float32))
    weights = tuple(_weight(entry, stream) for entry in index["weights"])
    tensors = tuple(_tensor(entry, stream) for entry in index["tensors"])
    rest = {}
    others = parts.get("bytes", b"")
    for names, shape, kind in index["rest"]:
        if kind == "float32":
            value = stream.floats(int(np.prod(shape, dtype=int)))
        else:
            length = int(np.prod(shape, dtype=int)) * np.dtype(kind).itemsize
            value, others = np.frombuffer(others[:length], kind).copy(), others[length:]
        rest[tuple(names)] = value.reshape(shape)
    reads = {name: tuple(calls) for name, calls in index["reads"].items()}
    return Packed(weights, tensors, reads, rest, index["about"])


def load(packed: Packed, model: nn.Module) -> nn.Module:
    """Make a network what was packed, in place, and return it in eval mode.

    The projections of ``nn.MultiheadAttention`` become layers of their own, as in the file.

    Args:
        packed: What a file held.
        model: The network's code, in floating point; its weights are loaded over.

    Raises:
        ValueError: If it is another network.
    """
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        from hawq.attention import project_attention  # noqa: PLC0415  so that the page stands alone

        project_attention(model)
    counters = {n: t for n, t in model.state_dict().items() if n.endswith("num_batches_tracked")}
    try:
        model.load_state_dict(counters | packed.state)
        layers = {name: model.get_submodule(name) for name in packed.reads}
    except (RuntimeError, AttributeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(
            f"the network must be the one that was packed, got another: {told}"
        ) from error
    roundings = [Rounding(tensor) for tensor in packed.tensors]
    for name, calls in packed.reads.items():
        own = [nn.Identity() if i is None else roundings[i] for i in calls]
        layer = layers[name]
        layer.add_module("input_rounding", _Calls(own))
        layer.register_forward_pre_hook(_round_input)
    return model.eval()


class _Calls(nn.ModuleList):
    """The roundings of what a layer reads, one for each of its calls in a forward pass."""

    turn = 0

    def forward(self, x: Tensor) -> Tensor:
        """Round what this call reads."""
        rounded: Tensor = self[self.turn](x)
        self.turn = (self.turn + 1) % len(self)
        return rounded


class _Stream:
    """What is read of a file so far."""

    def __init__(self, codes: bytes, floats: Floats) -> None:
        self._bits = np.unpackbits(np.frombuffer(codes, np.uint8), bitorder="little")
        self._floats = floats
        self._bit = self._float = 0

    def integers(self, count: int, width: int) -> Integers:
        """Return the next integers, shape (count,), of ``width`` bits each."""
        bits = self._bits[self._bit : self._bit + count * width].reshape(count, width)
        self._bit += -(-count * width // 8) * 8
        powers = 2 ** np.arange(width)
        return bits.astype(np.int64) @ powers

    def floats(self, count: int) -> Floats:
        """Return the next floats, shape (count,)."""
        self._float += count
        return self._floats[self._float - count : self._float].copy()


def _weight(entry: Mapping[str, Any], stream: _Stream) -> QuantizedWeight:
    shape: list[int] = entry["shape"]
    widths = _widths(entry["bits"], shape[0], stream)
    scale, zero_point = _ranges(entry, widths, stream)
    codes = np.zeros((shape[0], int(np.prod(shape[1:], dtype=int))), np.int64)
    for own, width in _by_width(widths):
        codes[own] = stream.integers(codes[own].size, width).reshape(codes[own].shape)
    return QuantizedWeight(
        tuple(entry["names"]),
        entry["form"],
        widths,
        codes.reshape(shape),
        scale,
        zero_point,
        entry.get("transposed_groups", 0),
    )


def _tensor(entry: Mapping[str, Any], stream: _Stream) -> QuantizedTensor:
    widths = _widths(entry["bits"], entry["channels"], stream)
    scale, zero_point = _ranges(entry, widths, stream)
    return QuantizedTensor(entry["name"], entry["form"], widths, scale, zero_point, entry["axis"])


def _widths(bits: int | list[int], count: int, stream: _Stream) -> Integers:
    if isinstance(bits, int):
        return np.full(count, bits)
    return np.array(bits)[stream.integers(count, (len(bits) - 1).bit_length())]


def _ranges(entry: Mapping[str, Any], widths: Integers, stream: _Stream) -> tuple[Floats, Integers]:
    count = entry["scales"]
    found = stream.floats(count)
    zeros = stream.integers(count, 8) if entry["form"] == "asymmetric" else np.zeros(count, int)
    if count == np.sum(widths > 0) and entry["form"] != "dorefa":
        # A channel that is pruned has none; any will do.
        scale, zero_point = np.ones(len(widths), np.float32), np.zeros(len(widths), int)
        scale[widths > 0], zero_point[widths > 0] = found, zeros
        return scale, zero_point
    return found, zeros


def _by_width(widths: Integers) -> Iterator[tuple[NDArray[np.bool_], int]]:
    """Tell which channels have each width, those without bits left out."""
    for width in np.unique(widths[widths > 0]).tolist():
        yield widths == width, width


def _lines(
    form: Form, widths: Integers, zero_point: Integers
) -> tuple[Floats, Floats, Floats, Floats]:
    """Return least and largest k, step and offset of the codes q = step·k + offset."""
    top = 2.0**widths - 1
    low = {"symmetric": -(2.0 ** (widths - 1)), "unsigned": 0 * top, "asymmetric": -zero_point}[
        form
    ]
    low = np.where(widths > 0, low, 0)
    odd = (form == "symmetric") & ((widths == 1) | (widths == 2))
    found = (low, low + top, 1 + odd, odd)
    return tuple(np.asarray(x, np.float32) for x in found)  # type: ignore[return-value]


def _round_input(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rounding = layer.input_rounding
    assert isinstance(rounding, nn.Module)
    return (rounding(args[0]), *args[1:])
