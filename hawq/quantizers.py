"""Uniform quantizers: integer codes, and the squared errors that they make.

Weights: symmetric, one scale an output channel, integer codes −2^(b−1) … 2^(b−1)−1 from three bits
on (as LSQ, Esser et al., 2020, and HAWQ-V3, Yao et al., 2021). One and two bits have the odd codes,
±1 and ±1, ±3: the levels of DoReFa (Zhou et al., 2016), symmetric and without a zero. The four
codes −2 … 1 would be lopsided: on a trained ResNet20 their errors have a mean of −0.15 of their
size in every layer, which adds up where random errors do not, and the loss rises eight times as
much (5.3 against 0.66, summed over layers quantized one by one; from three bits on at most 1.5
times). No bits have the one code 0. Activations: one scale a tensor, codes 0 … 2^b−1 where the
tensor is never negative, else as for weights. A ``Scheme`` says otherwise.

Asymmetric codes are those of 0 … 2^b−1 shifted by a zero point, so that zero has a code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hawq.allocation import Bits

__all__ = [
    "Codes",
    "Learning",
    "RangeMethod",
    "Scheme",
    "Schemes",
    "codes",
    "dorefa",
    "has_odd_codes",
    "nearest",
    "quantize",
]

RangeMethod = Literal["mse", "minmax", "percentile"]
Learning = Literal["lsq", "pact", "dorefa", "fixed"]

_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the values of weights, or of activations, become codes.

    Attributes:
        learning: ``lsq`` learns the scales (Esser et al., 2020). ``pact`` learns the largest value
            of an activation, with a gradient from what it clips and weight decay (Choi et al.,
            2018). ``dorefa`` takes a weight's tanh, in units of its largest, and clips activations
            at 1 (Zhou et al., 2016); see ``dorefa``. ``fixed`` leaves the scales as they began.
        range: Where scales begin, and what Ω sees: ``mse`` at the least squared error, ``minmax``
            at the largest value, ``percentile`` at that percentile of the magnitudes.
        percentile: In 50 … 100; asymmetric ranges leave out as much at either end.
        symmetric: Whether zero is the middle of the codes, or their first where no value is
            negative; else a zero point shifts them.
        per: A scale for each channel, or one for the tensor. Channels that have bits of their own
            have scales of their own.
    """

    learning: Learning = "lsq"
    range: RangeMethod = "mse"
    percentile: float = 99.9
    symmetric: bool = True
    per: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile must be within 50..100, got {self.percentile}")
        if self.learning == "dorefa" and not self.symmetric:
            raise ValueError("symmetric must be true with learning dorefa, got false")


@dataclass(frozen=True, slots=True)
class Schemes:
    """The schemes of a network's weights and of its activations.

    Raises:
        ValueError: If weights are to be learned with ``pact``, which is for activations.
    """

    weights: Scheme = Scheme()
    activations: Scheme = Scheme(per="tensor")

    def __post_init__(self) -> None:
        if self.weights.learning == "pact":
            raise ValueError("learning must be lsq, dorefa or fixed for weights, got pact")


@dataclass(frozen=True, slots=True)
class Codes:
    """The integers q = step·k + offset for whole k in low … high, for all or for each row.

    Attributes:
        low: Of k; a number, or a tensor that broadcasts over rows.
        high: Likewise.
        step: 2 where codes are odd, else 1.
        offset: 1 where codes are odd, else 0.
    """

    low: int | Tensor
    high: int | Tensor
    step: int | Tensor = 1
    offset: int | Tensor = 0

    @staticmethod
    def of(
        bits: Bits, *, signed: bool, symmetric: bool = True, zero_point: int | Tensor = 0
    ) -> "Codes":
        """Return the codes of one width, or of each row's own, shape (C,).

        Args:
            bits: One, or C of them, each 0..8.
            signed: Whether symmetric codes may be negative.
            symmetric: Whether there is no zero point.
            zero_point: Of asymmetric codes, in 0..2^b−1; a number, or shape (C,).

        Raises:
            ValueError: If a width is outside 0..8.
        """
        if isinstance(bits, int):
            if not symmetric:
                codes(bits)
                return Codes(-zero_point, 2**bits - 1 - zero_point)
            low, high = codes(bits, signed=signed)
            return _odd(low, high) if signed and has_odd_codes(bits) else Codes(low, high)
        own = [Codes.of(b, signed=signed, symmetric=symmetric) for b in bits]
        ends = torch.tensor([[row.low, row.high, row.step, row.offset] for row in own]).T
        if isinstance(zero_point, Tensor):
            ends = ends.to(zero_point)
        odd = bool(ends[3].any())
        # One end for all is a number, which is faster; a row without bits needs its own.
        unsigned = not signed and symmetric and bool((ends[1] > 0).all())
        return Codes(
            0 if unsigned else ends[0] - zero_point,
            ends[1] - zero_point,
            ends[2] if odd else 1,
            ends[3] if odd else 0,
        )

    def like(self, scale: Tensor) -> "Codes":
        """Return the same on the device of the scales, in their shape where rows differ."""
        own = (self.low, self.high, self.step, self.offset)
        return Codes(*(x.to(scale).view(scale.shape) if isinstance(x, Tensor) else x for x in own))

    @property
    def largest(self) -> int | Tensor:
        """The largest code, at least 1."""
        top = self.step * self.high + self.offset
        return top.clamp_min(1) if isinstance(top, Tensor) else max(top, 1)


def codes(bits: int, *, signed: bool = True) -> tuple[int, int]:
    """Return the least and the largest integer code of a width.

    Raises:
        ValueError: If ``bits`` is outside 0..8.
    """
    if bits not in range(9):
        raise ValueError(f"bits must be within 0..8, got {bits}")
    if bits == 0:
        return 0, 0
    if not signed:
        return 0, 2**bits - 1
    if has_odd_codes(bits):
        return -(2**bits - 1), 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def has_odd_codes(bits: int) -> bool:
    """Whether a width's signed codes are the odd integers of its range alone."""
    return bits in {1, 2}


@torch.no_grad()
def nearest(x: Tensor, scale: Tensor, of: Codes) -> Tensor:
    """Round to the nearest multiple of ``scale`` that has a code, as floats, in a new tensor.

    Args:
        x: Any shape.
        scale: Positive, broadcastable to ``x``.
        of: Codes, in the scales' shape where rows differ.
    """
    unit = _as_factor(scale * of.step, x)
    k = x * _as_factor((scale * of.step).reciprocal(), x)
    if _is_shifted(of):
        k.sub_(of.offset / of.step)
    k.round_()
    if isinstance(of.low, Tensor) or isinstance(of.high, Tensor):
        # One end after the other, in place: a clamp between tensors is several times slower.
        _clamp(k, of.high, torch.minimum)
        _clamp(k, of.low, torch.maximum)
    else:
        k.clamp_(of.low, of.high)
    k.mul_(unit)
    return k.add_(scale * of.offset) if _is_shifted(of) else k


def quantize(x: Tensor, scale: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """Round ``x`` to the nearest multiple of ``scale`` that has a symmetric code, as floats.

    Args:
        x: Any shape.
        scale: Positive, broadcastable to ``x``.
        bits: 0..8.
        signed: Whether codes may be negative.
    """
    return nearest(x, scale, Codes.of(bits, signed=signed))


def dorefa(weight: Tensor, bits: Bits) -> Tensor:
    """Quantize a weight as DoReFa does (Zhou et al., 2016), in the size that it has.

    tanh(w) in units of its largest magnitude m has the 2^b levels ±1, ±3 … ±(2^b−1) over 2^b−1. The
    paper leaves it there, within −1 … 1, for networks trained so from the start; times m, the
    network that was trained in floating point stays itself at many bits. One bit is sign(w)·E|w|.
    Gradients pass straight through the rounding, and through tanh.

    Args:
        weight: Output channels first, shape (C, …).
        bits: 1..8, or one for each output channel, 0..8.
    """
    shape = (-1, *[1] * (weight.ndim - 1))
    widths = torch.tensor([bits] if isinstance(bits, int) else list(bits), device=weight.device)
    levels = (2.0**widths - 1).to(weight).view(shape)
    bent = weight.tanh()
    largest = bent.abs().amax().detach().clamp_min(_TINY)
    position = (bent / largest + 1) / 2 * levels
    rounded = position + (position.round() - position).detach()
    many = (2 * rounded / levels.clamp_min(1) - 1) * largest
    # At zero the sign is a code, too.
    sign = torch.where(weight < 0, -1.0, 1.0).to(weight)
    one = (sign * weight.abs().mean()).detach() + (weight - weight.detach())
    widths = widths.view(shape)
    return torch.where(widths > 1, many, one) * (widths > 0)


def _odd(low: int, high: int) -> Codes:
    return Codes((low - 1) // 2, (high - 1) // 2, 2, 1)


def _clamp(k: Tensor, end: int | Tensor, choose: Callable[..., Tensor]) -> None:
    if isinstance(end, Tensor):
        choose(k, end.to(k), out=k)
    elif choose is torch.minimum:
        k.clamp_max_(end)
    else:
        k.clamp_min_(end)


def _as_factor(scale: Tensor, x: Tensor) -> Tensor:
    """Make scales of several rows of the values' type, in which products stay, and are faster."""
    return scale.to(x.dtype) if scale.ndim else scale


def _is_shifted(of: Codes) -> bool:
    return isinstance(of.offset, Tensor) or of.offset != 0
