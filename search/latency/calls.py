"""How a network calls its layers: the shapes that decide how long each call takes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hawq.space import evaluating, sharing_layers

__all__ = ["LayerCall", "layer_shapes", "uncalled"]


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a convolution or a linear layer, with a whole batch.

    Attributes:
        weight: Shape of the weight: (O, C / groups, K…), or (O, C) of a linear layer.
        input: Shape of what it reads: (N, C, …); a linear layer's rows are folded, (N, C).
        output: Shape of what it writes, (N, O, …).
        stride: One for each spatial dimension; empty of a linear layer, as the next two.
        pads: Zeros before each spatial dimension, then behind each.
        dilation: One for each spatial dimension.
        groups: Of the channels.
    """

    weight: tuple[int, ...]
    input: tuple[int, ...]
    output: tuple[int, ...]
    stride: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer's."""
        return len(self.weight) == 2

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole batch."""
        return math.prod(self.weight[1:]) * math.prod(self.output)


def layer_shapes(model: nn.Module, inputs: Tensor) -> dict[str, tuple[LayerCall, ...]]:
    """Run a network once, in eval mode, and record how it calls its quantizable layers.

    Args:
        model: The network.
        inputs: What it takes, shape (N, …).

    Returns:
        The calls of each layer in their order, of those that share a weight together, under the
        names of ``hawq.space.quantizable_layers``. A layer has none if its module is never
        called, even where the network reads its weight.
    """
    layers = sharing_layers(model)
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
            assert isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
            calls.append(_convolution_call(layer, read, output))

    return record


def _linear_call(layer: nn.Linear, read: Tensor) -> LayerCall:
    out_features, in_features = layer.weight.shape
    rows = read.numel() // in_features
    return LayerCall((out_features, in_features), (rows, in_features), (rows, out_features))


def _convolution_call(
    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, read: Tensor, output: Tensor
) -> LayerCall:
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
    )


def _pads(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> tuple[int, ...]:
    if not isinstance(layer.padding, str):
        return (*layer.padding, *layer.padding)
    if layer.padding == "valid":
        return (0,) * (2 * len(layer.kernel_size))
    # "same": an odd one goes behind.
    total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return (*(t // 2 for t in total), *(t - t // 2 for t in total))
