"""Which examples to spend backward passes on.

A trained network is sure of most examples, and those have hardly any curvature: on CIFAR-10 five
images in a hundred hold most of the trace. An example's trace is its outputs' Hessian pulled back
through the Jacobian, so the trace u_n of that Hessian alone (1 − ‖p‖² for softmax), which one
forward pass gives, tells which examples matter. From a pool of M they are drawn without
replacement, with probability

    π_n = min(1, a·q_n),   q_n = (1 − ε)·u_n / Σu + ε / M,   ε = 0.1,

a such that N are drawn, and count N / (M π_n) times: unbiased for the pool's mean whatever u is
(Horvitz & Thompson, 1952). The uniform share keeps every weight below 1/ε. The draw is systematic:
one random offset, equal steps along the cumulated π, sorted by u.

On the trained ResNet20, 512 of 16,384 training images have 3.5 % error in the median layer and
4.4 % in the worst against all 45,000 (over 150 draws; stated: 4.8), 512 plain ones 26 and 32 %.
Sorting by label before u gained nothing there, where the pool's own choice dominates, and 1.3
instead of 1.8 % where the pool is everything; the stated error does not see it. It is not done.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hawq.curvature.columns import column_energies
from hawq.curvature.network import refuse_nonfinite
from hawq.task import Batch, Objective

__all__ = ["Draw", "draw_examples", "output_curvature"]

_UNIFORM_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Draw:
    """Examples drawn from a pool.

    Attributes:
        examples: Positions in the pool, ascending.
        weights: N / (M π) of each, same order; their mean is close to 1.
    """

    examples: tuple[int, ...]
    weights: tuple[float, ...]


@torch.no_grad()
def output_curvature(task: Objective, model: nn.Module, batch: Batch) -> Tensor:
    """Return the trace of each example's Hessian in the outputs, shape (N,), float64.

    Signed factors count with their magnitude: what bends down matters as much.

    Args:
        task: Gives the factors.
        model: The network, in eval mode.
        batch: The examples.

    Raises:
        ValueError: If the task gives no factors.
        NonFiniteTraceError: If an output is NaN or infinite.
    """
    curvature = task.curvature(model, batch)
    if curvature is None:
        raise ValueError("output_curvature needs the task's curvature(), got None")
    outputs, factors = curvature
    refuse_nonfinite(outputs, "network's output", "the pool")
    return sum(
        (column_energies(outputs, factor).sum(1).cpu() for factor in factors),
        torch.zeros(len(outputs), dtype=torch.float64),
    ).clamp_min(0)


def draw_examples(curvature: Tensor, num: int, seed: int) -> Draw:
    """Draw examples in proportion to their curvature, mixed with uniform.

    Args:
        curvature: u, not negative, shape (M,).
        num: How many; the whole pool where it has no more.
        seed: Of the offset.

    Raises:
        ValueError: If ``curvature`` is negative or not finite, or ``num`` is not positive.
    """
    if num < 1 or not bool(torch.isfinite(curvature).all()) or bool((curvature < 0).any()):
        raise ValueError("curvature must be finite and not negative, and num positive")
    pool, total = len(curvature), float(curvature.double().sum())
    if num >= pool:
        return Draw(tuple(range(pool)), (1.0,) * pool)
    share = curvature.double() / total if total else torch.full((pool,), 1 / pool).double()
    q = (1 - _UNIFORM_SHARE) * share + _UNIFORM_SHARE / pool
    # By size: neighbours are alike, so equal steps take their shares of the small and of the large.
    order = q.argsort(stable=True)
    pi = _inclusion(q[order], num)
    generator = torch.Generator().manual_seed(seed)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    steps = torch.arange(num, dtype=torch.float64) + offset
    ends = pi.cumsum(0)
    ends *= num / ends[-1]  # against rounding; it is the sum of num steps
    steps_end = torch.searchsorted(ends, steps, right=True).clamp_(max=pool - 1)
    drawn, at = order[steps_end].sort()
    weights = num / (pool * pi[steps_end[at]])
    return Draw(tuple(drawn.tolist()), tuple(weights.tolist()))


def _inclusion(q: Tensor, num: int) -> Tensor:
    """Return π = min(1, a·q) with Σπ = num."""
    certain = torch.zeros(len(q), dtype=torch.bool)
    while True:
        rest = q[~certain].sum()
        pi = torch.where(certain, 1.0, (num - int(certain.sum())) * q / rest)
        if bool((pi <= 1).all()):
            return pi
        certain |= pi >= 1
