"""A network quantized in one way after another, each in a fraction of a forward pass.

What an allocation does to a weight or a range depends on that layer's or tensor's bits alone, so
both are made once and kept; where channels have bits of their own each is fitted by itself, so what
is kept is every channel at each width. Weights are assigned, bit for bit what ``attach`` makes of
them; ranges of activations come from the unquantized network, so that they need no pass over the
data of their own. (A trial calibrates them behind quantized weights.)
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from hawq.allocation import Bits, by_owner
from hawq.channels import channels_first, num_channels, transposed_groups
from hawq.finetune.attachment import attach, detach
from hawq.finetune.calibration import sample_activations
from hawq.finetune.fake_quantizers import ActivationQuantizer, WeightQuantizer
from hawq.quantizers import Schemes
from hawq.reads import read_network
from hawq.space import sharing_layers

__all__ = ["Requantized"]

Value = TypeVar("Value")


class Requantized:
    """Quantizes a network again and again, in place.

    Args:
        model: In floating point, on its device; quantized from the first ``quantize`` on.
        inputs: Makes the batches of inputs that ranges of activations come from, each of shape
            (N, …).
        schemes: How weights and activations are quantized; None as ``attach`` has it.
        memory_bytes: Of the quantized weights that are kept.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Callable[[], Iterable[Tensor]],
        schemes: Schemes | None = None,
        *,
        memory_bytes: int = 256 << 20,
    ) -> None:
        self.model = model
        self._inputs, self._schemes = inputs, schemes or Schemes()
        sharing = sharing_layers(model)
        self._weights = {name: _weight(of[0]) for name, of in sharing.items()}
        self._groups = {name: transposed_groups(of[0]) for name, of in sharing.items()}
        self._channels = {f"w:{name}": num_channels(of[0]) for name, of in sharing.items()}
        self._plain = [(t, t.detach().clone()) for t in [*self._weights.values(), *model.buffers()]]
        self._originals = {name: self._plain[i][1] for i, name in enumerate(self._weights)}
        self._kept_weights: _Kept[Tensor] = _Kept(memory_bytes)
        self._kept_ranges: _Kept[ActivationQuantizer] = _Kept(memory_bytes)
        self._samples: dict[tuple[str, bool], Tensor] = {}
        self._attached: Mapping[str, bool] = {}

    @torch.no_grad()
    def quantize(self, bits: Mapping[str, int]) -> None:
        """Quantize the network in this way, whatever it was before.

        Args:
            bits: Of weights and activations by name, as ``attach`` takes them; what is not named
                is in floating point.

        Raises:
            ValueError: If a name is neither a quantizable layer nor an activation, or channels are
                missing.
        """
        gathered = by_owner(bits)
        weights = {name: b for name, b in gathered.items() if name[:2] == "w:"}
        _check(weights, self._channels)
        self._restore()
        self._place({name: b for name, b in gathered.items() if name not in weights})
        for name, width in weights.items():
            self._weights[name[2:]].copy_(self._quantized(name[2:], width))

    def _restore(self) -> None:
        """Give weights and statistics back that were there before any quantization."""
        for tensor, plain in self._plain:
            tensor.copy_(plain)

    def _quantized(self, name: str, width: Bits) -> Tensor:
        found = self._kept_weights.get((name, width))
        if found is None:
            plain, groups = self._originals[name], self._groups[name]
            if _is_mixed(width):
                rows = channels_first(plain, groups).clone()
                for b, own in _channels(width).items():
                    whole = self._quantized(name, (b,) * len(rows))
                    rows[own] = channels_first(whole, groups)[own]
                return channels_first(rows, groups)
            found = WeightQuantizer(plain, width, self._schemes.weights, groups)(plain).detach()
            size = found.numel() * found.element_size()
            self._kept_weights.add((name, width), found, size)
        return found

    def _place(self, bits: Mapping[str, Bits]) -> None:
        """Put the quantizer of every tensor where it is read."""
        if _kinds(bits) != self._attached:
            self._attach(bits)
        for parent in list(self.model.modules()):
            for key, child in list(parent.named_children()):
                if isinstance(child, ActivationQuantizer):
                    width = bits[f"a:{child.name}"]
                    parent.register_module(key, self._ranged(child, width))

    def _attach(self, bits: Mapping[str, Bits]) -> None:
        """Let other tensors have quantizers; sample those that are new, unquantized."""
        detach(self.model)
        example = next(iter(self._inputs()))[:1]
        reads = read_network(self.model, example)
        _check(bits, {f"a:{tensor.name}": tensor.num_channels for tensor in reads.activations})
        flat = {
            full: b
            for name, width in bits.items()
            for full, b in (
                [(name, width)]
                if isinstance(width, int)
                else [(f"{name}[{c}]", b) for c, b in enumerate(width)]
            )
        }
        attach(self.model, flat, example, self._schemes)
        kinds = _kinds(bits)
        if any((name[2:], kind) not in self._samples for name, kind in kinds.items()):
            for name, values in sample_activations(self.model, self._inputs()).items():
                self._samples[name, kinds[f"a:{name}"]] = values
        self._attached = kinds

    def _ranged(self, like: ActivationQuantizer, width: Bits) -> ActivationQuantizer:
        found = self._kept_ranges.get((like.name, width))
        if found is None:
            channels = like.scale.numel() if like.scale.ndim else None
            found = ActivationQuantizer(width, like.name, like.axis, like.scheme, channels)
            found.to(like.scale.device).train(like.training)
            if _is_mixed(width):
                for b, own in _channels(width).items():
                    found.take(self._ranged(like, (b,) * len(found.scale)), own)
                return found
            values = self._samples.get((like.name, not isinstance(width, int)))
            if values is not None:  # else nothing read it: it passes through, as attach leaves it
                found.calibrate(values)
            self._kept_ranges.add((like.name, width), found, 256 + 64 * found.scale.numel())
        return found


class _Kept(Generic[Value]):
    """What was asked for last, as much as fits."""

    def __init__(self, memory_bytes: int) -> None:
        self._room = memory_bytes
        self._values: OrderedDict[tuple[str, Bits], tuple[Value, int]] = OrderedDict()

    def get(self, key: tuple[str, Bits]) -> Value | None:
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def add(self, key: tuple[str, Bits], value: Value, size: int) -> None:
        self._values[key] = (value, size)
        self._room -= size
        while self._room < 0 and len(self._values) > 1:
            _, (_, freed) = self._values.popitem(last=False)
            self._room += freed


def _is_mixed(width: Bits) -> TypeGuard[tuple[int, ...]]:
    return not isinstance(width, int) and len(set(width)) > 1


def _channels(widths: tuple[int, ...]) -> dict[int, Tensor]:
    """Return the places of the channels of each width."""
    every = torch.tensor(widths)
    return {b: (every == b).nonzero().flatten() for b in sorted(set(widths))}


def _kinds(bits: Mapping[str, Bits]) -> dict[str, bool]:
    """Tell which tensors have bits channel by channel."""
    return {name: not isinstance(width, int) for name, width in bits.items()}


def _check(bits: Mapping[str, Bits], channels: Mapping[str, int]) -> None:
    unknown = sorted(set(bits) - set(channels))
    if unknown:
        raise ValueError(
            "bits must name quantizable layers as w:LAYER and what they read as a:LAYER#i, "
            f"got {unknown[:5]}"
        )
    for name, width in bits.items():
        if not isinstance(width, int) and len(width) != channels[name]:
            raise ValueError(
                f"{name} must have bits for {channels[name]} channels, got {len(width)}"
            )


def _weight(layer: nn.Module) -> Tensor:
    return layer.get_parameter("weight")
