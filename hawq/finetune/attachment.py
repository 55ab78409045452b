"""Fake quantizers attached to any network, and detached again to the exact original.

A weight is quantized by a parametrization, what a layer reads by a pre-hook; the network's own code
is not touched. An activation is a tensor: layers that read the same one share its quantizer, and a
layer that runs several times has one for each call.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hawq.allocation import Bits, by_owner
from hawq.channels import num_channels, transposed_groups
from hawq.finetune.fake_quantizers import ActivationQuantizer, WeightQuantizer
from hawq.quantizers import Scheme, Schemes
from hawq.reads import Reads, channel_axis, read_network
from hawq.space import sharing_layers

__all__ = ["attach", "detach", "fixed_activations", "zeroed_layers"]


class _Calls(nn.ModuleList):
    """The quantizers of a layer that runs several times in a forward pass, in order."""

    turn = 0

    def forward(self, x: Tensor) -> Tensor:
        """Quantize what this call reads."""
        quantizer = self[self.turn % len(self)]
        self.turn += 1
        result: Tensor = quantizer(x)
        return result


def attach(
    model: nn.Module,
    bits: Mapping[str, int],
    example: Tensor | None = None,
    schemes: Schemes | None = None,
) -> None:
    """Quantize a network's layers, and what they read, in place.

    Args:
        model: The network.
        bits: Of groups by name, as an allocation has them: ``w:LAYER`` and ``a:LAYER#i``, or
            their channels ``w:LAYER[c]`` and ``a:LAYER#i[c]``. What is not named is left alone.
        example: A batch of the network's inputs, shape (N, …), which tells who reads what.
            Needed when activations are quantized.
        schemes: How weights and activations are quantized; None for learned scales that begin at
            the least squared error.

    Raises:
        ValueError: If a name is not a quantizable layer or an activation, the channels are not
            all named, the network is quantized already, or ``example`` is needed and missing.
    """
    schemes = schemes or Schemes()
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
        quantizers = _activation_quantizers(
            model, tensors, reads := read_network(model, example), schemes.activations
        )
        _attach_to_activations(model, quantizers, reads, example.device)
    for name, width in weights.items():
        weight = _weight(layers[name][0])
        _check_channels(f"w:{name}", width, num_channels(layers[name][0]))
        groups = transposed_groups(layers[name][0])
        shared = WeightQuantizer(weight, width, schemes.weights, groups)
        for module in _holders(model, layers[name]):
            parametrize.register_parametrization(module, "weight", shared)


@torch.no_grad()
def zeroed_layers(model: nn.Module) -> list[str]:
    """Name the layers whose quantized weight is zero everywhere: what they compute is lost."""
    return [
        name
        for name, sharers in sharing_layers(model).items()
        if parametrize.is_parametrized(sharers[0], "weight") and not torch.any(_weight(sharers[0]))
    ]


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


def detach(model: nn.Module) -> None:
    """Remove every quantizer; weights are again the ones that training moved, bit for bit."""
    for module in list(model.modules()):
        if _is_quantized(module):
            # Torch is about to edit the module's class, which copies of the network share.
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            # It came back behind the bias; optimizers go by the order of parameters.
            for name in [name for name in module._parameters if name != "weight"]:
                module._parameters[name] = module._parameters.pop(name)
        if hasattr(module, "input_quantizer"):
            _remove_hook(module, _quantize_input)
            del module.input_quantizer
    _remove_hook(model, _start_over)


def _activation_quantizers(
    model: nn.Module, bits: Mapping[str, Bits], reads: Reads, scheme: Scheme
) -> dict[str, ActivationQuantizer]:
    """Make the quantizer of each tensor that is named."""
    tensors = {tensor.name: tensor for tensor in reads.activations}
    unknown = sorted(set(bits) - set(tensors))
    if unknown:
        raise ValueError(
            f"bits must name activations that a layer reads, as a:LAYER#i, got {unknown[:5]}"
        )
    found: dict[str, ActivationQuantizer] = {}
    for read in reads.reads:
        name = read.activation
        if name in bits and name not in found:
            num_channels = tensors[name].num_channels
            _check_channels(f"a:{name}", bits[name], num_channels)
            axis = channel_axis(model.get_submodule(read.module))
            found[name] = ActivationQuantizer(bits[name], name, axis, scheme, num_channels)
    return found


def _attach_to_activations(
    model: nn.Module,
    quantizers: Mapping[str, ActivationQuantizer],
    reads: Reads,
    device: torch.device,
) -> None:
    calls: dict[str, list[nn.Module]] = {}
    for read in reads.reads:
        quantizer = quantizers.get(read.activation)
        calls.setdefault(read.module, []).append(
            nn.Identity() if quantizer is None else quantizer.to(device)
        )
    for name, of_calls in calls.items():
        if all(isinstance(quantizer, nn.Identity) for quantizer in of_calls):
            continue
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(_quantize_input)
        layer.add_module("input_quantizer", of_calls[0] if len(of_calls) == 1 else _Calls(of_calls))
    if any(isinstance(module, _Calls) for module in model.modules()):
        model.register_forward_pre_hook(_start_over)


def _holders(model: nn.Module, sharers: Sequence[nn.Module]) -> list[nn.Module]:
    """Add to layers what else has their weight: an embedding that is tied to one, say."""
    weight = sharers[0]._parameters.get("weight")
    others = [
        m for m in model.modules() if weight is not None and m._parameters.get("weight") is weight
    ]
    return list(dict.fromkeys([*sharers, *others]))


def _is_quantized(module: nn.Module) -> bool:
    if not parametrize.is_parametrized(module, "weight"):
        return False
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    return any(isinstance(m, WeightQuantizer) for m in parametrizations["weight"].modules())


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _check_channels(name: str, bits: Bits, num_channels: int) -> None:
    if not isinstance(bits, int) and len(bits) != num_channels:
        raise ValueError(f"{name} must have bits for {num_channels} channels, got {len(bits)}")


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
