"""Signed square roots of common losses' Hessians in the network's outputs.

Each function returns what ``hawq.task.Factor`` describes, for losses that are summed over all
elements of an example's outputs, shape (N, …): the outputs of a detector may well have shape
(N, anchors, classes). A loss that acts on every element alone has a diagonal Hessian diag(h), and
B = diag(√h) has as many columns as an example has outputs. h may not depend on the targets
(cross-entropy), may vanish (smooth L1), and may be negative (focal loss), which takes a second
factor of sign −1.

``weight`` multiplies the elements' losses, as ``weight`` does in torch, and so scales h.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hawq.curvature.finite_difference import missing_second_derivative
from hawq.task import Factor

__all__ = [
    "binary_cross_entropy_factor",
    "factors_of",
    "focal_factors",
    "smooth_l1_factor",
    "softmax_factor",
    "squared_error_factor",
]

# Outputs of an example up to which a dense Hessian is formed, and what of it is rounding.
_DENSE, _ROUNDING = 64, 1e-6

# Over the elements of one example.
Reduction = Literal["sum", "mean"]


def softmax_factor(logits: Tensor, *, weight: Tensor | float = 1.0) -> Factor:
    """Return the factor of softmax cross-entropy: B = √w · (diag(√p) − p√pᵀ).

    B Bᵀ = w · (diag(p) − ppᵀ), whatever the target is, as long as it sums to 1: label smoothing
    and soft targets change nothing. With smoothing ε *and* class weights v, torch's loss of an
    example of class y has w = (1 − ε)·v_y + ε·mean(v).

    Args:
        logits: Shape (N, C) or (N, C, …), as ``F.cross_entropy`` takes them; the losses of an
            example's positions are summed.
        weight: w: a number, or one for every loss, shape (N,) or (N, …); not negative.

    Raises:
        ValueError: If ``weight`` has another shape or is negative.
    """
    p = logits.detach().softmax(1)
    weight = _checked(weight, p)
    if weight.ndim and weight.shape != p[:, 0].shape:
        raise ValueError(
            f"weight must be a number or have the losses' shape {tuple(p[:, 0].shape)}, "
            f"got {tuple(weight.shape)}"
        )
    root = p.sqrt() * (weight.sqrt().unsqueeze(1) if weight.ndim else weight.sqrt())

    def apply(s: Tensor) -> Tensor:
        scaled = root * s.reshape(p.shape)
        return scaled - p * scaled.sum(1, keepdim=True)

    wide = p.double()  # ‖e_c − p‖² cancels where the network is sure
    distance = 1 - 2 * wide + wide.square().sum(1, keepdim=True)
    energies = root.double().square() * distance.clamp_(min=0)
    return Factor(p.shape[1:].numel(), apply, energies=energies.flatten(1))


def squared_error_factor(
    outputs: Tensor, *, reduction: Reduction, weight: Tensor | float = 1.0
) -> Factor:
    """Return the factor of (o − t)², whose h is 2.

    Args:
        outputs: Shape (N, …).
        reduction: Whether an example's loss is the sum or the mean over its elements.
        weight: A number, or of the outputs' shape up to broadcasting; ½ for ½(o − t)².

    Raises:
        ValueError: If ``weight`` has another number of dimensions or is negative.
    """
    return _diagonal(torch.full_like(outputs, 2.0, requires_grad=False), reduction, weight)


def binary_cross_entropy_factor(
    logits: Tensor, *, reduction: Reduction, weight: Tensor | float = 1.0
) -> Factor:
    """Return the factor of sigmoid cross-entropy: h = p(1 − p), whatever the targets are.

    Args:
        logits: Shape (N, …).
        reduction: Whether an example's loss is the sum or the mean over its elements.
        weight: A number, or of the logits' shape up to broadcasting. Torch's ``pos_weight`` v
            with targets t is the weight v·t + 1 − t.

    Raises:
        ValueError: If ``weight`` has another number of dimensions or is negative.
    """
    z = logits.detach()
    return _diagonal(z.sigmoid() * (-z).sigmoid(), reduction, weight)


def smooth_l1_factor(
    outputs: Tensor,
    targets: Tensor,
    *,
    beta: float,
    reduction: Reduction,
    weight: Tensor | float = 1.0,
) -> Factor:
    """Return the factor of smooth L1 (Girshick, 2015): h = 1/β where |o − t| < β, else 0.

    Huber's loss with δ = β is β times it: h = 1, by ``weight=beta``. An element further from its
    target than β has no curvature, so what is traced depends on the choice of β.

    Args:
        outputs: Shape (N, …).
        targets: Same shape.
        beta: β, positive. The L1 loss, its limit for β → 0, has no curvature at all.
        reduction: Whether an example's loss is the sum or the mean over its elements.
        weight: A number, or of the outputs' shape up to broadcasting.

    Raises:
        ValueError: If ``beta`` is not positive, if outputs and targets differ in shape, or if
            ``weight`` has another number of dimensions or is negative.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive (the L1 loss has no curvature), got {beta}")
    _check_shapes(outputs, targets)
    inside = (outputs.detach() - targets).abs() < beta
    return _diagonal(inside.to(outputs.dtype) / beta, reduction, weight)


def focal_factors(
    logits: Tensor,
    targets: Tensor,
    *,
    reduction: Reduction,
    alpha: float = 0.25,
    gamma: float = 2.0,
    weight: Tensor | float = 1.0,
) -> tuple[Factor, Factor]:
    """Return the two factors, of signs +1 and −1, of the sigmoid focal loss (Lin et al., 2017).

    With u the logit of a positive, or minus that of a negative, q = σ(u), and a = α or 1 − α, the
    loss is −a·(1 − q)^γ·log q and

        h = a · q(1 − q)^γ · [(2γ + 1)(1 − q) + γ·log q·(1 − q − γq)].

    It is negative far on the wrong side: for γ = 2 where u < −2.79 (a positive with a logit below
    −2.79, a negative with one above 2.79), down to −0.0118 for positives and −0.0354 for negatives
    at α = 0.25. So the traces of a detector's layers may be negative.

    Args:
        logits: Shape (N, …).
        targets: 1 for positives and 0 for negatives, same shape.
        reduction: Whether an example's loss is the sum or the mean over its elements.
        alpha: Weight of positives; negatives have 1 − α.
        gamma: γ, not negative; 0 is cross-entropy.
        weight: A number, or of the logits' shape up to broadcasting: 0 for ignored anchors, one
            over the number of positives where the loss is divided by that.

    Raises:
        ValueError: If a parameter is out of range, if targets are not 0 or 1 or of another shape,
            or if ``weight`` has another number of dimensions or is negative.
    """
    if not 0 <= alpha <= 1 or not gamma >= 0:
        raise ValueError(f"alpha must be in [0, 1] and gamma not negative, got {alpha} and {gamma}")
    _check_shapes(logits, targets)
    positive = targets == 1
    if not bool((positive | (targets == 0)).all()):
        raise ValueError("targets must be 0 or 1, got other values")
    u = torch.where(positive, logits.detach(), -logits.detach())
    a = torch.where(positive, u.new_tensor(alpha), u.new_tensor(1 - alpha))
    q, log_q = u.sigmoid(), F.logsigmoid(u)
    r = (-u).sigmoid()  # 1 − q, without its rounding
    h = a * q * r**gamma * ((2 * gamma + 1) * r + gamma * log_q * (r - gamma * q))
    return (
        _diagonal(h.clamp(min=0), reduction, weight),
        _diagonal((-h).clamp(min=0), reduction, weight, sign=-1.0),
    )


def factors_of(losses: Callable[[Tensor], Tensor], outputs: Tensor) -> list[Factor] | None:
    """Return the factors of any loss: of sign +1 and −1, from each example's dense Hessian.

    Args:
        losses: Maps outputs to each example's loss, shape (N,), of its own outputs alone.
        outputs: Shape (N, …).

    Returns:
        None where an example has more than 64 outputs, or the loss has no second derivative.
    """
    rank = outputs[0].numel()
    if rank > _DENSE:
        return None
    at = outputs.detach().requires_grad_()
    loss = losses(at).sum()
    if missing_second_derivative(loss, [at]):
        return None
    (slope,) = torch.autograd.grad(loss, at, create_graph=True)
    flat = slope.reshape(len(slope), rank)
    rows = []
    for column in range(rank):
        if not flat.requires_grad:  # linear in the outputs
            break
        (row,) = torch.autograd.grad(
            flat[:, column].sum(), at, retain_graph=True, materialize_grads=True
        )
        rows.append(row.reshape(len(row), rank))
    if not rows:
        return [_diagonal(torch.zeros_like(outputs.detach()), "sum", 1.0)]
    hessian = torch.stack(rows, 1).double()
    values, vectors = torch.linalg.eigh((hessian + hessian.transpose(1, 2)) / 2)
    factors = []
    for sign in (1.0, -1.0):
        energies = (sign * values).clamp_min(0)
        if sign > 0 or bool((energies > _ROUNDING * values.abs().amax(1, keepdim=True)).any()):
            root = (vectors * energies.sqrt()[:, None]).to(outputs.dtype)

            def apply(s: Tensor, root: Tensor = root) -> Tensor:
                return (root @ s[:, :, None])[..., 0].reshape(outputs.shape)

            factors.append(Factor(rank, apply, sign, energies=energies))
    return factors


def _diagonal(h: Tensor, reduction: Reduction, weight: Tensor | float, sign: float = 1.0) -> Factor:
    """Return B = diag(√h) for h of the outputs' shape, not negative."""
    if reduction not in {"sum", "mean"}:
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    weight = _checked(weight, h)
    if weight.ndim not in {0, h.ndim}:
        raise ValueError(
            f"weight must be a number or have {h.ndim} dimensions as the outputs have, "
            f"got shape {tuple(weight.shape)}"
        )
    rank = h.shape[1:].numel()
    h = h * weight.expand_as(h)
    h = h / rank if reduction == "mean" else h
    root = h.sqrt()
    return Factor(
        rank,
        lambda s: root * s.reshape(h.shape),
        sign,
        energies=h.reshape(-1, rank),
        orthogonal=True,
    )


def _checked(weight: Tensor | float, like: Tensor) -> Tensor:
    weight = torch.as_tensor(weight, dtype=like.dtype, device=like.device).detach()
    if not bool((weight >= 0).all()):
        raise ValueError(f"weight must not be negative, got {float(weight.min())}")
    return weight


def _check_shapes(outputs: Tensor, targets: Tensor) -> None:
    if targets.shape != outputs.shape:
        raise ValueError(
            f"targets must have the outputs' shape {tuple(outputs.shape)}, "
            f"got {tuple(targets.shape)}"
        )
