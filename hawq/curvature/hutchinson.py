"""Hutchinson's estimator: traces of all layers from one joint Hessian-vector product.

For z with independent random signs, zᵀHz is an unbiased estimate of Tr H (Hutchinson, 1989). Read
group by group, z_gᵀ(Hz)_g estimates the trace of the g-th diagonal block for every g at once:
terms H_gh z_h of other groups add variance, 2‖offdiag H_gg‖² + ‖H_{g,¬g}‖² in all, never bias.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hawq.curvature.probes import Reduction, rademacher, totals

__all__ = ["hutchinson_samples"]


def hutchinson_samples(
    loss: Tensor,
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    seeds: Sequence[int],
    *,
    reduce: Reduction = totals,
) -> NDArray[np.float64]:
    """Evaluate z_gᵀ(Hz)_g for every probe and group.

    The graph of the gradient is built once and shared by the probes.

    Args:
        loss: Scalar, still attached to its graph.
        inputs: Leaves, or edges, of that graph; one that the loss does not use has trace 0.
        seeds: One a probe, K in all.
        reduce: Turns the elements z·Hz, one tensor an input, into the G groups' sums.

    Returns:
        Samples, shape (K, G).

    Raises:
        ValueError: If ``loss`` is not a scalar.
    """
    if loss.ndim != 0:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
    nothing: list[Tensor | None] = [None] * len(inputs)
    gradient = nothing
    if loss.requires_grad:
        gradient = list(torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True))
    # A loss that is linear in an input has a gradient without a graph: its Hessian row is zero.
    curved = [(i, g) for i, g in enumerate(gradient) if g is not None and g.requires_grad]
    samples = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        parts = list(nothing)
        if curved:
            slopes = [g for _, g in curved]
            z = [rademacher(g.shape, generator, g) for g in slopes]
            product = torch.autograd.grad(slopes, inputs, z, retain_graph=True, allow_unused=True)
            for (i, _), signs in zip(curved, z, strict=True):
                hz = product[i]
                parts[i] = None if hz is None else signs * hz
        samples.append(reduce(parts).numpy())
    return np.stack(samples)
