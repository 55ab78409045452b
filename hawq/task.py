"""The contract between a network with its data and everything that searches over it.

A task is a picklable description that builds the same network and the same examples anywhere: on
the driver, on a worker of another machine, after a restart. It holds no open files and computes
nothing in its constructor. ``hawq.testing.check_task`` tells whether an object keeps the contract.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = [
    "Batch",
    "Distillable",
    "Factor",
    "Objective",
    "Pooled",
    "Smoothed",
    "Task",
    "at_once",
    "curved",
    "moved",
    "pooled_scores",
]

# Numbers in the inputs of examples that are passed through a network at once without gradients:
# 1,365 images of CIFAR, 4 of 800×1333 pixels at most.
_AT_ONCE = 1 << 22

# Tensors in any nesting of tuples, lists and dicts; only the task looks inside.
Batch = Any


@dataclass(frozen=True, slots=True)
class Factor:
    """A square root of the loss's Hessian in the network's outputs, sample by sample.

    Σ over a task's factors of ``sign`` · B Bᵀ equals ∇²ℓ; one factor with sign +1 is enough where
    the loss is convex in the outputs.

    Attributes:
        rank: Columns R of B.
        apply: Maps s, shape (N, R), to B s, of the outputs' shape.
        sign: +1 or −1.
        energies: ‖B e_c‖² of every column, shape (N, R), where there is a formula; None computes
            them by R applications.
        orthogonal: Whether B's columns are, of every example: then they are its directions.
    """

    rank: int
    apply: Callable[[Tensor], Tensor]
    sign: float = 1.0
    energies: Tensor | None = None
    orthogonal: bool = False


class Objective(Protocol):
    """A loss over examples: all that curvature needs of a task."""

    def size(self, split: str, /) -> int:
        """Count the examples of a split."""
        ...

    def batch(self, split: str, indices: Tensor, /) -> Batch:
        """Return examples by index, shape (N,), always the same for the same indices."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each example's loss, shape (N,); the training loss is their mean.

        An example's loss must not depend on the others of its batch (in eval mode).
        """
        ...

    def curvature(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Sequence[Factor]] | None:
        """Return the outputs, shape (N, …), and the factors of the losses' Hessian in them.

        None where no factor is known: curvature then needs Hessian-vector products.
        """
        ...


@runtime_checkable
class Task(Objective, Protocol):
    """A network, its data, its loss and its score.

    Splits are ``"train"`` (fine-tuning and curvature), ``"search"`` (held out from the training
    data; ranks candidates) and ``"test"`` (read once, by the report).

    """

    @property
    def score_name(self) -> str:
        """What ``scores`` measures, for tables and axes: ``"accuracy"``."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash that changes whenever the network's structure, the data or the splits do."""
        ...

    @property
    def search_seen(self) -> bool:
        """Whether the network was trained on the search split.

        If so, its scores there rank candidates but do not measure drops.
        """
        ...

    def model(self) -> nn.Module:
        """Build the network, float32, on the CPU; its weights may be loaded over afterwards."""
        ...

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Return a training batch with random augmentation, drawn from ``generator`` alone."""
        ...

    def inputs(self, batch: Batch) -> Tensor:
        """Return what the network takes, shape (N, …)."""
        ...

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each example's score, shape (N,), higher is better; the split's is their mean.

        Of a ``Pooled`` task: what each example adds to the score, shape (N, …).
        """
        ...


class Distillable(Protocol):
    """What a task has besides, if its network may learn from an unquantized one."""

    def distillation(self, outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
        """Return how far each example's outputs are from the teacher's, shape (N,), 0 or more.

        Args:
            outputs: What the network returned while its losses were computed, float32.
            teacher_outputs: What the unquantized network returned for the same batch.
            temperature: By which both are divided before they become probabilities, say; the
                training multiplies by its square.
        """
        ...


class Pooled(Protocol):
    """What a task has besides, if its score is no mean over examples, such as COCO's mAP."""

    def pooled(self, values: Tensor) -> Tensor:
        """Return numbers, shape (N,), whose mean is the score, from what ``scores`` returned.

        Args:
            values: Of all examples that the score is of, shape (N, …), on the CPU.

        Returns:
            Pseudo-values: their standard deviation over √N is the score's standard error.
        """
        ...


class Smoothed(Protocol):
    """What a task has besides, if its loss has no curvature where it should have some.

    The L1 loss of a detector's boxes: with a trace of 0 their branch would get the fewest bits.
    """

    def smoothed(self) -> "tuple[Task, str]":
        """Return the task whose loss is differentiated twice instead, and in words what differs."""
        ...


def at_once(task: Objective, split: str, most: int) -> int:
    """Return how many examples to pass through a network at once, up to ``most``.

    Photographs are so much larger than thumbnails that no number suits both.
    """
    example = tree_leaves(task.batch(split, torch.arange(1)))
    numbers = max(leaf.numel() for leaf in example if isinstance(leaf, Tensor))
    return max(1, min(most, _AT_ONCE // numbers))


def curved(task: Task) -> tuple[Task, str]:
    """Return the task that curvature is of, mostly itself, and in words what differs, if so."""
    return task.smoothed() if hasattr(task, "smoothed") else (task, "")


def pooled_scores(task: Task, values: Sequence[Tensor]) -> Tensor:
    """Return what a score is the mean of, shape (N,), float32, on the CPU.

    Args:
        task: Whose ``scores`` they are.
        values: Of batches, in order.
    """
    together = torch.cat([part.float().cpu() for part in values])
    # Not isinstance: what wraps a task passes on what it has.
    return task.pooled(together).float() if hasattr(task, "pooled") else together


def moved(batch: Batch, device: torch.device | str) -> Batch:
    """Return a batch with all its tensors on a device."""
    return tree_map_only(torch.Tensor, lambda x: x.to(device), batch)
