"""Fake quantization in one node of the graph, with LSQ's or PACT's gradient for the scale.

With q the code of x and s the scale, the gradient of x passes straight through where x lies within
the codes' range, and is zero outside. LSQ (Esser et al., 2020): the gradient of s is Σ g·(q − x/s)
inside and Σ g·q outside, divided by √(n·q_max) for n values a scale. PACT (Choi et al., 2018): the
largest value α = s·q_max has the gradient Σ g·sign(x) over what is clipped, and nothing inside; a
step of s is that step of α.

Activations are the largest tensors there are, and a pass over memory is what a step of training
pays for. Both sums come of ⟨g_x, y − x⟩ and ⟨g − g_x, y⟩, with y = s·q the output that the next
layer keeps anyway; no mask is ever stored, for comparing and selecting cost more than arithmetic.
"""

from typing import Any

import torch
from torch import Tensor

from hawq.quantizers import Codes, Learning, nearest

__all__ = ["fake_quantize"]

_SMALLEST = 1e-12
# Keeps the gradient of a value that lies on the first code: of a ReLU's zeros, above all.
_BELOW = 1e-30


def fake_quantize(x: Tensor, scale: Tensor, of: Codes, learning: Learning = "lsq") -> Tensor:
    """Round ``x`` to its codes, differentiable in ``x`` and in the scale.

    Args:
        x: Any shape.
        scale: Shape (), or one that broadcasts to ``x`` channel by channel.
        of: Codes, for all or for each of the scales.
        learning: ``lsq`` or ``pact``; any other gives the scale no gradient.

    Returns:
        The quantized values, of the shape and type of ``x``.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, of, learning)
    return result


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, of: Codes, learning: Learning) -> Tensor:
        scale = scale.clamp_min(_SMALLEST)
        of = of.like(scale)
        y = nearest(x, scale, of)
        ctx.save_for_backward(x, y, scale)
        ctx.codes, ctx.learning = of, learning
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, scale = ctx.saved_tensors
        of: Codes = ctx.codes
        k, low, high = _position(x, scale, of)
        inside: Tensor = torch.ops.aten.hardtanh_backward(grad, k, low, high)
        if ctx.learning not in {"lsq", "pact"} or not ctx.needs_input_grad[1]:
            return inside, None, None, None
        buffer = k if k.dtype == grad.dtype else torch.empty_like(grad)
        torch.sub(grad, inside, out=buffer)
        total = _dot(buffer, y, scale)
        if ctx.learning == "pact":
            return inside, total / (scale * of.largest**2), None, None
        torch.sub(y, x, out=buffer)
        total += _dot(buffer, inside, scale)
        per_scale = x.numel() // scale.numel()
        return inside, total / (scale * (per_scale * of.largest) ** 0.5), None, None


def _position(x: Tensor, scale: Tensor, of: Codes) -> tuple[Tensor, float, float]:
    """Return where values are, in a new tensor, and between which two numbers codes reach."""
    unit = scale * of.step
    low, high = of.low, of.high
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        k = x * (unit.reciprocal().to(x.dtype) if unit.ndim else unit.reciprocal())
        if of.offset:
            k.sub_(of.offset / of.step)
        return k, low - _BELOW, high
    # Where ranges differ they become 0 … 1; a channel without bits lies outside everywhere.
    if not isinstance(low, Tensor) and low == 0:
        return x * (1 / (unit * high)).to(x.dtype), -_BELOW, 1
    low, high = (torch.as_tensor(end, device=scale.device) for end in (low, high))
    span = high - low
    empty = span == 0
    slope = torch.where(empty, 0, 1 / (unit * span.clamp_min(1)))
    start = torch.where(empty, -2, (of.offset / of.step + low) / span.clamp_min(1))
    return (x * slope.to(x.dtype)).sub_(start.to(x.dtype)), -_BELOW, 1


def _dot(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Sum the products of all values of a scale, in the scales' shape and type; ``a`` is lost."""
    if scale.numel() > 1:
        products = a.mul_(b)
        is_second = products.ndim > 2 and scale.shape[1] == scale.numel()
        if is_second and products.is_contiguous():
            products = products.flatten(2).sum(2)  # along memory, in which the rest is small
            return products.sum(0).to(scale.dtype).view(scale.shape)
        dims = [dim for dim, size in enumerate(scale.shape) if size == 1]
        return products.sum(dims).to(scale.dtype).view(scale.shape)
    if a.stride() == b.stride() and _is_dense(a):
        size = (a.numel(),)  # in the order of memory, whatever the layout
        return a.as_strided(size, (1,)).dot(b.as_strided(size, (1,))).to(scale.dtype).view_as(scale)
    return a.mul_(b).sum().to(scale.dtype).view_as(scale)


def _is_dense(a: Tensor) -> bool:
    return a.is_contiguous() or (a.ndim == 4 and a.is_contiguous(memory_format=torch.channels_last))
