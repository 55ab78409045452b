"""Random signs: the probe vectors of every estimator, each a function of its seed alone."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["probe_seed", "rademacher"]


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
