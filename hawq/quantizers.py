"""Uniform quantizers, their ranges, and the squared errors that they make.

Weights: symmetric, one scale an output channel, integer codes −2^(b−1) … 2^(b−1)−1 (as LSQ, Esser
et al., 2020, and HAWQ-V3, Yao et al., 2021). One bit has the two codes −1 and +1, because the
symmetric range would be empty; no bits have the one code 0. Activations: one scale a tensor, codes
0 … 2^b−1 where the tensor is never negative, else as for weights.

Ranges minimize the squared error. Which range Ω sees decides the allocation: on a trained ResNet
2-bit ranges from the largest weight lose 65 % of ‖W‖², the best ones 17 %.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["best_scales", "channel_errors", "codes", "quantize", "squared_errors"]

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
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def quantize(x: Tensor, scale: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """Round ``x`` to the nearest multiple of ``scale`` that has a code, as floats.

    Args:
        x: Any shape.
        scale: Positive, broadcastable to ``x``.
        bits: 0..8.
        signed: Whether codes may be negative.
    """
    low, high = codes(bits, signed=signed)
    if signed and bits == 1:
        return torch.where(x < 0, -scale, scale)
    return _rounded(x, scale, low, high)


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
    largest = x.abs().amax(1, keepdim=True).clamp_min(_TINY)
    scale = largest / high
    error = _row_errors(x, scale, low, high)

    def consider(candidate: Tensor) -> None:
        nonlocal scale, error
        candidate_error = _row_errors(x, candidate, low, high)
        wins = candidate_error < error
        scale = torch.where(wins, candidate, scale)
        error = torch.where(wins, candidate_error, error)

    # A signed range may exceed the positive codes by one: with two bits {−2 … 1} that matters.
    for fraction in torch.linspace(1 / _NUM_RANGES, 1.25, _NUM_RANGES).tolist():
        consider(largest * (fraction / high))
    for _ in range(_NUM_REFINEMENTS):
        q = torch.clamp(torch.round(x / scale), low, high)
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


def _rounded(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (x / scale).round_().clamp_(low, high).mul_(scale)


def _row_errors(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return (_rounded(x, scale, low, high) - x).square().sum(1, keepdim=True)
