"""One eigenpair of a symmetric operator that is a mean over batches, by power iteration.

v ← Hv / ‖Hv‖, with the eigenvectors that were found before projected out. The eigenvalue λ and its
vector are read off the span of the last two iterates (Rayleigh–Ritz), whose products with H are
known anyway. That is ahead of the power steps, and it tells a pair ±λ apart, between which v itself
would swing forever.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Eigenpair", "MeanProduct", "leading_eigenpair", "precedence"]

# From v, shape (n,), and m vectors u: Hv, and uᵀH_j v for every batch j, shape (J, m).
MeanProduct = Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, NDArray[np.float64]]]


@dataclass(frozen=True, slots=True)
class Eigenpair:
    """An approximate eigenpair of H = Σ_j s_j H_j.

    Attributes:
        vector: v, shape (n,), of length 1.
        value: λ = vᵀHv.
        residual: ‖Hv − λv‖; an eigenvalue of H lies within it of λ.
        by_batch: vᵀH_j v of every batch, shape (J,).
        iterations: Products with H.
        converged: Whether the tolerance was met.
    """

    vector: Tensor
    value: float
    residual: float
    by_batch: NDArray[np.float64]
    iterations: int
    converged: bool


def leading_eigenpair(
    product: MeanProduct,
    start: Tensor,
    found: Sequence[Eigenpair] = (),
    *,
    rtol: float,
    max_iterations: int,
    eps: float,
) -> Eigenpair:
    """Find the eigenvalue of largest modulus on the complement of the eigenvectors found before.

    Args:
        product: Multiplies with H, once an iteration.
        start: Where to start, shape (n,), float64, not within the span of ``found``.
        found: The pairs to deflate.
        rtol: Stop where the residual, less its part in ``found``, is at most this part of |λ|.
        max_iterations: Products at most.
        eps: Relative rounding error of ``product``.
    """
    # What is left of H when its rank is used up: rounding, which never converges relatively.
    noise = 10 * eps * max((abs(pair.value) for pair in found), default=0.0)
    span = _Span((), (), np.zeros((0, 0, 1)))
    direction, iterations, is_converged = start, 0, False
    while not is_converged and iterations < max_iterations:
        iterations += 1
        v = _deflated(direction, found)
        v = v / v.norm()
        # Parallel to the last iterate, its difference from that is rounding, not a direction.
        is_new = all(1 - float(u @ v) ** 2 > 10 * eps for u in span.vectors[-1:])
        span = span.latest(1 if is_new else 0)
        direction, row = product(v, [*span.vectors, v])
        span = span.extended(v, direction, row)
        value, coefficients = span.ritz(rtol)
        vector = torch.stack(span.vectors, 1) @ coefficients
        residual = torch.stack(span.images, 1) @ coefficients - value * vector
        is_converged = float(_deflated(residual, found).norm()) <= rtol * abs(value) + noise
    by_batch = span.form(coefficients.cpu().numpy())
    return Eigenpair(vector, value, float(residual.norm()), by_batch, iterations, is_converged)


def precedence(value: float, rtol: float) -> float:
    """Order eigenvalues by modulus; of two that are equal within ``rtol``, the positive first."""
    return abs(value) * (1 + rtol * (value > 0))


@dataclass(frozen=True, slots=True)
class _Span:
    """One or two iterates u, the products Hu, and uᵀH_j u' for every batch, shape (m, m, J)."""

    vectors: tuple[Tensor, ...]
    images: tuple[Tensor, ...]
    forms: NDArray[np.float64]

    def latest(self, num: int) -> "_Span":
        first = max(len(self.vectors) - num, 0)
        return _Span(self.vectors[first:], self.images[first:], self.forms[first:, first:])

    def extended(self, v: Tensor, image: Tensor, row: NDArray[np.float64]) -> "_Span":
        num_batches, size = row.shape
        forms = np.empty((size, size, num_batches))
        forms[:-1, :-1] = self.forms
        forms[-1, :] = forms[:, -1] = row.T
        return _Span((*self.vectors, v), (*self.images, image), forms)

    def ritz(self, rtol: float) -> tuple[float, Tensor]:
        """Return the first Ritz value, and the coefficients of its vector, shape (m,)."""
        basis, triangle = torch.linalg.qr(torch.stack(self.vectors, 1))
        inverse = torch.linalg.inv(triangle)
        projected = basis.T @ torch.stack(self.images, 1) @ inverse
        values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
        first = max(range(len(values)), key=lambda i: precedence(float(values[i]), rtol))
        return float(values[first]), inverse @ vectors[:, first]

    def form(self, coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return vᵀH_j v for every batch, shape (J,), of the vector with these coefficients."""
        values: NDArray[np.float64] = coefficients @ (coefficients @ self.forms)
        return values


def _deflated(vector: Tensor, found: Sequence[Eigenpair]) -> Tensor:
    for pair in found:
        vector = vector.sub(pair.vector, alpha=float(pair.vector @ vector))
    return vector
