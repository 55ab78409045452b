"""Uniform quantizers, their ranges, and the squared errors that they make.

Weights: symmetric, one scale an output channel, integer codes −2^(b−1) … 2^(b−1)−1 from three bits
on (as LSQ, Esser et al., 2020, and HAWQ-V3, Yao et al., 2021). One and two bits have the odd codes,
±1 and ±1, ±3: the levels of DoReFa (Zhou et al., 2016), symmetric and without a zero. The four
codes −2 … 1 would be lopsided: on a trained ResNet20 their errors have a mean of −0.15 of their
size in every layer, which adds up where random errors do not, and the loss rises eight times as
much (5.3 against 0.66, summed over layers quantized one by one; from three bits on at most 1.5
times). No bits have the one code 0. Activations: one scale a tensor, codes 0 … 2^b−1 where the
tensor is never negative, else as for weights.

Ranges minimize the squared error. Which range Ω sees decides the allocation: on a trained ResNet
ranges from the largest weight with the codes −2 … 1 lose 65 % of ‖W‖², the best ones 17 %, and the
best ones with odd codes 15 %.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "best_scales",
    "channel_errors",
    "codes",
    "has_odd_codes",
    "nearest_codes",
    "quantize",
    "squared_errors",
]

# Candidate ranges as fractions of the largest magnitude, then refinements at fixed codes.
_NUM_RANGES = 48
_NUM_REFINEMENTS = 6
_TINY = 1e-12


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


def quantize(x: Tensor, scale: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """Round ``x`` to the nearest multiple of ``scale`` that has a code, as floats.

    Args:
        x: Any shape.
        scale: Positive, broadcastable to ``x``.
        bits: 0..8.
        signed: Whether codes may be negative.
    """
    return _rounded(x, scale, *codes(bits, signed=signed), signed and has_odd_codes(bits))


def best_scales(x: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """Find the scale of each row that minimizes its squared quantization error.

    A grid of ranges, then alternating least squares: at fixed codes q the best scale is
    ⟨x, q⟩ / ⟨q, q⟩, which never increases the error. For rows of a hundred normal weights the
    result is within 1 % of the least error at up to five bits and within 12 % at eight, where the
    error is hundreds of times smaller.

    Args:
        x: Rows, shape (C, n).
        bits: 0..8.
        signed: Whether codes may be negative.

    Returns:
        Positive scales, shape (C, 1); a row of zeros gets a scale whose codes are all zero (one
        bit has no zero: its scale is then negligible). Without bits every scale is 1.
    """
    if bits == 0:
        return torch.ones_like(x[:, :1])
    if signed and bits == 1:
        return x.abs().mean(1, keepdim=True).clamp_min(_TINY)
    low, high = codes(bits, signed=signed)
    odd = signed and has_odd_codes(bits)
    largest = x.abs().amax(1, keepdim=True).clamp_min(_TINY)
    scale = largest / high
    error = _row_errors(x, scale, low, high, odd)

    def consider(candidate: Tensor) -> None:
        nonlocal scale, error
        candidate_error = _row_errors(x, candidate, low, high, odd)
        wins = candidate_error < error
        scale = torch.where(wins, candidate, scale)
        error = torch.where(wins, candidate_error, error)

    # A signed range may exceed the positive codes by one: with few bits that matters.
    for fraction in torch.linspace(1 / _NUM_RANGES, 1.25, _NUM_RANGES).tolist():
        consider(largest * (fraction / high))
    for _ in range(_NUM_REFINEMENTS):
        q = nearest_codes(x / scale, low, high, odd=odd)
        fitted = (x * q).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True).clamp_min(_TINY)
        # Where every code is zero there is nothing to fit.
        consider(torch.where(fitted > 0, fitted, scale))
    return scale


def channel_errors(rows: Tensor, widths: Sequence[int], *, signed: bool = True) -> Tensor:
    """‖Q_b(x) − x‖² of each row at each width, one scale a row: shape (C, B), float64.

    Args:
        rows: Shape (C, n).
        widths: Bit-widths.
        signed: Whether codes may be negative.
    """
    errors = []
    for bits in widths:
        scales = best_scales(rows, bits, signed=signed)
        rounded = quantize(rows, scales, bits, signed=signed)
        errors.append((rounded - rows).double().square().sum(1))
    return torch.stack(errors, 1)


def squared_errors(weight: Tensor, widths: Sequence[int]) -> Tensor:
    """‖Q_b(W) − W‖² of a layer at each width, shape (B,), float64.

    Args:
        weight: Output channels first, shape (C, …).
        widths: Bit-widths.
    """
    return channel_errors(weight.detach().flatten(1), widths).sum(0)


def nearest_codes(
    ratio: Tensor, low: int | Tensor, high: int | Tensor, *, odd: bool | Tensor
) -> Tensor:
    """Round in place to the nearest code.

    Args:
        ratio: Values in units of the scale; overwritten.
        low: The least code, broadcastable to ``ratio``.
        high: The largest.
        odd: Whether codes are odd; a mask where rows differ.
    """
    if isinstance(odd, Tensor):
        to_odd = ratio.div(2).floor_().mul_(2).add_(1)
        ratio = torch.where(odd, to_odd, ratio.round_())
    elif odd:
        ratio = ratio.div_(2).floor_().mul_(2).add_(1)
    else:
        ratio = ratio.round_()
    # Torch declares two numbers or two tensors, which one union cannot say.
    return ratio.clamp_(low, high)  # type: ignore[arg-type]


def _rounded(x: Tensor, scale: Tensor, low: int, high: int, odd: bool) -> Tensor:
    return nearest_codes(x / scale, low, high, odd=odd).mul_(scale)


def _row_errors(x: Tensor, scale: Tensor, low: int, high: int, odd: bool) -> Tensor:
    return (_rounded(x, scale, low, high, odd) - x).square().sum(1, keepdim=True)
