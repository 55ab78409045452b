"""Fake quantization attached to any network, and detached again to the exact original.

A weight is quantized by a parametrization, a layer's input by a pre-hook; the network's own code
is not touched. Scales are learned (LSQ, Esser et al., 2020): with codes q = clamp(round(x/s)) the
gradient of s is Σ g·(q − x/s) inside the range and Σ g·q outside, divided by √(n·q_max); the
gradient of x passes straight through inside the range. Weights start at the ranges of least
squared error, the same that Ω was computed with; activations are calibrated on a few batches.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hawq.quantizers import best_scales, codes, quantize
from hawq.space import evaluating, quantizable_layers

__all__ = ["ActivationQuantizer", "WeightQuantizer", "attach", "calibrate", "detach"]

# Calibration looks at this many values a batch and layer, spread evenly.
_CALIBRATION_VALUES = 1 << 15


class WeightQuantizer(nn.Module):
    """Quantize a weight, one learned scale an output channel.

    Args:
        weight: Gives the starting scales, output channels first.
        bits: 1..8.
    """

    scale: nn.Parameter

    def __init__(self, weight: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = bits
        scales = best_scales(weight.detach().flatten(1), bits)
        self.scale = nn.Parameter(scales.view(-1, *[1] * (weight.ndim - 1)))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight's quantized values, same shape."""
        low, high = codes(self.bits)
        result: Tensor = _LearnedStep.apply(weight, self.scale, low, high, self.bits == 1)
        return result


class ActivationQuantizer(nn.Module):
    """Quantize an activation tensor with one learned scale; passes through until calibrated.

    Args:
        bits: 1..8.
    """

    scale: nn.Parameter
    calibrated: Tensor
    signed: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("signed", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tensor's quantized values, same shape."""
        if not self.calibrated:
            return x
        signed = bool(self.signed)
        low, high = codes(self.bits, signed=signed)
        result: Tensor = _LearnedStep.apply(x, self.scale, low, high, signed and self.bits == 1)
        return result

    def calibrate(self, values: Tensor) -> None:
        """Set the range of least squared error over a sample of values, any shape."""
        signed = bool((values < 0).any())
        with torch.no_grad():
            self.scale.copy_(best_scales(values.reshape(1, -1), self.bits, signed=signed)[0, 0])
            self.signed.fill_(signed)
            self.calibrated.fill_(True)


class _LearnedStep(torch.autograd.Function):
    """Fake quantization with LSQ's gradient for the scale, in one node of the graph."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, binary: bool
    ) -> Tensor:
        scale = scale.clamp_min(1e-12)
        ctx.save_for_backward(x, scale)
        ctx.codes = (low, high, binary)
        if binary:
            return quantize(x, scale, 1)
        return x.div(scale).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        low, high, binary = ctx.codes
        ratio = x / scale
        inside = (ratio >= low) & (ratio <= high)
        if binary:
            slope = torch.where(x < 0, -1.0, 1.0)
        else:
            slope = torch.clamp(ratio.round(), low, high)
            slope = torch.where(inside, slope - ratio, slope)
        slope.mul_(grad)
        per_scale = x.numel() // scale.numel()
        grad_scale = _sum_to(slope, scale.shape) / (per_scale * high) ** 0.5
        return grad * inside, grad_scale, None, None, None


def attach(
    model: nn.Module,
    weight_bits: Mapping[str, int],
    *,
    activation_bits: int | None = None,
    input_bits: int = 8,
    example: Tensor | None = None,
) -> None:
    """Quantize a network's layers in place.

    Args:
        model: The network.
        weight_bits: Layer name to bits of its weight.
        activation_bits: Bits of every such layer's input; None leaves activations alone.
        input_bits: Bits of a layer's input where that is the network's own input: images have
            eight to begin with.
        example: A batch of the network's inputs, shape (N, …), which finds those layers.
            Needed when activations are quantized.

    Raises:
        ValueError: If a name is not a quantizable layer, or ``example`` is needed and missing.
    """
    layers = quantizable_layers(model)
    unknown = sorted(set(weight_bits) - set(layers))
    if unknown:
        raise ValueError(f"weight_bits must name quantizable layers, got {unknown[:5]}")
    if activation_bits is not None:
        if example is None:
            raise ValueError("example must be given to quantize activations, got None")
        first = _layers_at_the_input(model, {name: layers[name] for name in weight_bits}, example)
        for name in weight_bits:
            quantizer = ActivationQuantizer(input_bits if name in first else activation_bits)
            layers[name].add_module("input_quantizer", quantizer)
            handle = layers[name].register_forward_pre_hook(_quantize_input)
            layers[name].input_quantizer_handle = handle  # type: ignore[assignment]
    for name, bits in weight_bits.items():
        weight = layers[name].weight
        assert isinstance(weight, Tensor)
        parametrize.register_parametrization(layers[name], "weight", WeightQuantizer(weight, bits))


def calibrate(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set every activation range from batches of the network's inputs, each of shape (N, …).

    Layers see unquantized inputs meanwhile; the network runs in eval mode.
    """
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    samples: dict[ActivationQuantizer, list[Tensor]] = {q: [] for q in quantizers}

    def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, ActivationQuantizer)
        values = args[0].detach().flatten()
        stride = max(1, len(values) // _CALIBRATION_VALUES)
        samples[module].append(values[::stride].float())

    for quantizer in quantizers:
        quantizer.calibrated.fill_(False)
    handles = [quantizer.register_forward_pre_hook(collect) for quantizer in quantizers]
    try:
        with torch.no_grad(), evaluating(model):
            for batch in inputs:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    for quantizer, seen in samples.items():
        if seen:  # a layer that never runs has nothing to calibrate
            quantizer.calibrate(torch.cat(seen))


def detach(model: nn.Module) -> None:
    """Remove every quantizer; weights are again the ones that training moved, bit for bit."""
    for layer in quantizable_layers(model).values():
        if parametrize.is_parametrized(layer, "weight"):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        if "input_quantizer" in layer._modules:
            layer.input_quantizer_handle.remove()  # type: ignore[operator, union-attr]
            del layer.input_quantizer, layer.input_quantizer_handle


def _quantize_input(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, ActivationQuantizer)
    return (quantizer(args[0]), *args[1:])


def _layers_at_the_input(
    model: nn.Module, layers: Mapping[str, nn.Module], example: Tensor
) -> set[str]:
    found = set()
    names = {id(layer): name for name, layer in layers.items()}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0] is example:
            found.add(names[id(module)])

    handles = [layer.register_forward_pre_hook(look) for layer in layers.values()]
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    if not shape:
        return x.sum()
    return x.flatten(1).sum(1).view(shape) if len(shape) > 1 else x.sum()
