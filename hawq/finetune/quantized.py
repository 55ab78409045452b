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
from torch.utils.hooks import RemovableHandle

from hawq.quantizers import best_scales, codes, quantize
from hawq.space import evaluating, sharing_layers

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
        result: Tensor = _LearnedStep.apply(weight, self.scale, self.bits, True)
        return result


class ActivationQuantizer(nn.Module):
    """Quantize an activation tensor with one learned scale; passes through until calibrated.

    Args:
        bits: 1..8.
    """

    scale: nn.Parameter
    calibrated: Tensor
    signed: Tensor
    hook: RemovableHandle

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
        result: Tensor = _LearnedStep.apply(x, self.scale, self.bits, bool(self.signed))
        return result

    def calibrate(self, values: Tensor) -> None:
        """Set the range of least squared error over a sample of values, any shape."""
        signed = bool((values < 0).any())
        with torch.no_grad():
            self.scale.copy_(best_scales(values.reshape(1, -1), self.bits, signed=signed)[0, 0])
            self.signed.fill_(signed)
            self.calibrated.fill_(True)


class _LearnedStep(torch.autograd.Function):
    """Fake quantization with LSQ's gradient for the scale, in one node of the graph.

    Written in place: activations are the largest tensors there are, and a pass over memory is
    what a step of training pays for.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
        scale = scale.clamp_min(1e-12)
        ctx.save_for_backward(x, scale)
        ctx.bits, ctx.signed = bits, signed
        if signed and bits == 1:
            return quantize(x, scale, bits)
        low, high = codes(bits, signed=signed)
        return x.div(scale).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        low, high = codes(ctx.bits, signed=ctx.signed)
        ratio = x / scale
        clamped = ratio.clamp(low, high)
        outside = clamped.ne(ratio)
        if ctx.signed and ctx.bits == 1:
            slope = torch.where(x < 0, -1.0, 1.0).to(grad)
        else:  # q − x/s inside, q outside
            slope = clamped.round_().sub_(ratio.masked_fill_(outside, 0))
        if scale.numel() == 1:
            grad_scale = slope.flatten().dot(grad.flatten()).view(scale.shape)
        else:
            grad_scale = (slope * grad).sum_to_size(scale.shape)
        per_scale = x.numel() // scale.numel()
        return grad.masked_fill(outside, 0), grad_scale / (per_scale * high) ** 0.5, None, None


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
        ValueError: If a name is not a quantizable layer, the network is quantized already, or
            ``example`` is needed and missing.
    """
    layers = sharing_layers(model)
    unknown = sorted(set(weight_bits) - set(layers))
    if unknown:
        raise ValueError(f"weight_bits must name quantizable layers, got {unknown[:5]}")
    if any(isinstance(module, WeightQuantizer) for module in model.modules()):
        raise ValueError("the network must be detached before it is quantized again")
    if activation_bits is not None:
        if example is None:
            raise ValueError("example must be given to quantize activations, got None")
        chosen = [layer for name in weight_bits for layer in layers[name]]
        first = _layers_at_the_input(model, chosen, example)
        for layer in chosen:
            quantizer = ActivationQuantizer(input_bits if layer in first else activation_bits)
            quantizer.to(example.device)
            quantizer.hook = layer.register_forward_pre_hook(_quantize_input)
            layer.add_module("input_quantizer", quantizer)
    for name, bits in weight_bits.items():
        weight = layers[name][0].weight
        assert isinstance(weight, Tensor)
        shared = WeightQuantizer(weight, bits)
        for layer in layers[name]:
            parametrize.register_parametrization(layer, "weight", shared)


def calibrate(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set every activation range from batches of the network's inputs, each of shape (N, …).

    Layers see unquantized inputs meanwhile; the network runs in eval mode.
    """
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    samples: dict[ActivationQuantizer, list[Tensor]] = {q: [] for q in quantizers}

    def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, ActivationQuantizer)
        values = args[0].detach().flatten()
        if len(values) > _CALIBRATION_VALUES:
            # At random: a fixed stride would meet the same few columns of every image.
            generator = torch.Generator().manual_seed(0)
            picks = torch.randint(len(values), (_CALIBRATION_VALUES,), generator=generator)
            values = values[picks.to(values.device)]
        samples[module].append(values.float())

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
    for layer in [layer for sharers in sharing_layers(model).values() for layer in sharers]:
        if parametrize.is_parametrized(layer, "weight"):
            # Torch is about to edit the layer's class, which copies of the network share.
            shared = type(layer)
            layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
            # It came back behind the bias; optimizers go by the order of parameters.
            bias = layer.bias
            assert bias is None or isinstance(bias, nn.Parameter)
            del layer.bias
            layer.register_parameter("bias", bias)
        quantizer = getattr(layer, "input_quantizer", None)
        if isinstance(quantizer, ActivationQuantizer):
            quantizer.hook.remove()
            del layer.input_quantizer


def _quantize_input(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, ActivationQuantizer)
    return (quantizer(args[0]), *args[1:])


def _layers_at_the_input(
    model: nn.Module, layers: Iterable[nn.Module], example: Tensor
) -> set[nn.Module]:
    found = set()

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0] is example:
            found.add(module)

    handles = [layer.register_forward_pre_hook(look) for layer in layers]
    try:
        with torch.no_grad(), evaluating(model):
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    return found
