"""Batch-norm statistics, estimated again for the network as it is.

Those of a checkpoint belong to its unquantized weights. Quantization shifts what the layers give,
so estimating them again repairs much of what it broke, without any training (Sun et al., 2019;
"precise batch-norm", Wu & Johnson, 2021).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from hawq.curvature.probes import probe_seed
from hawq.space import evaluating
from hawq.task import Task, moved

__all__ = ["BatchNorm", "batch_norms", "has_statistics", "reestimate", "statistics_batches"]

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def batch_norms(model: nn.Module) -> Iterator[BatchNorm]:
    """Yield the network's batch-norm layers."""
    return (module for module in model.modules() if isinstance(module, BatchNorm))


def has_statistics(model: nn.Module) -> bool:
    """Whether some batch-norm has running statistics."""
    return any(norm.running_mean is not None for norm in batch_norms(model))


@torch.no_grad()
def reestimate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set batch-norm's running statistics to those of some batches, in place.

    Mean and variance are those of all values of all batches together, as if they had been one;
    the network runs as in eval mode (no dropout), but for its batch-norms, which normalize by each
    batch's own statistics meanwhile. Whoever ran before does not matter.

    Args:
        model: Quantized or not; its modes and its weights are left as they were.
        batches: Of the network's inputs, each of shape (N, …).

    Raises:
        ValueError: If no batch-norm has running statistics, or there is no batch.
    """
    norms = [norm for norm in batch_norms(model) if norm.running_mean is not None]
    if not norms:
        raise ValueError(
            "the network must hold a batch-norm with running statistics to estimate again, got none"
        )
    seen = {norm: _Statistics(norm) for norm in norms}
    handles = [norm.register_forward_hook(seen[norm].take) for norm in norms]
    try:
        with evaluating(model):
            for norm in norms:
                norm.training = True
                norm.momentum = 1.0  # running statistics are then the last call's
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for statistics in seen.values():
            statistics.give()
    if not any(statistics.count for statistics in seen.values()):
        raise ValueError("batches must hold one that runs through a batch-norm, got none")


def statistics_batches(
    task: Task, num_batches: int, batch_size: int, seed: int, device: torch.device | str
) -> Iterator[Tensor]:
    """Yield the training inputs that statistics are estimated on, as they are.

    Without augmentation: what the network will be asked about has none either.

    Args:
        task: Gives the training split.
        num_batches: At most; a small split has fewer.
        batch_size: Examples a batch.
        seed: Chooses them; no example comes twice.
        device: Where they go.
    """
    generator = torch.Generator().manual_seed(probe_seed(seed, 0, 2))
    order = torch.randperm(task.size("train"), generator=generator)
    batches = order[: num_batches * batch_size].split(batch_size)
    for indices in batches:
        if len(indices) == batch_size or len(batches) == 1:
            yield task.inputs(moved(task.batch("train", indices), device))


class _Statistics:
    """Mean and variance of what a batch-norm reads, call by call (Chan et al., 1983), in float64.

    While they are taken the batch-norm's momentum is 1, and its own statistics the last call's.
    """

    def __init__(self, norm: BatchNorm) -> None:
        self._norm, self._momentum = norm, norm.momentum
        self._before = {name: value.clone() for name, value in norm.named_buffers()}
        self.count, self._calls = 0, 0
        mean = self._before["running_mean"].double()
        self._mean, self._squares = torch.zeros_like(mean), torch.zeros_like(mean)  # Σ (x − mean)²

    def take(self, norm: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: ARG002
        """Take in what was just read: a hook for after a call."""
        mean, variance = self._norm.running_mean, self._norm.running_var
        assert mean is not None
        assert variance is not None
        count = output.numel() // len(mean)
        total = self.count + count
        gap = mean.double() - self._mean
        self._squares += variance.double() * (count - 1) + gap**2 * (self.count * count / total)
        self._mean += gap * (count / total)
        self.count, self._calls = total, self._calls + 1

    def give(self) -> None:
        """Set the statistics; where nothing ran, those of before."""
        norm, found = self._norm, dict(self._before)
        norm.momentum = self._momentum
        if self.count:
            found["running_mean"] = self._mean
            found["running_var"] = self._squares / (self.count - 1)
            found["num_batches_tracked"] = torch.tensor(self._calls)
        for name, value in norm.named_buffers():
            value.copy_(found[name])
