"""The columns of a loss's square root, example by example, the largest first.

Of B_n B_nᵀ = ∇²ℓ_n a trained network leaves little: on CIFAR-10 one direction of each example
holds nine tenths of the trace, three hold 99 in a hundred. With V orthogonal, B V is a square root
as good as B, so each example's largest columns are turned into their principal directions, and a
direction whose energy ‖B v‖² cannot matter need not be pulled back through the network.

What the leading directions leave is still there to be sampled: for random signs s,
B (I − V Vᵀ) s has covariance B Bᵀ − B V Vᵀ Bᵀ, the rest and nothing else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hawq.task import Factor

__all__ = ["Directions", "column_energies", "directions"]

# Columns of an example that are turned together; a Gram matrix of so many is decomposed.
_TURNED = 64
# Outputs of an example above which columns are taken to be zero in nearly all: those of a detector.
_WIDE = 1 << 14


@dataclass(frozen=True, slots=True)
class Directions:
    """Orthonormal directions in the R columns of every example's factor, by falling energy.

    The first K mix the K largest columns, none where all are orthogonal; after them come the other
    columns as they are.

    Attributes:
        factor: What they are directions of.
        order: Columns by falling energy, shape (N, R).
        vectors: Coordinates of direction k in the K largest columns, shape (N, K, K), last axis k.
        energy: ‖B v‖² of every direction, shape (N, R), float64.
    """

    factor: Factor
    order: Tensor
    vectors: Tensor
    energy: Tensor

    def signs(self, k: int) -> Tensor:
        """Return direction k of every example as coordinates of the columns, shape (N, R)."""
        s = self.vectors.new_zeros(self.order.shape)
        turned = self.vectors.shape[2]
        if k < turned:
            return s.scatter_(1, self.order[:, :turned], self.vectors[:, :, k])
        return s.scatter_(1, self.order[:, k : k + 1], 1.0)

    def remainder(self, signs: Tensor, num: int) -> Tensor:
        """Take every example's first ``num`` directions out of s, shape (N, R)."""
        turned = self.vectors.shape[2]
        rest = signs.gather(1, self.order)
        leading = self.vectors[:, :, : min(num, turned)]
        head = rest[:, :turned, None]
        head = head - leading @ (leading.transpose(1, 2) @ head)
        rest = torch.cat([head[:, :, 0], rest[:, turned:]], 1)
        rest[:, turned : max(num, turned)] = 0
        return torch.zeros_like(signs).scatter_(1, self.order, rest)


def column_energies(outputs: Tensor, factor: Factor) -> Tensor:
    """Return ‖B e_c‖² of every example and column, shape (N, R), float64."""
    if factor.energies is not None:
        return factor.energies.double()
    columns = []
    for column in range(factor.rank):
        s = outputs.new_zeros(len(outputs), factor.rank)
        s[:, column] = 1
        columns.append(factor.apply(s).reshape(len(s), -1).double().square().sum(1))
    return torch.stack(columns, 1)


def directions(outputs: Tensor, factor: Factor) -> Directions:
    """Find the principal directions of every example's largest columns.

    Args:
        outputs: The network's, shape (N, …).
        factor: Signed square root of the losses' Hessian in them.
    """
    energies = column_energies(outputs, factor)
    energy, order = energies.sort(dim=1, descending=True, stable=True)
    if factor.orthogonal:
        return Directions(factor, order, outputs.new_zeros(len(outputs), 0, 0), energy)
    turned = min(factor.rank, _TURNED)

    def column(k: int) -> Tensor:
        s = outputs.new_zeros(len(outputs), factor.rank).scatter_(1, order[:, k : k + 1], 1.0)
        return factor.apply(s).reshape(len(s), -1)

    if outputs[0].numel() <= _WIDE:
        columns = [column(k).double() for k in range(turned)]
    else:  # made twice, so that no more than one is in memory in full
        touched = torch.zeros(outputs[0].numel(), dtype=torch.bool, device=outputs.device)
        for k in range(turned):
            touched |= (column(k) != 0).any(0)
        columns = [column(k)[:, touched].double() for k in range(turned)]
    root = torch.stack(columns, 2)
    values, vectors = torch.linalg.eigh(root.transpose(1, 2) @ root)
    energy = torch.cat([values.flip(1).clamp_min(0), energy[:, turned:]], 1)
    return Directions(factor, order, vectors.flip(2).to(outputs.dtype), energy)
