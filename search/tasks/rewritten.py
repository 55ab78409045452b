"""A task whose network is written in other layers first: all that follows sees that network.

With folded batch-norms, curvature, Ω and trials are of the weights that integer hardware multiplies
with; with projected attention, all of its weights are weights of layers.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hawq.attention import project_attention
from hawq.finetune import fold_batch_norm
from hawq.finetune.folding import Foldable, foldable
from hawq.task import Batch, Factor, Task, curved

__all__ = ["FoldedTask", "ProjectedTask", "folding"]


@dataclass(frozen=True)
class _RewrittenTask(ABC):
    """Another task with a network that computes the same; see ``hawq.task.Task``.

    What else the task has, it has too: a score that is no mean, a divergence to learn by, pictures.

    Attributes:
        inner: The task as it was.
    """

    inner: Task

    def __getattr__(self, name: str) -> Any:
        # Asked of what is being unpickled, which has no inner task yet.
        if name == "inner" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def score_name(self) -> str:
        """The inner task's."""
        return self.inner.score_name

    @property
    def fingerprint(self) -> str:
        """The inner task's."""
        return self.inner.fingerprint

    @property
    def search_seen(self) -> bool:
        """The inner task's."""
        return self.inner.search_seen

    @abstractmethod
    def model(self) -> nn.Module:
        """Build the network and rewrite it."""

    def size(self, split: str) -> int:
        """Count the examples of a split."""
        return self.inner.size(split)

    def batch(self, split: str, indices: Tensor) -> Batch:
        """Return the inner task's examples."""
        return self.inner.batch(split, indices)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Augment as the inner task does."""
        return self.inner.augment(batch, generator)

    def inputs(self, batch: Batch) -> Tensor:
        """Return what the network takes."""
        return self.inner.inputs(batch)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each example's loss, shape (N,)."""
        return self.inner.losses(model, batch)

    def curvature(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Sequence[Factor]] | None:
        """Return the inner task's outputs and factors."""
        return self.inner.curvature(model, batch)

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each example's score, shape (N,), or what it adds to it, shape (N, …)."""
        return self.inner.scores(model, batch)

    def smoothed(self) -> tuple[Task, str]:
        """Smooth the inner task, if it asks for that."""
        inner, what = curved(self.inner)
        return replace(self, inner=inner), what


class FoldedTask(_RewrittenTask):
    """With batch-norms folded into the layers before them."""

    @property
    def fingerprint(self) -> str:
        """Another one than the inner task's: the weights to quantize are others."""
        return hashlib.sha256(f"{self.inner.fingerprint} folded".encode()).hexdigest()[:16]

    def model(self) -> nn.Module:
        """Build the network and fold it."""
        return fold_batch_norm(self.inner.model(), _example(self.inner))


class ProjectedTask(_RewrittenTask):
    """With the projections of torch's attention as layers of their own."""

    def model(self) -> nn.Module:
        """Build the network and take its attention apart."""
        return project_attention(self.inner.model())


def folding(task: FoldedTask) -> Foldable:
    """Tell which batch-norms its network's layers take in, and why the others stay."""
    return foldable(task.inner.model(), _example(task.inner))


def _example(task: Task) -> Tensor:
    return task.inputs(task.batch("train", torch.arange(1)))
