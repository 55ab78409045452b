"""The Gauss–Newton estimator: traces of all layers from one ordinary backward pass.

The Gauss–Newton matrix of a layer is G = Σ_n J_nᵀ (∇²ℓ_n) J_n. With ∇²ℓ_n = B_n B_nᵀ and random
signs s_n, the gradient g of Σ_n ⟨B_n s_n, outputs_n⟩ has E‖g‖² = Tr G: the signs are independent
between examples, so their cross terms vanish in the mean. No graph of the gradient is needed.

Where the outputs are piecewise linear in every single layer's weights (convolutions, ReLU, pooling,
batch-norm in eval mode), each layer's Hessian block *is* its Gauss–Newton block, and this is an
unbiased estimate of the Hessian trace at a third of Hutchinson's price and less variance.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawq.curvature.probes import rademacher
from hawq.task import Factor

__all__ = ["gauss_newton_samples"]


def gauss_newton_samples(
    outputs: Tensor, factors: Sequence[Factor], weights: Sequence[Tensor], seeds: Sequence[int]
) -> NDArray[np.float64]:
    """Evaluate Σ sign·‖∂⟨B s, outputs⟩/∂w_g‖² for every probe and weight.

    Args:
        outputs: The network's outputs, shape (N, …), still attached to their graph.
        factors: Signed square roots of the summed loss's Hessian in the outputs.
        weights: G leaves of that graph; one that the outputs do not use has trace 0.
        seeds: One a probe, K in all.

    Returns:
        Samples, shape (K, G), of the Gauss–Newton traces of the *summed* loss.
    """
    samples = np.zeros((len(seeds), len(weights)))
    if not outputs.requires_grad:
        return samples
    for k, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for factor in factors:
            s = rademacher((len(outputs), factor.rank), generator, outputs)
            gradient = torch.autograd.grad(
                outputs, weights, factor.apply(s), retain_graph=True, allow_unused=True
            )
            norms = [
                outputs.new_zeros((), dtype=torch.float64)
                if g is None
                else g.double().square().sum()
                for g in gradient
            ]
            samples[k] += factor.sign * torch.stack(norms).cpu().numpy()  # one wait for the device
    return samples
