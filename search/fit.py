"""Training that survives its process: whole epochs on disk, the rest done again.

Used for the network itself where it has no checkpoint, and for every trial. A folder holds
``checkpoint.pt`` after each epoch and ``progress.json`` within one.
"""

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hawq.finetune import Recipe, evaluate, make_optimizer, train_epoch
from hawq.task import Task
from search.artefacts import EpochRecord
from search.folder import write_atomically

__all__ = ["Progress", "fit", "read_progress", "saved_epochs"]

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
    on_epoch: Callable[[EpochRecord], None] = lambda _: None,
) -> list[EpochRecord]:
    """Train in place, resuming after the last whole epoch in ``folder``.

    Args:
        model: On its device; after this it holds the last epoch's weights.
        task: Data, loss and score.
        recipe: How to train.
        folder: For the checkpoint and the progress.
        seed: Of the training.
        on_epoch: Called after each new epoch, once it is on disk.

    Returns:
        All epochs, the first before any training.

    Raises:
        DivergedError: If the loss is NaN or infinite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(model, recipe)
    records = saved_epochs(folder)
    if records:
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    started = time.monotonic()
    for epoch in range(len(records), recipe.epochs + 1):
        loss = None
        if epoch:
            reporter = _Reporter(folder, epoch - 1, recipe.epochs, records[-1].search_score)
            loss = train_epoch(
                model, optimizer, task, recipe, epoch=epoch - 1, seed=seed, on_step=reporter
            )
        score = float(evaluate(model, task, "search").mean())
        seconds = time.monotonic() - started
        records.append(EpochRecord(epoch=epoch, loss=loss, search_score=score, seconds=seconds))
        started = time.monotonic()
        buffer = io.BytesIO()
        epochs = [record.model_dump() for record in records]
        torch.save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epochs},
            buffer,
        )
        write_atomically(folder / "checkpoint.pt", buffer.getvalue())
        _write_progress(folder, Progress(epoch, recipe.epochs, score))
        on_epoch(records[-1])
    return records


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
