"""Processes that train one network together: each step's batch is split over them.

Every process holds the whole network and takes its share of each batch. Before the optimizer steps,
the gradients are averaged in one all-reduce, whatever formed the loss (distillation calls the
network besides the task; layers that are not quantized yet have scales without a gradient): torch's
``DistributedDataParallel`` averages while the backward pass still runs, but only for what went
through its own ``forward``. A step is then the one that a single process would take, but for two
things. Batch-norm: on GPUs statistics are those of the whole batch (``SyncBatchNorm``); on CPUs,
where torch has none, every share is normalized by its own, and running statistics are averaged
over the crew before anything is scored, so that none of the examples is lost. Augmentation: every
process draws its own. So the number of processes is part of what a result depends on, and for the
same number results have the same bits.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from hawq.curvature.probes import probe_seed
from hawq.finetune import ActivationQuantizer
from hawq.finetune.batch_norm import batch_norms
from hawq.task import Batch, Task

__all__ = ["Crew", "SharedTask", "shared"]


@dataclass(frozen=True, slots=True)
class Crew:
    """One of the processes of a torch process group, and what it does with the others.

    Every method that is called by one must be called by all, in the same order.

    Attributes:
        rank: Which one, from 0; the chief, 0, is the one that writes files.
        size: How many.
        device: Where tensors are that they exchange.
    """

    rank: int
    size: int
    device: str = "cpu"

    @staticmethod
    def of_process_group(device: str) -> "Crew":
        """Return this process's place in the default group."""
        return Crew(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_chief(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def join(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Make all networks the chief's, and average gradients before each step from now on."""
        tensors = [*model.parameters(), *model.buffers()]
        for tensor in tensors:
            dist.broadcast(tensor.data, src=0)
        quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
        scales = [q.scale for q in quantizers if q.scheme.learning == "lsq"]

        def average(*_: Any) -> None:
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            self._average(grads)
            # Learned steps divide the gradient of an activation's scale by √n of the n values that
            # they saw, and a share has fewer of them than the batch.
            for scale in scales:
                if scale.grad is not None:
                    scale.grad.mul_(self.size**-0.5)

        optimizer.register_step_pre_hook(average)

    def settle(self, model: nn.Module) -> None:
        """Average what the networks measured each on its own: batch-norm's running statistics."""
        found = [b for norm in batch_norms(model) for b in norm.buffers()]
        self._average([b for b in found if b.is_floating_point()])

    def mean(self, values: Tensor) -> float:
        """Average values, shape (N,), over all processes, however many each has."""
        total = torch.stack([values.double().sum().cpu(), torch.tensor(float(len(values)))])
        total = total.to(self.device)
        dist.all_reduce(total)
        return float(total[0] / total[1])

    def agreed(self, losses: Tensor) -> Tensor:
        """Shift losses, shape (N,), so that their mean is the same on all; gradients are as before.

        All see the whole batch's loss, then, and diverge together or not at all.
        """
        mean = losses.detach().float().mean()
        whole = mean / self.size
        dist.all_reduce(whole)
        return losses + (whole - mean)

    def _average(self, tensors: Iterable[Tensor]) -> None:
        kept = list(tensors)
        if not kept:
            return
        flat = _flatten_dense_tensors(kept)
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, value in zip(kept, _unflatten_dense_tensors(flat, kept), strict=True):
            tensor.copy_(value)


class SharedTask:
    """A task of which this process sees its share: of each training batch, of the search split.

    Everything else is the task's own. A score that is no mean over examples needs all of them: then
    every process scores the whole search split.

    Args:
        task: The whole.
        crew: Who shares it.
    """

    def __init__(self, task: Task, crew: Crew) -> None:
        self._task: Any = task
        self._crew = crew
        self._is_pooled = hasattr(task, "pooled")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def size(self, split: str, /) -> int:
        """Count the examples: of the training split all, for a batch of them is what is shared."""
        whole: int = self._task.size(split)
        if split == "train" or self._is_pooled:
            return whole
        return len(range(self._crew.rank, whole, self._crew.size))

    def batch(self, split: str, indices: Tensor, /) -> Batch:
        """Return this process's share of a training batch, or its own examples of another split."""
        rank, size = self._crew.rank, self._crew.size
        if split == "train":
            return self._task.batch(split, indices[rank::size])
        return self._task.batch(split, indices if self._is_pooled else indices * size + rank)

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Augment the share by randomness of its own; all draw one number from ``generator``."""
        drawn = int(torch.randint(1 << 62, (), generator=generator))
        own = torch.Generator().manual_seed(probe_seed(drawn, self._crew.rank, 0))
        return self._task.augment(batch, own)

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the share's losses, with the mean of the whole batch's."""
        return self._crew.agreed(self._task.losses(model, batch))


class _SharedDistillableTask(SharedTask):
    """The same of a task whose network may learn from an unquantized one."""

    def distillation(self, outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
        """Return the share's divergences, with the mean of the whole batch's."""
        found: Tensor = self._task.distillation(outputs, teacher_outputs, temperature)
        return self._crew.agreed(found)


def shared(task: Task, crew: Crew) -> SharedTask:
    """Return the share of a task that one of a crew sees."""
    is_distillable = hasattr(task, "distillation")
    return _SharedDistillableTask(task, crew) if is_distillable else SharedTask(task, crew)
