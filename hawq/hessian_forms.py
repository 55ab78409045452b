"""The Hessian of a loss with many inputs, where it has a form of few numbers.

A detector's loss is of thousands of logits and boxes. Its Hessian in them is

    ∇²ℓ = Q diag(h) Qᵀ

with Q the identity where the loss is a sum over elements (focal loss, smooth L1), and by rows where
it is a sum over rows: Q = I − p1ᵀ and h = w·p, hence w · (diag(p) − ppᵀ), for softmax
cross-entropy, the eigenvectors of a small block for the four numbers of a box. Which of these it is
is found by Hessian-vector products, in float64, and then one more product with a random vector must
agree: a loss of another form is refused, not approximated. h may be negative.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawq.curvature.finite_difference import missing_second_derivative
from hawq.task import Factor

__all__ = ["HessianForm", "hessian_form", "joint_factors"]

# Of a product with the Hessian and with its form, and of eigenvalues.
_AGREEMENT, _ROUNDING = 1e-8, 1e-10
# Lost by products with softmax where the network is sure, relative to the slope where it is not.
_CANCELLED = 1e-13
# Inputs of a row up to which its block is formed.
_DENSE = 64

_Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class HessianForm:
    """Q diag(h) Qᵀ, of inputs that are taken as one vector of length m.

    Attributes:
        values: h, shape (m,), float64.
        norms: ‖Q e_c‖², shape (m,), float64.
        mix: Maps v, shape (m,), to Q v; None for the identity.
    """

    values: Tensor
    norms: Tensor
    mix: _Map | None = None


@torch.enable_grad()
def hessian_form(loss: _Map, at: Tensor) -> HessianForm | None:
    """Find the form of a loss's Hessian.

    Args:
        loss: Maps inputs to a scalar; is called with float64.
        at: Inputs, shape (n, …): logits, or (n, 4) boxes.

    Returns:
        None where the loss has no second derivative, or its Hessian is neither diagonal nor block
        diagonal with blocks of softmax or of at most 64 inputs, one a row.
    """
    x = at.detach().double().requires_grad_()
    flat_zeros = torch.zeros_like(x).flatten().detach()
    linear = HessianForm(flat_zeros, flat_zeros + 1)
    value = loss(x)
    if not x.numel() or not value.requires_grad:
        return linear
    if missing_second_derivative(value, [x]):
        return None
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    if not slope.requires_grad:
        return linear

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    asked = _Asked(loss, x, slope, z)
    return _diagonal(asked) or _softmax(asked) or _blocks(asked)


def joint_factors(forms: Sequence[Sequence[HessianForm]], outputs: Tensor) -> list[Factor]:
    """Join the Hessians of each example to factors of its outputs, of sign +1 and −1.

    Args:
        forms: Of each example's losses, in the order of its outputs.
        outputs: Shape (N, M); those of an example may end before M.

    Returns:
        One factor of sign +1, and where anything is negative one of −1. Their columns are an
        example's that have curvature: few of the boxes have any, few logits a negative one.
    """
    values = outputs.new_zeros(outputs.shape, dtype=torch.float64)
    norms = torch.ones_like(values)
    mixed: list[tuple[int, slice, _Map]] = []
    for i, row in enumerate(forms):
        start = 0
        for form in row:
            part = slice(start, start + len(form.values))
            values[i, part], norms[i, part] = form.values, form.norms
            if form.mix is not None:
                mixed.append((i, part, form.mix))
            start = part.stop
    factors = [_factor(1.0, values, norms, mixed, outputs)]
    if bool((values < 0).any()):
        factors.append(_factor(-1.0, values, norms, mixed, outputs))
    return factors


def _factor(
    sign: float,
    values: Tensor,
    norms: Tensor,
    mixed: Sequence[tuple[int, slice, _Map]],
    outputs: Tensor,
) -> Factor:
    energy = (sign * values).clamp_min(0)
    curved = energy > 0
    rank = max(1, int(curved.sum(1).max()))
    # An example with fewer than others is filled up with columns of zeros.
    columns = curved.to(torch.int8).argsort(stable=True, dim=1, descending=True)[:, :rank]
    energy = energy.gather(1, columns)
    root = energy.sqrt().to(outputs.dtype)
    shape, dtype = outputs.shape, outputs.dtype

    def apply(s: Tensor) -> Tensor:
        image = torch.zeros(shape, dtype=dtype, device=s.device).scatter(1, columns, root * s)
        for i, part, mix in mixed:
            image[i, part] = mix(image[i, part])
        return image

    energies = energy * norms.gather(1, columns)
    return Factor(rank, apply, sign, energies, orthogonal=not mixed)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A loss at its inputs x, its gradient with its graph, and a random vector z."""

    loss: _Map
    x: Tensor
    slope: Tensor
    z: Tensor

    def product(self, z: Tensor) -> Tensor:
        """Return H z."""
        (hz,) = torch.autograd.grad(
            self.slope, self.x, z, retain_graph=True, materialize_grads=True
        )
        return hz


def _diagonal(asked: _Asked) -> HessianForm | None:
    values = asked.product(torch.ones_like(asked.z))
    if not _agree(values * asked.z, asked.product(asked.z)):
        return None
    return HessianForm(values.flatten(), torch.ones_like(values).flatten())


def _softmax(asked: _Asked) -> HessianForm | None:
    if asked.x.ndim != 2:
        return None
    p = asked.x.detach().softmax(1)

    def covariance(z: Tensor) -> Tensor:
        return p * z - p * (p * z).sum(1, keepdim=True)

    plain, other = covariance(asked.z), asked.z.flip(1).square()
    weight = (plain * asked.product(asked.z)).sum(1) / plain.square().sum(1).clamp_min(1e-300)
    # Where the network is sure it is what rounding leaves.
    weight = weight.clamp_min(0)[:, None]
    unsure = torch.zeros_like(asked.x, requires_grad=True)
    (slope,) = torch.autograd.grad(asked.loss(unsure), unsure, materialize_grads=True)
    lost = _CANCELLED * float(slope.abs().max())
    if not _agree(weight * covariance(other), asked.product(other), lost):
        return None

    def mix(v: Tensor) -> Tensor:
        rows = v.view(p.shape)
        return (rows - p.to(v.dtype) * rows.sum(1, keepdim=True)).flatten()

    distance = 1 - 2 * p + p.square().sum(1, keepdim=True)  # ‖e_c − p‖²
    return HessianForm((weight * p).flatten(), distance.clamp_min(0).flatten(), mix)


def _blocks(asked: _Asked) -> HessianForm | None:
    x, z = asked.x.detach(), asked.z
    width = x.shape[-1] if x.ndim > 1 else x.numel()
    if width > _DENSE:
        return None
    columns = []
    for column in range(width):
        one = torch.zeros_like(x)
        one[..., column] = 1
        columns.append(asked.product(one).reshape(-1, width))
    blocks = torch.stack(columns, 2)
    if not _agree((blocks @ z.reshape(-1, width, 1)).view_as(z), asked.product(z)):
        return None
    curved = blocks.abs().amax((1, 2)).nonzero()[:, 0]  # most boxes count for nothing
    block = blocks[curved]
    h, vectors = torch.linalg.eigh((block + block.transpose(1, 2)) / 2)
    h = torch.where(h.abs() > _ROUNDING * h.abs().amax(1, keepdim=True), h, 0.0)
    values = x.new_zeros(len(blocks), width).index_copy(0, curved, h)

    def mix(v: Tensor) -> Tensor:
        rows = v.view(-1, width)
        turned = vectors.to(v.dtype) @ rows[curved][:, :, None]
        return rows.index_copy(0, curved, turned[:, :, 0]).flatten()

    return HessianForm(values.flatten(), torch.ones_like(values).flatten(), mix)


def _agree(found: Tensor, expected: Tensor, lost: float = 0.0) -> bool:
    # A NaN agrees with nothing.
    allowed = _AGREEMENT * expected.abs().max() + lost
    return bool((found - expected).abs().max() <= allowed)
