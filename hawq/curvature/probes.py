"""Random signs: the probe vectors of every estimator, each a function of its seed alone.

A probe gives one product an element; a reduction adds them up to the groups that are asked about.
"""

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Reduction", "probe_seed", "rademacher", "totals"]

# From one tensor of products an input, None for zeros, to the groups' sums, (G,) float64, CPU.
Reduction = Callable[[Sequence[Tensor | None]], Tensor]


def probe_seed(seed: int, batch: int, probe: int) -> int:
    """Return the seed of one probe on one batch.

    A fresh probe for every batch: reusing one over the batches costs the same and its variance is
    up to as many times larger as there are batches.
    """
    digest = hashlib.sha256(f"{seed}/{batch}/{probe}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def rademacher(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Draw ±1 of a shape, with the type and device of ``like``.

    Drawn on the CPU, so that every device sees the same probe.
    """
    return torch.randint(2, shape, generator=generator).to(like).mul_(2).sub_(1)


def totals(parts: Sequence[Tensor | None]) -> Tensor:
    """Add each tensor up: one group an input."""
    zero = torch.zeros((), dtype=torch.float64)
    sums = [zero if part is None else part.sum(dtype=torch.float64) for part in parts]
    return torch.stack([value.cpu() for value in sums])
