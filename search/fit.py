"""Training that survives its process: whole epochs on disk, the rest done again.

Used for the network itself where it has no checkpoint, and for every trial. A folder holds
``checkpoint.pt`` after each epoch and ``progress.json`` within one.
"""

import io
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hawq.finetune import (
    DivergedError,
    Recipe,
    WeightAverage,
    evaluate,
    make_optimizer,
    reestimate,
    train_epoch,
)
from hawq.finetune.batch_norm import has_statistics, statistics_batches
from hawq.finetune.distillation import refuse_undistillable
from hawq.finetune.staging import Staging
from hawq.task import Task
from search.artefacts import EpochRecord
from search.crew import Crew, shared
from search.folder import write_atomically

__all__ = ["Progress", "fit", "read_progress", "refuse_impossible", "saved_epochs"]

_PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is.

    Attributes:
        done: Epochs, with the fraction of the present one.
        total: Epochs in all.
        score: Last score on the search split; None before the first.
    """

    done: float
    total: int
    score: float | None


def fit(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    folder: Path,
    seed: int,
    teacher: nn.Module | None = None,
    staging: Staging | None = None,
    on_epoch: Callable[[EpochRecord], None] = lambda _: None,
    on_scored: Callable[[EpochRecord], None] = lambda _: None,
    crew: Crew | None = None,
) -> list[EpochRecord]:
    """Train in place, resuming after the last whole epoch in ``folder``.

    Args:
        model: On its device; after this it holds the final weights: the last epoch's, or their
            average, with batch-norm statistics estimated again where the recipe says so.
        task: Data, loss and score.
        recipe: How to train.
        folder: For the checkpoint and the progress.
        seed: Of the training.
        teacher: What a recipe with distillation learns from, on the same device.
        staging: Quantizes layers one after the other; None: all are from the start.
        on_epoch: Called after each new epoch, once it is on disk; the network then has the weights
            that were scored.
        on_scored: The same before it is on disk: an epoch that is lost then will be done again.
        crew: The processes that train it together; only their chief writes. None: this one alone.

    Returns:
        All epochs, the first before any training.

    Raises:
        DivergedError: If the loss is NaN or infinite, or the score is.
        ValueError: If the recipe does not suit the task or the network.
    """
    refuse_impossible(recipe, task, model)
    whole = task
    folder.mkdir(parents=True, exist_ok=True)
    # Convolutions are faster so: a step of ResNet20 in float32 by 10 to 20 % on a CPU. Module.to
    # would refuse the weights of convolutions in three dimensions.
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, recipe)
    average = None if recipe.ema is None else WeightAverage(model, recipe.ema)
    records = saved_epochs(folder)
    if records:
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        if average is not None and "average" in saved:  # after the last epoch none is needed
            average.load_state_dict(saved["average"])
    is_chief = crew is None or crew.is_chief
    if crew is not None:
        crew.join(model, optimizer)
        task = shared(task, crew)
    started = time.monotonic()
    for epoch in range(len(records), recipe.epochs + 1):
        loss = None
        if epoch:
            reporter = _Reporter(folder, epoch - 1, recipe.epochs, records[-1].search_score)
            loss = train_epoch(
                model,
                optimizer,
                task,
                recipe,
                epoch=epoch - 1,
                seed=seed,
                teacher=teacher,
                average=average,
                staging=staging,
                on_step=reporter if is_chief else None,
            )
        if epoch == recipe.epochs:
            _finish(model, whole, recipe, seed, average)
            average = None
        score = _score(model, task, crew, average)
        if not math.isfinite(score):
            raise DivergedError(
                f"the score on the search split must be finite, got {score} after epoch {epoch}: "
                f"lower lr (now {recipe.lr:g})"
            )
        seconds = time.monotonic() - started
        records.append(EpochRecord(epoch=epoch, loss=loss, search_score=score, seconds=seconds))
        started = time.monotonic()
        with _averaged(model, average):
            on_scored(records[-1])
        if not is_chief:
            with _averaged(model, average):
                on_epoch(records[-1])
            continue
        buffer = io.BytesIO()
        epochs = [record.model_dump() for record in records]
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epochs}
        if average is not None:
            saved["average"] = average.state_dict()
        torch.save(saved, buffer)
        write_atomically(folder / "checkpoint.pt", buffer.getvalue())
        _write_progress(folder, Progress(epoch, recipe.epochs, score))
        with _averaged(model, average):
            on_epoch(records[-1])
    return records


def refuse_impossible(recipe: Recipe, task: Task, model: nn.Module) -> None:
    """Refuse a recipe that cannot be followed, before any training.

    Raises:
        ValueError: If the training split is smaller than a batch, the task cannot be distilled, or
            there is no batch-norm to estimate again.
    """
    recipe.steps_per_epoch(task.size("train"))
    if recipe.distillation:
        refuse_undistillable(task)
    if recipe.reestimate_batch_norm and not has_statistics(model):
        raise ValueError(
            "reestimate_batch_norm must be 0 for a network without batch-norm statistics, "
            f"got {recipe.reestimate_batch_norm}"
        )


def _finish(
    model: nn.Module, task: Task, recipe: Recipe, seed: int, average: WeightAverage | None
) -> None:
    """Give the network its final weights and statistics."""
    if average is not None:
        average.copy_to(model)
    if recipe.reestimate_batch_norm:
        device = next(model.parameters()).device
        reestimate(
            model,
            statistics_batches(task, recipe.reestimate_batch_norm, recipe.batch_size, seed, device),
        )


def _score(model: nn.Module, task: Task, crew: Crew | None, average: WeightAverage | None) -> float:
    """Score on the search split; a crew's networks agree before, and each scores its part."""
    if crew is not None:
        crew.settle(model)
    with _averaged(model, average):
        if crew is None:
            return float(evaluate(model, task, "search").mean())
        if average is not None:
            crew.settle(model)
            average.take(model)
        return crew.mean(evaluate(model, task, "search"))


@contextmanager
def _averaged(model: nn.Module, average: WeightAverage | None) -> Iterator[None]:
    """Let the network have the average of its weights, where there is one."""
    if average is None:
        yield
        return
    with average.applied(model):
        yield


def saved_epochs(folder: Path) -> list[EpochRecord]:
    """Return the epochs that a folder's checkpoint has behind it."""
    if not (folder / "checkpoint.pt").exists():
        return []
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    return [EpochRecord.model_validate(record) for record in saved["epochs"]]


def read_progress(folder: Path) -> Progress | None:
    """Return how far the training in a folder is; None before it starts."""
    path = folder / "progress.json"
    return Progress(**json.loads(path.read_text())) if path.exists() else None


class _Reporter:
    """Writes the fraction of an epoch, now and then."""

    def __init__(self, folder: Path, epoch: int, total: int, score: float | None) -> None:
        self._folder, self._epoch, self._total, self._score = folder, epoch, total, score
        self._last = time.monotonic()

    def __call__(self, step: int, steps: int) -> None:
        if time.monotonic() - self._last >= _PROGRESS_SECONDS:
            self._last = time.monotonic()
            _write_progress(
                self._folder, Progress(self._epoch + step / steps, self._total, self._score)
            )


def _write_progress(folder: Path, progress: Progress) -> None:
    document = {"done": progress.done, "total": progress.total, "score": progress.score}
    write_atomically(folder / "progress.json", json.dumps(document))
