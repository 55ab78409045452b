"""The modules that quantize a weight or an activation during training.

Weights begin in the ranges that Ω was computed with; activations are calibrated on a few batches.
A quantizer that is not active passes its input through: layers are quantized one after the other
by switching theirs on.
"""

import torch
from torch import Tensor, nn

from hawq.allocation import Bits
from hawq.channels import channels_first
from hawq.finetune.learned_step import fake_quantize
from hawq.quantizers import Codes, Scheme, dorefa
from hawq.ranges import fitted_range

__all__ = ["ActivationQuantizer", "WeightQuantizer"]


class WeightQuantizer(nn.Module):
    """Quantize a weight, as a parametrization.

    Args:
        weight: Gives the starting scales, as the layer has it.
        bits: 1..8, or one for each output channel, 0..8.
        scheme: How; by default a learned scale for each output channel.
        transposed_groups: Of a transposed convolution; 0 where output channels come first.
    """

    scale: nn.Parameter
    zero_point: Tensor

    def __init__(
        self,
        weight: Tensor,
        bits: Bits,
        scheme: Scheme | None = None,
        transposed_groups: int = 0,
    ) -> None:
        super().__init__()
        self.bits, self.scheme = bits, scheme or Scheme()
        self.transposed_groups = transposed_groups
        self.active = True
        shared = self.scheme.per == "tensor" and isinstance(bits, int)
        num_channels = len(channels_first(weight, transposed_groups))
        shape = () if shared else (num_channels, *[1] * (weight.ndim - 1))
        learns = self.scheme.learning == "lsq"
        ones = torch.ones(shape, device=weight.device, dtype=weight.dtype)
        self.scale = nn.Parameter(ones, requires_grad=learns)
        self.register_buffer("zero_point", torch.zeros_like(ones))
        self._codes: Codes | None = None
        self.start(weight)

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Fit the range to a weight, of the same shape."""
        rows = channels_first(weight.detach(), self.transposed_groups).flatten(1)
        scale, zero_point = fitted_range(rows, self.bits, self.scheme)
        self.scale.copy_(scale.view_as(self.scale))
        self.zero_point.copy_(zero_point.view_as(self.zero_point))
        self._codes = None

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight's quantized values, same shape."""
        if not self.active:
            return weight
        rows = channels_first(weight, self.transposed_groups)
        if self.scheme.learning == "dorefa":
            rounded = dorefa(rows, self.bits)
        else:
            if self._codes is None:
                self._codes = _codes(self.bits, self.zero_point, self.scheme, signed=True)
            rounded = fake_quantize(rows, self.scale, self._codes, self.scheme.learning)
        return channels_first(rounded, self.transposed_groups)

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._codes = None


class ActivationQuantizer(nn.Module):
    """Quantize an activation tensor; passes through until calibrated.

    Args:
        bits: 1..8 for the tensor; or one for each channel, 0..8, with a scale for each.
        name: Of the tensor.
        axis: Of its channels.
        scheme: How; by default a learned scale for the tensor.
        num_channels: Of the tensor; needed where each has a scale though all have the same bits.
    """

    scale: nn.Parameter
    zero_point: Tensor
    calibrated: Tensor
    signed: Tensor

    def __init__(
        self,
        bits: Bits,
        name: str = "",
        axis: int = 1,
        scheme: Scheme | None = None,
        num_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.name, self.axis = bits, name, axis
        self.scheme = scheme or Scheme(per="tensor")
        self.active = True
        shape: tuple[int, ...] = () if isinstance(bits, int) else (len(bits),)
        if isinstance(bits, int) and self.scheme.per == "channel":
            if num_channels is None:
                raise ValueError("num_channels must be given for a scale a channel, got None")
            shape = (num_channels,)
        learns = self.scheme.learning in {"lsq", "pact"}
        self.scale = nn.Parameter(torch.ones(shape), requires_grad=learns)
        self.register_buffer("zero_point", torch.zeros(shape))
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("signed", torch.tensor(False))
        self._codes: Codes | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return the tensor's quantized values, same shape."""
        if not self.active:
            return x
        # Known without a look at the device while training: a look would wait for it.
        if self._codes is None:
            if not self.calibrated:
                return x
            signed = bool(self.signed)
            self._codes = _codes(self.bits, self.zero_point, self.scheme, signed=signed)
        scale: Tensor = self.scale
        if scale.ndim:
            axis = self.axis % x.ndim
            scale = scale.view(*[1] * axis, -1, *[1] * (x.ndim - 1 - axis))
        return fake_quantize(x, scale, self._codes, self.scheme.learning)

    def rows(self, x: Tensor) -> Tensor:
        """Return values of which each row gets a scale, shape (1, n) or (C, n)."""
        return x.movedim(self.axis, 0).flatten(1) if self.scale.ndim else x.reshape(1, -1)

    @torch.no_grad()
    def calibrate(self, values: Tensor) -> None:
        """Fit the range to a sample of values.

        Args:
            values: Any shape for a tensor; for channels their ``rows``, shape (C, n).
        """
        signed = bool((values < 0).any())
        rows = values if self.scale.ndim else values.reshape(1, -1)
        scale, zero_point = fitted_range(rows, self.bits, self.scheme, signed=signed)
        self.scale.copy_(scale.view(self.scale.shape))
        self.zero_point.copy_(zero_point.view(self.scale.shape))
        self.signed.fill_(signed)
        self.calibrated.fill_(True)
        self._codes = None

    @torch.no_grad()
    def take(self, other: "ActivationQuantizer", channels: Tensor) -> None:
        """Take the ranges of some channels over from another quantizer of the same tensor."""
        self.scale[channels] = other.scale[channels]
        self.zero_point[channels] = other.zero_point[channels]
        self.signed.copy_(other.signed)
        self.calibrated.copy_(other.calibrated)
        self._codes = None

    def forget(self) -> None:
        """Pass values through again, until the next calibration."""
        self.calibrated.fill_(False)
        self._codes = None

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._codes = None


def _codes(bits: Bits, zero_point: Tensor, scheme: Scheme, *, signed: bool) -> Codes:
    if scheme.symmetric:
        return Codes.of(bits, signed=signed)
    if isinstance(bits, int) and zero_point.ndim:
        bits = (bits,) * len(zero_point)
    start = int(zero_point) if zero_point.ndim == 0 else zero_point.flatten()
    return Codes.of(bits, signed=True, symmetric=False, zero_point=start)
