"""The Gauss–Newton estimator: traces of all layers from one ordinary backward pass.

The Gauss–Newton matrix of a layer is G = Σ_n J_nᵀ (∇²ℓ_n) J_n. With ∇²ℓ_n = B_n B_nᵀ and random
signs s_n, the gradient g of Σ_n ⟨B_n s_n, outputs_n⟩ has E‖g‖² = Tr G: the signs are independent
between examples, so their cross terms vanish in the mean. No graph of the gradient is needed.

Where the outputs are piecewise linear in every single layer's weights (convolutions, ReLU, pooling,
batch-norm in eval mode), each layer's Hessian block *is* its Gauss–Newton block, and this is an
unbiased estimate of the Hessian trace at a third of Hutchinson's price and less variance. Where
layers can be taken apart by example, ``per_example`` has less still.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import GradientEdge

from hawq.curvature.probes import Reduction, rademacher, totals
from hawq.task import Factor

__all__ = ["gauss_newton_samples"]


def gauss_newton_samples(
    outputs: Tensor,
    factors: Sequence[Factor],
    inputs: Sequence[Tensor] | Sequence[GradientEdge],
    seeds: Sequence[int],
    *,
    weights: Tensor | None = None,
    reduce: Reduction = totals,
) -> NDArray[np.float64]:
    """Evaluate Σ sign·‖∂⟨B s, outputs⟩/∂w_g‖² for every probe and group.

    Args:
        outputs: The network's outputs, shape (N, …), still attached to their graph.
        factors: Signed square roots of the summed loss's Hessian in the outputs.
        inputs: Leaves, or edges, of that graph; one that the outputs do not use has trace 0.
        seeds: One a probe, K in all.
        weights: What each example's loss counts for, shape (N,); None for 1.
        reduce: Turns squared elements, one tensor an input, into the G groups' sums.

    Returns:
        Samples, shape (K, G), of the Gauss–Newton traces of the *summed* loss.
    """
    samples = []
    root = None if weights is None else weights.to(outputs).sqrt()[:, None]
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        total = reduce([None] * len(inputs))
        for factor in factors if outputs.requires_grad else ():
            s = rademacher((len(outputs), factor.rank), generator, outputs)
            gradients = torch.autograd.grad(
                outputs,
                inputs,
                factor.apply(s if root is None else root * s),
                retain_graph=True,
                allow_unused=True,
            )
            squares = [None if g is None else g.double().square() for g in gradients]
            total = total + factor.sign * reduce(squares)
        samples.append(total.numpy())
    return np.stack(samples)
