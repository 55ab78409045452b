"""Fake quantization attached to any network, and detached again to the exact original.

A weight is quantized by a parametrization, what a layer reads by a pre-hook; the network's own code
is not touched. Scales are learned (LSQ, Esser et al., 2020): with codes q = clamp(round(x/s)) the
gradient of s is Σ g·(q − x/s) inside the range and Σ g·q outside, divided by √(n·q_max); the
gradient of x passes straight through inside the range. Weights start at the ranges of least
squared error, the same that Ω was computed with; activations are calibrated on a few batches.

An activation is a tensor: layers that read the same one share its quantizer, and a layer that runs
several times has one for each call.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hawq.allocation import Bits, by_owner
from hawq.quantizers import best_scales, codes, has_odd_codes, nearest_codes
from hawq.reads import Reads, channel_axis, read_network
from hawq.space import evaluating, sharing_layers

__all__ = [
    "ActivationQuantizer",
    "WeightQuantizer",
    "attach",
    "calibrate",
    "detach",
    "fixed_activations",
    "sample_activations",
]

# Calibration looks at this many values a batch and tensor, spread evenly.
_CALIBRATION_VALUES = 1 << 15
_SMALLEST = 1e-12


class WeightQuantizer(nn.Module):
    """Quantize a weight, one learned scale an output channel.

    Args:
        weight: Gives the starting scales, output channels first, shape (C, …).
        bits: 1..8, or one for each output channel, 0..8.
    """

    scale: nn.Parameter

    def __init__(self, weight: Tensor, bits: Bits) -> None:
        super().__init__()
        self.bits = bits
        self.codes = _Codes.of(bits, signed=True)
        shape = (-1, *[1] * (weight.ndim - 1))
        self.scale = nn.Parameter(_scales(weight.detach().flatten(1), bits).view(shape))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight's quantized values, same shape."""
        result: Tensor = _LearnedStep.apply(weight, self.scale, self.codes)
        return result


class ActivationQuantizer(nn.Module):
    """Quantize an activation tensor; passes through until calibrated.

    Args:
        bits: 1..8 for the tensor, with one learned scale; or one for each channel, 0..8, with a
            scale for each.
        name: Of the tensor.
        axis: Of its channels.
    """

    scale: nn.Parameter
    calibrated: Tensor
    signed: Tensor

    def __init__(self, bits: Bits, name: str = "", axis: int = 1) -> None:
        super().__init__()
        self.bits, self.name, self.axis = bits, name, axis
        self.scale = nn.Parameter(torch.ones(() if isinstance(bits, int) else len(bits)))
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("signed", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the tensor's quantized values, same shape."""
        if not self.calibrated:
            return x
        scale: Tensor = self.scale
        if scale.ndim:
            axis = self.axis % x.ndim
            scale = scale.view(*[1] * axis, -1, *[1] * (x.ndim - 1 - axis))
        codes_ = _Codes.of(self.bits, signed=bool(self.signed))
        result: Tensor = _LearnedStep.apply(x, scale, codes_)
        return result

    def rows(self, x: Tensor) -> Tensor:
        """Return values of which each row gets a scale, shape (1, n) or (C, n)."""
        return x.movedim(self.axis, 0).flatten(1) if self.scale.ndim else x.reshape(1, -1)

    def calibrate(self, values: Tensor) -> None:
        """Set the ranges of least squared error over a sample of values.

        Args:
            values: Any shape for a tensor; for channels their ``rows``, shape (C, n).
        """
        signed = bool((values < 0).any())
        with torch.no_grad():
            rows = values if self.scale.ndim else values.reshape(1, -1)
            self.scale.copy_(_scales(rows, self.bits, signed=signed).view(self.scale.shape))
            self.signed.fill_(signed)
            self.calibrated.fill_(True)


class _Calls(nn.ModuleList):
    """The quantizers of a layer that runs several times in a forward pass, in order."""

    turn = 0

    def forward(self, x: Tensor) -> Tensor:
        """Quantize what this call reads."""
        quantizer = self[self.turn % len(self)]
        self.turn += 1
        result: Tensor = quantizer(x)
        return result


class _Codes:
    """Integer codes of one width, or of each row's own.

    Attributes:
        low: The least code, a number or shape (C,).
        high: The largest.
        odd: Whether codes are odd; shape (C,) where rows differ.
    """

    __slots__ = ("high", "low", "odd")

    def __init__(self, low: int | Tensor, high: int | Tensor, odd: bool | Tensor) -> None:
        self.low, self.high, self.odd = low, high, odd

    @staticmethod
    def of(bits: Bits, *, signed: bool) -> "_Codes":
        """Return the codes of one width, or of several rows."""
        if isinstance(bits, int):
            return _Codes(*codes(bits, signed=signed), signed and has_odd_codes(bits))
        ends = torch.tensor([codes(b, signed=signed) for b in bits], dtype=torch.float32)
        odd = torch.tensor([signed and has_odd_codes(b) for b in bits])
        return _Codes(ends[:, 0], ends[:, 1], odd if odd.any() else False)

    def like(self, scale: Tensor) -> "_Codes":
        """Return the same in the shape, type and place of the scales."""
        if isinstance(self.low, int):
            return self
        assert isinstance(self.high, Tensor)
        odd = self.odd
        if isinstance(odd, Tensor):
            odd = odd.to(scale.device).view(scale.shape)
        low, high = (ends.to(scale).view(scale.shape) for ends in (self.low, self.high))
        return _Codes(low, high, odd)


class _LearnedStep(torch.autograd.Function):
    """Fake quantization with LSQ's gradient for the scale, in one node of the graph.

    Written in place: activations are the largest tensors there are, and a pass over memory is
    what a step of training pays for.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, of: _Codes) -> Tensor:
        scale = scale.clamp_min(_SMALLEST)
        of = of.like(scale)
        ctx.save_for_backward(x, scale)
        ctx.codes = of
        return nearest_codes(x / scale, of.low, of.high, odd=of.odd).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        of: _Codes = ctx.codes
        ratio = x / scale
        clamped = ratio.clamp(of.low, of.high)
        outside = clamped.ne(ratio)
        # q − x/s inside, q outside
        slope = nearest_codes(clamped, of.low, of.high, odd=of.odd)
        slope = slope.sub_(ratio.masked_fill_(outside, 0))
        if scale.numel() == 1:
            grad_scale = slope.flatten().dot(grad.flatten()).view(scale.shape)
        else:
            grad_scale = (slope * grad).sum_to_size(scale.shape)
        per_scale = x.numel() // scale.numel()
        # A channel without bits has the one code 0, and no gradient.
        high = of.high.clamp_min(1) if isinstance(of.high, Tensor) else of.high
        return grad.masked_fill(outside, 0), grad_scale / (per_scale * high) ** 0.5, None


def attach(model: nn.Module, bits: Mapping[str, int], example: Tensor | None = None) -> None:
    """Quantize a network's layers, and what they read, in place.

    Args:
        model: The network.
        bits: Of groups by name, as an allocation has them: ``w:LAYER`` and ``a:LAYER#i``, or
            their channels ``w:LAYER[c]`` and ``a:LAYER#i[c]``. What is not named is left alone.
        example: A batch of the network's inputs, shape (N, …), which tells who reads what.
            Needed when activations are quantized.

    Raises:
        ValueError: If a name is not a quantizable layer or an activation, the channels are not
            all named, the network is quantized already, or ``example`` is needed and missing.
    """
    layers = sharing_layers(model)
    gathered = by_owner(bits)
    weights = {name[2:]: b for name, b in gathered.items() if name.startswith("w:")}
    tensors = {name[2:]: b for name, b in gathered.items() if name.startswith("a:")}
    unknown = sorted(set(weights) - set(layers))
    if unknown or len(weights) + len(tensors) < len(gathered):
        raise ValueError(f"bits must name quantizable layers as w:LAYER, got {unknown[:5]}")
    if any(isinstance(m, WeightQuantizer | ActivationQuantizer) for m in model.modules()):
        raise ValueError("the network must be detached before it is quantized again")
    if tensors and example is None:
        raise ValueError("example must be given to quantize activations, got None")
    if example is not None and tensors:
        _attach_to_activations(model, tensors, read_network(model, example), example.device)
    for name, width in weights.items():
        weight = layers[name][0].weight
        assert isinstance(weight, Tensor)
        _check_channels(f"w:{name}", width, len(weight))
        shared = WeightQuantizer(weight, width)
        for layer in layers[name]:
            parametrize.register_parametrization(layer, "weight", shared)


def fixed_activations(
    reads: Reads, bits: int | None, input_bits: int | None, layers: Iterable[str] | None = None
) -> dict[str, int]:
    """Give every activation the same bits, as ``attach`` takes them.

    Args:
        reads: The network's tensors.
        bits: Of each; None leaves them alone.
        input_bits: Of the network's own input: images have eight to begin with.
        layers: Only what these layers read; None for all.
    """
    chosen = set(layers) if layers is not None else {layer.name for layer in reads.layers}
    read = {r.activation for r in reads.reads if r.layer in chosen}
    given = {
        f"a:{tensor.name}": input_bits if tensor.is_input else bits
        for tensor in reads.activations
        if tensor.name in read
    }
    return {name: b for name, b in given.items() if b is not None} if bits is not None else {}


@torch.no_grad()
def sample_activations(model: nn.Module, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Sample the values of every quantized activation, unquantized meanwhile, in eval mode.

    Args:
        model: With quantizers attached.
        inputs: Batches of the network's inputs, each of shape (N, …).

    Returns:
        By the tensor's name, shape (1, n), or (C, n) where its channels have their own bits. A
        tensor that nothing read is missing.
    """
    samples: dict[ActivationQuantizer, list[Tensor]] = {}
    num_batches = 0
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]

    def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, ActivationQuantizer)
        seen = samples.setdefault(module, [])
        if len(seen) == num_batches:  # another reader of the same tensor
            return
        values = module.rows(args[0].detach())
        size = max(1, _CALIBRATION_VALUES // len(values))
        if values.shape[1] > size:
            # At random: a fixed stride would meet the same few columns of every image.
            generator = torch.Generator().manual_seed(0)
            picks = torch.randint(values.shape[1], (size,), generator=generator)
            values = values[:, picks.to(values.device)]
        seen.append(values.float())

    for quantizer in quantizers:
        quantizer.calibrated.fill_(False)
    handles = [quantizer.register_forward_pre_hook(collect) for quantizer in quantizers]
    try:
        with evaluating(model):
            for batch in inputs:
                num_batches += 1
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {quantizer.name: torch.cat(seen, 1) for quantizer, seen in samples.items()}


def calibrate(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set every activation range from batches of the network's inputs, each of shape (N, …).

    Layers see unquantized inputs meanwhile; the network runs in eval mode. A tensor that nothing
    read stays uncalibrated.
    """
    samples = sample_activations(model, inputs)
    for quantizer in model.modules():
        if isinstance(quantizer, ActivationQuantizer) and quantizer.name in samples:
            quantizer.calibrate(samples[quantizer.name])


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
        if hasattr(layer, "input_quantizer"):
            _remove_hook(layer, _quantize_input)
            del layer.input_quantizer
    _remove_hook(model, _start_over)


def _attach_to_activations(
    model: nn.Module, bits: Mapping[str, Bits], reads: Reads, device: torch.device
) -> None:
    tensors = {tensor.name: tensor for tensor in reads.activations}
    unknown = sorted(set(bits) - set(tensors))
    if unknown:
        raise ValueError(
            f"bits must name activations that a layer reads, as a:LAYER#i, got {unknown[:5]}"
        )
    quantizers: dict[str, nn.Module] = {}
    calls: dict[str, list[nn.Module]] = {}
    for read in reads.reads:
        name = read.activation
        if name in bits and name not in quantizers:
            _check_channels(f"a:{name}", bits[name], tensors[name].num_channels)
            axis = channel_axis(model.get_submodule(read.module))
            quantizers[name] = ActivationQuantizer(bits[name], name, axis).to(device)
        calls.setdefault(read.module, []).append(quantizers.get(name) or nn.Identity())
    for name, of_calls in calls.items():
        if all(isinstance(quantizer, nn.Identity) for quantizer in of_calls):
            continue
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(_quantize_input)
        layer.add_module("input_quantizer", of_calls[0] if len(of_calls) == 1 else _Calls(of_calls))
    if any(isinstance(module, _Calls) for module in model.modules()):
        model.register_forward_pre_hook(_start_over)


def _check_channels(name: str, bits: Bits, num_channels: int) -> None:
    if not isinstance(bits, int) and len(bits) != num_channels:
        raise ValueError(f"{name} must have bits for {num_channels} channels, got {len(bits)}")


def _scales(rows: Tensor, bits: Bits, *, signed: bool = True) -> Tensor:
    """Find the best scale of each row, shape (C, 1), at one width or at each row's own."""
    if isinstance(bits, int):
        return best_scales(rows, bits, signed=signed)
    scales = torch.ones_like(rows[:, :1])
    widths = torch.tensor(bits, device=rows.device)
    for width in widths.unique().tolist():
        scales[widths == width] = best_scales(rows[widths == width], width, signed=signed)
    return scales


def _quantize_input(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    quantizer = layer.input_quantizer
    assert isinstance(quantizer, nn.Module)
    return (quantizer(args[0]), *args[1:])


def _start_over(model: nn.Module, _: tuple[Any, ...]) -> None:
    for module in model.modules():
        if isinstance(module, _Calls):
            module.turn = 0


def _remove_hook(module: nn.Module, hook: object) -> None:
    """Remove one of ours, which is found in a copy of a network as well."""
    for key, found in list(module._forward_pre_hooks.items()):
        if found is hook:
            del module._forward_pre_hooks[key]
