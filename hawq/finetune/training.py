"""Gradient descent by epochs, each a pure function of (weights, optimizer state, seed, epoch).

The same loop trains a network from scratch and fine-tunes its quantized form, so every candidate
of a comparison meets one recipe. An interrupted run resumes after its last whole epoch with the
same bits as an undisturbed one.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from hawq.curvature.probes import probe_seed
from hawq.finetune.averaging import WeightAverage
from hawq.finetune.batch_norm import batch_norms
from hawq.finetune.distillation import distilled_losses
from hawq.finetune.fake_quantizers import ActivationQuantizer, WeightQuantizer
from hawq.finetune.recipe import Recipe
from hawq.finetune.staging import Staging
from hawq.space import evaluating
from hawq.task import Batch, Task, at_once, moved, pooled_scores

__all__ = ["DivergedError", "evaluate", "make_optimizer", "train_epoch"]


class DivergedError(ValueError):
    """The training loss became NaN or infinite."""


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Make the recipe's optimizer: decayed weights, plain vectors, scales, and decayed scales."""
    quantizers = [
        m for m in model.modules() if isinstance(m, WeightQuantizer | ActivationQuantizer)
    ]
    is_scale = {id(quantizer.scale) for quantizer in quantizers}
    learned = [quantizer for quantizer in quantizers if quantizer.scale.requires_grad]
    # PACT's scale is a clipping value: only a decayed one comes down (Choi et al., 2018).
    clipping = [quantizer.scale for quantizer in learned if quantizer.scheme.learning == "pact"]
    scales = [quantizer.scale for quantizer in learned if quantizer.scheme.learning != "pact"]
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in is_scale]
    weights = [p for p in others if p.ndim > 1]
    vectors = [p for p in others if p.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay, "factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
        {"params": scales, "weight_decay": 0.0, "factor": recipe.scale_lr},
        {"params": clipping, "weight_decay": recipe.weight_decay, "factor": recipe.scale_lr},
    ]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
    )


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    task: Task,
    recipe: Recipe,
    *,
    epoch: int,
    seed: int,
    teacher: nn.Module | None = None,
    average: WeightAverage | None = None,
    staging: Staging | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> float:
    """Train for one epoch.

    Args:
        model: Trained in place, on whatever device it is.
        optimizer: From ``make_optimizer``; its learning rate is set here.
        task: Gives the training split, its augmentation and the loss.
        recipe: How to train.
        epoch: Which epoch, from 0; with ``seed`` it fixes order and augmentation.
        seed: Of the whole training.
        teacher: What a recipe with distillation learns from, on the same device; see
            ``hawq.finetune.distillation``.
        average: Takes every step's weights in.
        staging: Quantizes layers one after the other; None: all are from the start.
        on_step: Called with the steps done and the steps of the epoch.

    Returns:
        Mean training loss.

    Raises:
        DivergedError: If the loss is NaN or infinite.
        ValueError: If the training split is smaller than a batch, or a recipe with distillation
            has no teacher.
    """
    if recipe.distillation and teacher is None:
        raise ValueError(f"distillation must be 0 without a teacher, got {recipe.distillation:g}")
    generator = torch.Generator().manual_seed(probe_seed(seed, epoch, 0))
    size = task.size("train")
    steps = recipe.steps_per_epoch(size)
    order = torch.randperm(size, generator=generator)
    device = next(model.parameters()).device
    _train_mode(model, freeze=epoch >= recipe.freeze_batch_norm * recipe.epochs)
    total = 0.0
    with _own_randomness(probe_seed(seed, epoch, 1), device), _clipping(optimizer, model, recipe):
        for step in range(steps):
            indices = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            batch = moved(task.augment(task.batch("train", indices), generator), device)
            done, all_steps = epoch * steps + step, recipe.epochs * steps
            if staging is not None:
                staging.advance((done - 1) / all_steps, done / all_steps)
            rate = recipe.rate(done / all_steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
            with _precision(recipe, device):
                loss = _losses(model, task, batch, recipe, teacher).float().mean()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DivergedError(
                    f"the training loss must be finite, got {value} in epoch {epoch + 1}, step "
                    f"{step + 1}: lower lr (now {recipe.lr:g})"
                )
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            optimizer.step()
            if average is not None:
                average.update(model)
            total += value
            if on_step is not None:
                on_step(step + 1, steps)
    return total / steps


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    split: str,
    *,
    num_examples: int | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Score the examples of a split, shape (N,), float32, in full precision and eval mode.

    Their mean is the score.

    Args:
        model: Where it is, there it is scored.
        task: Gives the examples.
        split: ``"search"`` or ``"test"``.
        num_examples: The first ones, whose score need not be a part of the whole split's: mAP is
            not; None: all.
        batch_size: Examples at once, at most.
    """
    device = next(model.parameters()).device
    chosen = torch.arange(task.size(split))[:num_examples]
    scores = []
    with evaluating(model):
        for indices in chosen.split(at_once(task, split, batch_size)):
            batch = moved(task.batch(split, indices), device)
            scores.append(task.scores(model, batch))
    return pooled_scores(task, scores)


def _losses(
    model: nn.Module, task: Task, batch: Batch, recipe: Recipe, teacher: nn.Module | None
) -> Tensor:
    if not recipe.distillation:
        return task.losses(model, batch)
    assert teacher is not None
    return distilled_losses(
        model,
        teacher,
        task,
        batch,
        weight=recipe.distillation,
        temperature=recipe.temperature,
    )


def _train_mode(model: nn.Module, *, freeze: bool) -> None:
    model.train()
    if freeze:
        for module in batch_norms(model):
            module.eval()


@contextmanager
def _clipping(optimizer: torch.optim.Optimizer, model: nn.Module, recipe: Recipe) -> Iterator[None]:
    """Shorten gradients right before each step: after whatever else was to be done to them."""
    if recipe.clip_norm is None:
        yield
        return
    length = recipe.clip_norm

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), length)

    handle = optimizer.register_step_pre_hook(clip)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Seed what the network draws itself (dropout), and leave the caller's generators alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _precision(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16")
