"""Softmax cross-entropy and top-1 accuracy: what tasks of classes have in common."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hawq.factors import softmax_factor
from hawq.task import Factor

__all__ = ["Classes", "is_right", "softened_divergence"]


class Classes:
    """The half of a task that follows from its batches: images (N, …) and labels (N,)."""

    __slots__ = ()

    @property
    def score_name(self) -> str:
        """Top-1 accuracy."""
        return "accuracy"

    def inputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the images."""
        return batch[0]

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return each image's cross-entropy, shape (N,)."""
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def curvature(
        self, model: nn.Module, batch: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Sequence[Factor]] | None:
        """Return the logits and softmax's factor."""
        logits: Tensor = model(batch[0])
        return logits, [softmax_factor(logits)]

    def distillation(self, outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
        """Return each image's divergence from the teacher, shape (N,)."""
        return softened_divergence(outputs, teacher_outputs, temperature)

    def scores(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return 1 where the likeliest class is right, else 0, shape (N,)."""
        return is_right(model(batch[0]), batch[1])


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1.0 where the largest of the logits, shape (N, C), is the label's, else 0.0."""
    right: Tensor = logits.argmax(1) == labels
    return right.float()


def softened_divergence(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Return KL(teacher‖network) of the softened classes, shape (N,) (Hinton et al., 2015).

    Args:
        logits: The network's, shape (N, C).
        teacher_logits: The teacher's, shape (N, C).
        temperature: Divides both.
    """
    return F.kl_div(
        (logits / temperature).log_softmax(1),
        (teacher_logits / temperature).log_softmax(1),
        reduction="none",
        log_target=True,
    ).sum(1)
