"""Differences of gradients, where an operator of the network has no second derivative.

Hutchinson's zᵀHz without a Hessian-vector product, from two ordinary gradients:

    z_gᵀ(∇L(w + hz) − ∇L(w − hz))_g / (2h) = z_gᵀ(Hz)_g + O(h²),

the same probes and, but for the O(h²), the same samples. All groups move together by h times a
sign, h being ``step`` times the root mean square of all weights. (Moving every group in proportion
to its own weights is unbiased, too, but doubled or tripled the variance of most layers.)

Smooth networks: rounding costs ε/h and truncation h², together least near h ~ ε^⅓ (Nocedal &
Wright, 2006, section 8.1). On a trained SiLU network of 14 layers the median layer's error was, in
standard deviations of one probe,

    step      1e-6     3e-6     1e-5     1e-4     1e-3   2.5e-3     1e-2     3e-2
    float32   0.18    0.068    0.031   4.5e-3   4.6e-4   4.5e-4   4.6e-3    0.042
    float64 1.1e-9  6.3e-10   4.6e-9   4.6e-7   4.6e-5   2.9e-4   4.6e-3    0.042

so the default, ½ε^⅓ (2.5e-3 and 3e-6), costs nothing against the probes' own noise. Where a GPU
rounds convolutions to TF32, ε is 1e-3, which float32's step does not allow for: switch that off.

Kinks (ReLU, max-pooling): each that a step crosses adds its jump over 2h. The shorter the step,
the fewer cross, but each then counts for more: the noise *grows* as 1/√h until none crosses, which
is far below float32's reach. On a trained ResNet20 with 64 images the default step had 3.3 times
the standard error of Hessian-vector products in the median layer, and 3e-2 still 1.5 times.
Gauss–Newton is for networks of ReLUs; it needs no second derivative of any operator.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, Node

from hawq.curvature.probes import Reduction, rademacher, totals

__all__ = ["finite_difference_samples", "missing_second_derivative"]


def finite_difference_samples(
    loss: Callable[[], Tensor],
    weights: Sequence[Tensor],
    seeds: Sequence[int],
    *,
    step: float | None = None,
    reduce: Reduction = totals,
) -> NDArray[np.float64]:
    """Evaluate z_gᵀ(Hz)_g for every probe and group, from two gradients a probe.

    The weights are moved in place, and have their old bits afterwards, also after an error. Graphs
    that were built on them before cannot be differentiated any more.

    Args:
        loss: Computes the scalar loss from the weights as they are; always the same function.
        weights: Leaves; one that the loss does not use has trace 0.
        seeds: One a probe, K in all.
        step: h relative to the weights' root mean square; None for ½ε^⅓ of their type.
        reduce: Turns the elements z·Hz, one tensor a weight, into the G groups' sums.

    Returns:
        Samples, shape (K, G).

    Raises:
        ValueError: If the loss is not a scalar, or ``step`` is not positive.
    """
    if step is None:
        step = 0.5 * max(torch.finfo(w.dtype).eps for w in weights) ** (1 / 3)
    if not step > 0:
        raise ValueError(f"step must be positive, got {step}")
    saved = [w.detach().clone() for w in weights]
    length = step * _root_mean_square(saved)
    samples = []
    try:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            z = [rademacher(w.shape, generator, w) for w in saved]
            gradients = []
            for distance in (length, -length):
                _move(weights, saved, z, distance)
                gradients.append(_gradient(loss(), weights))
            parts = [
                None if above is None or below is None else v * (above - below) / (2 * length)
                for v, above, below in zip(z, *gradients, strict=True)
            ]
            samples.append(reduce(parts).numpy())
    finally:
        _move(weights, saved, saved, 0.0)
    return np.stack(samples)


def missing_second_derivative(
    loss: Tensor, inputs: Sequence[Tensor] | Sequence[GradientEdge]
) -> str:
    """Say why a loss has no second derivative; empty where it has one.

    Some operators raise when they are differentiated twice. One that is marked
    ``once_differentiable`` does not: its part of the product is just missing, so it is looked for
    in the graph. An operator that computes its derivative behind autograd's back and does not say
    so goes unnoticed.

    Args:
        loss: Scalar, attached to its graph, which stays usable.
        inputs: Leaves, or edges, of that graph.

    Raises:
        RuntimeError: If it has no first derivative either, or memory does not suffice.
    """
    if not loss.requires_grad:
        return ""
    marked = _marked(loss)
    if marked:
        return f"{marked} is marked once_differentiable"
    torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    try:
        gradient = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
        slopes = [g for g in gradient if g is not None and g.requires_grad]
        if slopes:
            ones = [torch.ones_like(g) for g in slopes]
            torch.autograd.grad(slopes, inputs, ones, retain_graph=True, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error)
    return ""


def _marked(loss: Tensor) -> str:
    """Name an operator of the graph that is marked once_differentiable, if there is one."""
    # The mark is a wrapper around the operator's backward; all of them run the same code.
    wrapper = once_differentiable(lambda _: None).__code__
    seen: set[Node] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        operator = getattr(node, "_forward_cls", type(None))
        if getattr(getattr(operator, "backward", None), "__code__", None) is wrapper:
            return operator.__name__
        stack.extend(parent for parent, _ in node.next_functions)
    return ""


def _root_mean_square(weights: Sequence[Tensor]) -> float:
    """Of all elements together; 1 where all are zero."""
    total = sum(float(w.double().square().sum()) for w in weights)
    return (total / sum(w.numel() for w in weights)) ** 0.5 or 1.0


@torch.no_grad()
def _move(
    weights: Sequence[Tensor], start: Sequence[Tensor], z: Sequence[Tensor], distance: float
) -> None:
    for w, origin, direction in zip(weights, start, z, strict=True):
        w.copy_(origin if distance == 0 else origin + distance * direction)


def _gradient(loss: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if loss.ndim != 0:
        raise ValueError(f"loss must return a scalar, got shape {tuple(loss.shape)}")
    if not loss.requires_grad:
        return [None] * len(weights)
    return torch.autograd.grad(loss, weights, allow_unused=True)
