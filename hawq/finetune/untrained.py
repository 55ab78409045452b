"""Losses of a network that is quantized and not trained, in one way after another."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hawq.finetune.attachment import attach, detach
from hawq.finetune.calibration import calibrate, sample_activations
from hawq.finetune.fake_quantizers import ActivationQuantizer
from hawq.quantizers import Schemes
from hawq.space import evaluating
from hawq.task import Batch, Task, at_once, moved

__all__ = ["untrained_losses"]

_BATCH = 64


@torch.no_grad()
def untrained_losses(
    model: nn.Module,
    task: Task,
    allocations: Sequence[Mapping[str, int]],
    indices: Tensor,
    inputs: Callable[[], Iterable[Tensor]],
    schemes: Schemes | None = None,
) -> Tensor:
    """Evaluate each example's loss under several quantizations, in eval mode.

    Each is quantized as before fine-tuning: weights in the ranges of least squared error, ranges
    of activations from ``inputs`` with the weights quantized. Where no weight is, the activations
    are sampled once for all.

    Args:
        model: The network in floating point, left as it was.
        task: Gives the training examples and the loss.
        allocations: J of them: the bits of what is quantized, as ``attach`` takes them; all else
            stays in floating point. One without names is the network itself.
        indices: Training examples, shape (N,); all of them are held in memory.
        inputs: Makes the batches of inputs that ranges come from, each of shape (N, …).
        schemes: How weights and activations are quantized; None as ``attach`` has it.

    Returns:
        Losses, shape (J, N), float64, on the CPU. A row depends on its own allocation alone.
    """
    device = next(model.parameters()).device
    size = at_once(task, "train", _BATCH)
    batches = [moved(task.batch("train", part), device) for part in indices.split(size)]
    example = task.inputs(moved(task.batch("train", torch.arange(1)), device))
    samples = _samples(model, allocations, example, inputs, schemes)
    rows = []
    for bits in allocations:
        attach(model, bits, example, schemes)
        try:
            if _is_sampled(bits):
                for module in model.modules():
                    if isinstance(module, ActivationQuantizer) and module.name in samples:
                        module.calibrate(samples[module.name])
            elif any(name.startswith("a:") for name in bits):
                calibrate(model, inputs())
            rows.append(_losses(model, task, batches))
        finally:
            detach(model)
    return torch.stack(rows)


def _is_sampled(bits: Mapping[str, int]) -> bool:
    """Whether whole activation tensors are quantized, and nothing else."""
    return bool(bits) and all(name.startswith("a:") and "[" not in name for name in bits)


def _samples(
    model: nn.Module,
    allocations: Sequence[Mapping[str, int]],
    example: Tensor,
    inputs: Callable[[], Iterable[Tensor]],
    schemes: Schemes | None,
) -> dict[str, Tensor]:
    """Sample the tensors that are quantized where no weight is, in one pass over the inputs."""
    names = {name: 8 for bits in allocations if _is_sampled(bits) for name in bits}
    if not names:
        return {}
    attach(model, names, example, schemes)
    try:
        return sample_activations(model, inputs())
    finally:
        detach(model)


def _losses(model: nn.Module, task: Task, batches: Sequence[Batch]) -> Tensor:
    with evaluating(model):
        return torch.cat([task.losses(model, batch).double().cpu() for batch in batches])
