"""How a network calls its layers: the shapes that decide how long each call takes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hawq.channels import TransposedConvolution
from hawq.space import evaluating, sharing_layers

__all__ = ["LayerCall", "layer_shapes", "uncalled"]

_Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | TransposedConvolution


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a convolution or a linear layer, with a whole batch.

    Attributes:
        weight: Shape of the weight: (O, C / groups, K…), or (O, C) of a linear layer; of a
            transposed convolution (C, O / groups, K…).
        input: Shape of what it reads: (N, C, …); a linear layer's rows are folded, (N, C).
        output: Shape of what it writes, (N, O, …).
        stride: One for each spatial dimension; empty of a linear layer, as the next two.
        pads: Zeros before each spatial dimension, then behind each.
        dilation: One for each spatial dimension.
        groups: Of the channels.
        output_pads: Of a transposed convolution: added behind each spatial dimension of its output;
            None of any other layer.
    """

    weight: tuple[int, ...]
    input: tuple[int, ...]
    output: tuple[int, ...]
    stride: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    output_pads: tuple[int, ...] | None = None

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer's."""
        return len(self.weight) == 2

    @property
    def is_transposed(self) -> bool:
        """Whether it is a transposed convolution's."""
        return self.output_pads is not None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole batch."""
        met = self.input if self.is_transposed else self.output
        return math.prod(self.weight[1:]) * math.prod(met)


def layer_shapes(model: nn.Module, inputs: Tensor) -> dict[str, tuple[LayerCall, ...]]:
    """Run a network once, in eval mode, and record how it calls its quantizable layers.

    Args:
        model: The network.
        inputs: What it takes, shape (N, …).

    Returns:
        The calls of each layer in their order, of those that share a weight together, under the
        names of ``hawq.space.quantizable_layers``. A layer has none if its module is never
        called, even where the network reads its weight. Embeddings, which multiply nothing, are
        left out.
    """
    layers = {
        name: sharers
        for name, sharers in sharing_layers(model).items()
        if not isinstance(sharers[0], nn.Embedding)
    }
    calls: dict[str, list[LayerCall]] = {name: [] for name in layers}
    handles = [
        layer.register_forward_hook(_recorder(calls[name]), with_kwargs=True)
        for name, sharers in layers.items()
        for layer in sharers
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: tuple(seen) for name, seen in calls.items()}


def uncalled(calls: Mapping[str, Sequence[LayerCall]]) -> list[str]:
    """Return a note that names the layers without calls, or nothing."""
    silent = [layer for layer in calls if not calls[layer]]
    names = ", ".join(silent)
    return [f"Never called as modules, hence not in the table: {names}."] if silent else []


def _recorder(calls: list[LayerCall]) -> Callable[..., None]:
    def record(
        layer: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        read: Tensor = args[0] if args else kwargs["input"]
        if isinstance(layer, nn.Linear):
            calls.append(_linear_call(layer, read))
        else:
            assert isinstance(layer, _Convolution)
            calls.append(_convolution_call(layer, read, output))

    return record


def _linear_call(layer: nn.Linear, read: Tensor) -> LayerCall:
    out_features, in_features = layer.weight.shape
    rows = read.numel() // in_features
    return LayerCall((out_features, in_features), (rows, in_features), (rows, out_features))


def _convolution_call(layer: _Convolution, read: Tensor, output: Tensor) -> LayerCall:
    if read.ndim < layer.weight.ndim:  # one example without a batch
        read, output = read[None], output[None]
    pads, shape = _pads(layer), tuple(read.shape)
    if layer.padding_mode != "zeros":  # the layer then convolves a padded copy
        before, behind = pads[: len(pads) // 2], pads[len(pads) // 2 :]
        grown = (sum(sides) for sides in zip(shape[2:], before, behind, strict=True))
        shape, pads = (*shape[:2], *grown), (0,) * len(pads)
    return LayerCall(
        tuple(layer.weight.shape),
        shape,
        tuple(output.shape),
        tuple(layer.stride),
        pads,
        tuple(layer.dilation),
        layer.groups,
        _output_pads(layer, read, output),
    )


def _pads(layer: _Convolution) -> tuple[int, ...]:
    if not isinstance(layer.padding, str):
        return (*layer.padding, *layer.padding)
    if layer.padding == "valid":
        return (0,) * (2 * len(layer.kernel_size))
    # "same": an odd one goes behind.
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return (*(t // 2 for t in total), *(t - t // 2 for t in total))


def _output_pads(layer: _Convolution, read: Tensor, output: Tensor) -> tuple[int, ...] | None:
    """Return what the output has beyond the least, which a call may choose for itself."""
    if not isinstance(layer, TransposedConvolution):
        return None
    sides = zip(
        read.shape[2:],
        output.shape[2:],
        layer.stride,
        _pads(layer),
        layer.dilation,
        layer.kernel_size,
        strict=False,  # pads come twice
    )
    return tuple(o - ((i - 1) * s - 2 * p + d * (k - 1) + 1) for i, o, s, p, d, k in sides)
