"""The unquantized network as a teacher (Hinton et al., 2015): its outputs are a part of the loss.

Outputs are what the network returns while the task computes its losses, so any task can be
distilled that says how far two outputs are from each other; see ``hawq.task.Distillable``.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from hawq.task import Batch, Distillable, Task

__all__ = ["distilled_losses", "frozen_teacher", "refuse_undistillable"]


def frozen_teacher(model: nn.Module) -> nn.Module:
    """Put a network into eval mode and without gradients, in place, to be imitated."""
    return model.eval().requires_grad_(False)


def distilled_losses(
    model: nn.Module,
    teacher: nn.Module,
    task: Task,
    batch: Batch,
    *,
    weight: float,
    temperature: float,
) -> Tensor:
    """Evaluate each example's loss, (1 − α) · loss + α · T² · divergence, shape (N,), float32.

    T² keeps the size of the divergence's gradient, which falls with 1/T².

    Args:
        model: The network that learns.
        teacher: The one it learns from, from ``frozen_teacher``.
        task: Gives the losses, and the divergence of outputs.
        batch: Both networks see it as it is, augmented.
        weight: α.
        temperature: T.

    Raises:
        ValueError: If the task has no divergence, or does not call its network exactly once, for
            one tensor.
    """
    refuse_undistillable(task)
    losses, outputs = _losses_and_outputs(model, task, batch)
    with torch.no_grad():
        _, wanted = _losses_and_outputs(teacher, task, batch)
    divergence = cast(Distillable, task).distillation(outputs.float(), wanted.float(), temperature)
    if divergence.shape != losses.shape:
        raise ValueError(
            f"{type(task).__name__}.distillation must return shape {tuple(losses.shape)}, a value "
            f"an example, got {tuple(divergence.shape)}"
        )
    return (1 - weight) * losses.float() + weight * temperature**2 * divergence.float()


def refuse_undistillable(task: Task) -> None:
    """Refuse a task that does not say how far two outputs are from each other.

    Raises:
        ValueError: With the task's name.
    """
    # Not isinstance: what wraps a task passes on what it has.
    if not hasattr(task, "distillation"):
        raise ValueError(
            f"distillation must be 0 for {type(task).__name__}, which has no method "
            "distillation(outputs, teacher_outputs, temperature)"
        )


def _losses_and_outputs(model: nn.Module, task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the task's losses, and what the network returned meanwhile."""
    returned: list[Any] = []

    def keep(_: nn.Module, __: object, output: Any) -> None:
        returned.append(output)

    handle = model.register_forward_hook(keep)
    try:
        losses = task.losses(model, batch)
    finally:
        handle.remove()
    if len(returned) != 1 or not isinstance(returned[0], Tensor):
        kinds = ", ".join(type(output).__name__ for output in returned) or "no call"
        raise ValueError(
            f"{type(task).__name__}.losses must call its network once, for one tensor, to be "
            f"distilled, got {kinds}"
        )
    return losses, returned[0]
