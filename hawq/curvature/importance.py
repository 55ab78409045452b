"""Which examples to spend backward passes on.

A trained network is sure of most examples, and those have hardly any curvature: on CIFAR-10 five
images in a hundred hold most of the trace. An example's trace is its outputs' Hessian pulled back
through the Jacobian, so the trace u_n of that Hessian alone (1 − ‖p‖² for softmax), which one
forward pass gives, tells which examples matter. They are drawn with probability

    q_n = (1 − ε)·u_n / Σu + ε / M,   ε = 0.1,

from a pool of M, and weighted by 1 / (M q_n): unbiased for the pool's mean whatever u is, and the
uniform share keeps every weight below 1/ε. The draw is systematic (one random offset, equal steps
along the cumulated q), which never has more than one draw too many or too few of any example.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hawq.curvature.network import refuse_nonfinite
from hawq.task import Batch, Task

__all__ = ["Draw", "draw_examples", "output_curvature"]

_UNIFORM_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Draw:
    """Examples drawn from a pool.

    Attributes:
        examples: Positions in the pool, ascending; one may occur several times.
        weights: 1 / (M q) of each, same order; their mean is close to 1.
    """

    examples: tuple[int, ...]
    weights: tuple[float, ...]


@torch.no_grad()
def output_curvature(task: Task, model: nn.Module, batch: Batch) -> Tensor:
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
    found = torch.zeros(len(outputs), dtype=torch.float64)
    for factor in factors:
        for column in range(factor.rank):
            s = torch.zeros(len(outputs), factor.rank, device=outputs.device, dtype=outputs.dtype)
            s[:, column] = 1
            found += factor.apply(s).flatten(1).double().square().sum(1).cpu()
    return found


def draw_examples(curvature: Tensor, num: int, seed: int) -> Draw:
    """Draw examples in proportion to their curvature, mixed with uniform.

    Args:
        curvature: u, not negative, shape (M,).
        num: How many.
        seed: Of the offset.

    Raises:
        ValueError: If ``curvature`` is negative or not finite, or ``num`` is not positive.
    """
    if num < 1 or not bool(torch.isfinite(curvature).all()) or bool((curvature < 0).any()):
        raise ValueError("curvature must be finite and not negative, and num positive")
    pool, total = len(curvature), float(curvature.double().sum())
    share = curvature.double() / total if total else torch.full((pool,), 1 / pool).double()
    q = (1 - _UNIFORM_SHARE) * share + _UNIFORM_SHARE / pool
    generator = torch.Generator().manual_seed(seed)
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    steps = (torch.arange(num, dtype=torch.float64) + offset) / num
    drawn = torch.searchsorted(q.cumsum(0), steps).clamp_(max=pool - 1)
    weights = 1 / (pool * q[drawn])
    return Draw(tuple(drawn.tolist()), tuple(weights.tolist()))
