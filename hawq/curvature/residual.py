"""What Gauss–Newton lacks of the Hessian, where a network is smooth.

With outputs o(w), the Hessian of Σ ℓ(o) splits into H = G + R: Gauss–Newton's G = Jᵀ ∇²ℓ J and

    R = ∇²_w ⟨r, o(w)⟩ with r = ∂ℓ/∂o held fixed,

the curvature of the network itself, weighted by how wrong it is. Tr G has no probe noise where
examples are seen one by one, and holds nearly all of what made Hutchinson's probes of H noisy; Tr R
costs one Hessian-vector product a probe, as Tr H does. On the layers of a SiLU network that had
learned its task (ResNet14, digits), a probe's relative deviation fell from 1.2–4.1 to 0.2–1.1: for
the worst layer a fourteenth of the probes. Restricting probes to one layer at a time halves it
once more, but costs a product a layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["residual_loss"]


def residual_loss(
    losses: Callable[[], Tensor], model: nn.Module, weights: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return Σ_n w_n ⟨r_n, o_n⟩, whose Hessian is R, and the outputs o.

    Args:
        losses: Runs the network once, and returns each example's loss, shape (N,).
        model: The network.
        weights: w, shape (N,); None for 1.

    Returns:
        None where the network does not return one tensor, once.
    """
    seen: list[object] = []
    handle = model.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        loss = losses()
    finally:
        handle.remove()
    if len(seen) != 1 or not isinstance(seen[0], Tensor) or not seen[0].requires_grad:
        return None
    outputs = seen[0]
    total = loss.sum() if weights is None else (loss * weights.to(loss)).sum()
    (slope,) = torch.autograd.grad(total, outputs, retain_graph=True, materialize_grads=True)
    return (slope.detach() * outputs).sum(), outputs
