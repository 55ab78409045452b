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

from hawq.curvature.probes import rademacher

__all__ = ["hutchinson_samples"]


def hutchinson_samples(
    loss: Tensor, weights: Sequence[Tensor], seeds: Sequence[int]
) -> NDArray[np.float64]:
    """Evaluate z_gᵀ(Hz)_g for every probe and weight.

    The graph of the gradient is built once and shared by the probes.

    Args:
        loss: Scalar, still attached to its graph.
        weights: G leaves of that graph; one that the loss does not use has trace 0.
        seeds: One a probe, K in all.

    Returns:
        Samples, shape (K, G).

    Raises:
        ValueError: If ``loss`` is not a scalar.
    """
    if loss.ndim != 0:
        raise ValueError(f"loss must be a scalar, got shape {tuple(loss.shape)}")
    samples = np.zeros((len(seeds), len(weights)))
    if not loss.requires_grad:
        return samples
    gradient = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    # A loss that is linear in a weight has a gradient without a graph: its Hessian row is zero.
    curved = [i for i, g in enumerate(gradient) if g is not None and g.requires_grad]
    if not curved:
        return samples
    chosen = [weights[i] for i in curved]
    slopes = [gradient[i] for i in curved]
    for k, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        z = [rademacher(w.shape, generator, w) for w in chosen]
        product = torch.autograd.grad(slopes, chosen, z, retain_graph=True, allow_unused=True)
        products = [
            v.new_zeros((), dtype=torch.float64)
            if hv is None
            else (v * hv).sum(dtype=torch.float64)
            for v, hv in zip(z, product, strict=True)
        ]
        samples[k, curved] = torch.stack(products).cpu().numpy()  # one wait for the device
    return samples
