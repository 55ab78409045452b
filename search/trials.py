"""Trials: every distinct candidate fine-tuned under one recipe, in parallel under Ray Tune.

A trial is a pure function of its specification and lives in a folder of its own, named after
everything that its result depends on. Tune decides when it runs, restarts it when its worker
dies and, where asked, stops poor ones early; the folder makes a restart cost at most one epoch,
for a trial and for the whole search alike.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from torch import Tensor, nn

from hawq.finetune import DivergedError, Recipe, attach, calibrate
from hawq.task import Task, moved
from search.artefacts import EpochRecord, Trial
from search.config import TrialsConfig
from search.fit import fit, read_progress, saved_epochs
from search.folder import write_atomically
from search.tasks.checkpoint import save_state

__all__ = [
    "TrialSpec",
    "calibration_inputs",
    "num_calibration_batches",
    "quantized_model",
    "run_trial",
    "run_trials",
]

_CALIBRATION_EXAMPLES = 1024
_CALIBRATION_BATCH = 256
_POLL_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """What a trial's result depends on, and where it is kept.

    Attributes:
        digest: Of the allocation.
        bits: Of every weight and activation that is quantized, by group: ``w:LAYER``,
            ``a:LAYER#i``, or their channels.
        recipe: How to train; the same for all trials of a comparison.
        seed: Of the training; the same for all.
        folder: Where the checkpoint and the result are.
        order: Layers in the order in which their weights are quantized, block by block; empty
            quantizes all from the start.
    """

    digest: str
    bits: Mapping[str, int]
    recipe: Recipe
    seed: int
    folder: Path
    order: tuple[tuple[str, ...], ...] = ()


def quantized_model(task: Task, state: Mapping[str, Tensor], spec: TrialSpec) -> nn.Module:
    """Build the network with its quantizers attached, ranges not yet calibrated.

    Args:
        task: Builds the network.
        state: Its weights before quantization.
        spec: The bits.
    """
    model = task.model()
    model.load_state_dict(state)
    example = task.inputs(task.batch("train", torch.arange(min(2, task.size("train")))))
    attach(model, spec.bits, example)
    return model


def num_calibration_batches(task: Task) -> int:
    """Count the batches of ``calibration_inputs``."""
    return math.ceil(min(_CALIBRATION_EXAMPLES, task.size("train")) / _CALIBRATION_BATCH)


def calibration_inputs(task: Task, device: str) -> Iterator[Tensor]:
    """Return the batches that activation ranges come from, for trials and for Ω alike."""
    size = min(_CALIBRATION_EXAMPLES, task.size("train"))
    for part in torch.arange(size).split(_CALIBRATION_BATCH):
        yield task.inputs(moved(task.batch("train", part), device))


def run_trial(
    task: Task,
    state: Mapping[str, Tensor],
    spec: TrialSpec,
    *,
    device: str,
    on_epoch: Callable[[EpochRecord], None] = lambda _: None,
) -> Trial:
    """Fine-tune one allocation, or go on where its folder stands; needs no cluster.

    A diverging training is a result with its reason, not an exception.
    """
    started = time.process_time()
    model = quantized_model(task, state, spec).to(device)
    # Ranges come first into a fresh folder; a checkpoint brings its own.
    if not saved_epochs(spec.folder):
        calibrate(model, calibration_inputs(task, device))
    status, reason = "finished", ""
    try:
        records = fit(
            model, task, spec.recipe, folder=spec.folder, seed=spec.seed, on_epoch=on_epoch
        )
    except DivergedError as error:
        records, status, reason = saved_epochs(spec.folder), "failed", str(error)
    if status == "finished":
        save_state(spec.folder / "model.safetensors", model.state_dict())
    trial = Trial.model_validate(
        {
            "digest": spec.digest,
            "folder": spec.folder.name,
            "status": status,
            "reason": reason,
            "epochs": records,
            "seconds": sum(record.seconds for record in records),
            "cpu_seconds": time.process_time() - started,
        }
    )
    write_atomically(spec.folder / "result.json", trial.model_dump_json(indent=1))
    return trial


def read_trial(folder: Path) -> Trial | None:
    """Return the result in a trial's folder; None where it has not ended."""
    path = folder / "result.json"
    return Trial.model_validate(json.loads(path.read_text())) if path.exists() else None


def run_trials(
    task: Task,
    state: Mapping[str, Tensor],
    specs: Sequence[TrialSpec],
    *,
    resources: TrialsConfig,
    storage: Path,
    on_progress: Callable[[float], None] = lambda _: None,
) -> list[Trial]:
    """Run all trials that have no result yet, as many at once as fit.

    Args:
        task: Sent to every trial.
        state: Weights before quantization.
        specs: The trials.
        resources: CPUs and GPUs of each, restarts, early stopping.
        storage: Folder for Tune's own files; shared between nodes, as the trials' folders.
        on_progress: Called about every second with the epochs done by all trials together.

    Returns:
        Their results, in order; a trial whose worker died too often is one that failed.

    Raises:
        OSError: If a trial could not write its files.
    """
    pending = [spec for spec in specs if read_trial(spec.folder) is None]
    ended = {}
    if pending:
        for name in ("ray.tune", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
        watcher = _Watcher(specs, on_progress)
        grid = _tuner(task, state, pending, resources, storage, watcher).fit()
        for i, spec in enumerate(pending):
            cause = getattr(grid[i].error, "cause", grid[i].error)
            if isinstance(cause, OSError):  # a full disk is no property of a candidate
                raise cause
            ended[spec.folder] = _settled(spec, grid[i].error)
    return [read_trial(spec.folder) or ended[spec.folder] for spec in specs]


def _tuner(
    task: Task,
    state: Mapping[str, Tensor],
    specs: Sequence[TrialSpec],
    resources: TrialsConfig,
    storage: Path,
    watcher: tune.Callback,
) -> tune.Tuner:
    parameters = {
        "task": task,
        "state": dict(state),
        "specs": specs,
        "device": "cuda" if resources.gpus else "cpu",
    }
    most = max(spec.recipe.epochs for spec in specs)
    asha = ASHAScheduler(time_attr="epoch", max_t=most + 1, grace_period=1)
    return tune.Tuner(
        tune.with_resources(
            tune.with_parameters(_trainable, **parameters),
            {"cpu": resources.cpus, "gpu": resources.gpus},
        ),
        param_space={"index": tune.grid_search(list(range(len(specs))))},
        tune_config=tune.TuneConfig(
            metric="search_score",
            mode="max",
            scheduler=asha if resources.asha else FIFOScheduler(),
            max_concurrent_trials=resources.max_concurrent,
            reuse_actors=True,  # else every trial imports torch and Ray again
        ),
        run_config=tune.RunConfig(
            name=f"trials-{int(time.time())}",
            storage_path=str(storage.resolve()),
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            callbacks=[watcher],
            verbose=0,
        ),
    )


def _trainable(
    config: Mapping[str, Any],
    *,
    task: Task,
    state: Mapping[str, Tensor],
    specs: Sequence[TrialSpec],
    device: str,
) -> None:
    """Unpack, run, report to Tune."""
    spec = specs[config["index"]]
    cpus = tune.get_context().get_trial_resources().required_resources.get("CPU", 1)
    torch.set_num_threads(max(1, int(cpus)))

    def report(record: EpochRecord) -> None:
        tune.report({"epoch": record.epoch + 1, "search_score": record.search_score})

    def on_epoch(record: EpochRecord) -> None:
        if record.epoch < spec.recipe.epochs:
            report(record)

    # The last epoch is reported once its result is on disk: nothing is left to stop early then.
    trial = run_trial(task, state, spec, device=device, on_epoch=on_epoch)
    if trial.epochs:
        report(trial.epochs[-1])


def _settled(spec: TrialSpec, error: Exception | None) -> Trial:
    """Return the result of a trial, also where Tune ended it before its own end."""
    result = read_trial(spec.folder)
    if result is not None:
        return result
    records = saved_epochs(spec.folder)
    trial = Trial(
        digest=spec.digest,
        folder=spec.folder.name,
        status="stopped" if error is None else "failed",
        reason=f"stopped early after {max(0, len(records) - 1)} of {spec.recipe.epochs} epochs"
        if error is None
        else f"its worker died too often: {str(error).strip().splitlines()[-1]}",
        epochs=records,
        seconds=sum(record.seconds for record in records),
        cpu_seconds=0.0,
    )
    # A death is no result: the next run of the stage tries again.
    if error is None:
        write_atomically(spec.folder / "result.json", trial.model_dump_json(indent=1))
    return trial


class _Watcher(tune.Callback):
    """Adds up the progress that trials write into their folders."""

    def __init__(self, specs: Sequence[TrialSpec], on_progress: Callable[[float], None]) -> None:
        self._specs, self._on_progress = specs, on_progress
        self._last = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores its callbacks; the listener belongs to this process alone.
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
        """Look at the folders, about once a second."""
        if time.monotonic() - self._last < _POLL_SECONDS:
            return
        self._last = time.monotonic()
        progress = [read_progress(spec.folder) for spec in self._specs]
        self._on_progress(sum(p.done for p in progress if p is not None))
