"""One trial, from its first epoch or from where its folder stands; needs no cluster."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from hawq.finetune import DivergedError, calibrate, zeroed_layers
from hawq.finetune.distillation import frozen_teacher
from hawq.finetune.staging import Staging
from hawq.task import Task
from search.artefacts import EpochRecord, Trial
from search.crew import Crew
from search.fit import fit, saved_epochs
from search.folder import write_atomically
from search.tasks.checkpoint import save_state
from search.trials.best import BestSoFar
from search.trials.specification import TrialSpec, calibration_inputs, quantized_model

__all__ = ["read_trial", "run_trial", "settled"]


def run_trial(
    task: Task,
    state: Mapping[str, Tensor],
    spec: TrialSpec,
    *,
    device: str,
    on_epoch: Callable[[EpochRecord], None] = lambda _: None,
    best: BestSoFar | None = None,
    crew: Crew | None = None,
) -> Trial:
    """Fine-tune one allocation, or go on where its folder stands.

    A diverging training is a result with its reason, not an exception.

    Args:
        task: Gives network and data.
        state: Weights before quantization.
        spec: The trial.
        device: Where to train.
        on_epoch: Called after each new epoch, once it is on disk.
        best: Is offered every epoch.
        crew: The processes that train it together; only their chief writes. None: this one alone.
    """
    started = time.process_time()
    is_chief = crew is None or crew.is_chief
    model = quantized_model(task, state, spec)
    if crew is not None and device.startswith("cuda"):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    records = saved_epochs(spec.folder)
    # Ranges come first into a fresh folder; a checkpoint brings its own.
    if not records:
        calibrate(model, calibration_inputs(task, device))

    def offer(record: EpochRecord) -> None:
        if best is not None and is_chief:
            best.offer(model, spec, record)

    status, reason = "finished", ""
    try:
        records = fit(
            model,
            task,
            spec.recipe,
            folder=spec.folder,
            seed=spec.seed,
            teacher=_teacher(task, state, device) if spec.recipe.distillation else None,
            staging=_staging(model, spec),
            on_epoch=on_epoch,
            on_scored=offer,
            crew=crew,
        )
    except DivergedError as error:
        records, status, reason = saved_epochs(spec.folder), "failed", str(error)
    if status == "finished" and is_chief:
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
            "zeroed": zeroed_layers(model),
        }
    )
    if is_chief:
        write_atomically(spec.folder / "result.json", trial.model_dump_json(indent=1))
    return trial


def _staging(model: nn.Module, spec: TrialSpec) -> Staging | None:
    first, until = spec.recipe.activations_first, spec.recipe.staging
    if not (spec.order or first):
        return None
    return Staging(model, spec.order, activations_first=first, until=until)


def _teacher(task: Task, state: Mapping[str, Tensor], device: str) -> nn.Module:
    """Return the network before quantization, to be imitated."""
    model = task.model()
    model.load_state_dict(state)
    return frozen_teacher(model.to(device))


def read_trial(folder: Path) -> Trial | None:
    """Return the result in a trial's folder; None where it has not ended."""
    path = folder / "result.json"
    return Trial.model_validate(json.loads(path.read_text())) if path.exists() else None


def settled(spec: TrialSpec, error: Exception | None) -> Trial:
    """Return the result of a trial, also where Tune ended it before its own end.

    Args:
        spec: The trial.
        error: What its worker died of; None where it was stopped early.
    """
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
