"""A trial that several processes train together, by Ray Train.

The trial itself is a light driver that waits. A tenth of the first worker's share of CPUs is its
own, so that n workers and their driver together need n times ``trials.cpus``; no more trials are
started than the cluster has room for with all their workers, which come all at once or wait: no
set of trials can hold what another waits for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from torch import Tensor

from hawq.task import Task
from search.artefacts import EpochRecord
from search.config import TrialsConfig
from search.crew import Crew
from search.errors import InputError
from search.trials.best import BestSoFar
from search.trials.metrics import metrics
from search.trials.running import run_trial
from search.trials.specification import TrialSpec

__all__ = ["num_concurrent", "run_together"]


def num_concurrent(resources: TrialsConfig) -> int | None:
    """Return how many trials may run at once; None where Tune may decide by their resources.

    Raises:
        InputError: If the workers of one trial do not fit the cluster.
    """
    if resources.workers == 1:
        return resources.max_concurrent
    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            has = node["Resources"]
            fit = has.get("CPU", 0.0) / resources.cpus
            if resources.gpus:
                fit = min(fit, has.get("GPU", 0.0) / resources.gpus)
            room += int(fit)
    if room < resources.workers:
        raise InputError(
            f"trials.workers: must be at most {room}, for which the cluster has room with "
            f"{resources.cpus:g} CPUs and {resources.gpus:g} GPUs each, got {resources.workers}"
        )
    return min(room // resources.workers, resources.max_concurrent or room)


def run_together(
    task: Task,
    state: Mapping[str, Tensor],
    spec: TrialSpec,
    *,
    resources: TrialsConfig,
    storage: Path,
    best: BestSoFar | None,
) -> None:
    """Run a trial on several workers, from inside a Tune trial; Tune is told of each epoch.

    A worker's death ends the others, and all go on after the last epoch in the trial's folder.
    """
    needs = {"CPU": 0.9 * resources.cpus}
    if resources.gpus:
        needs["GPU"] = resources.gpus
    TorchTrainer(
        _work,
        train_loop_config={
            "task": task,
            "state": state,
            "spec": spec,
            "best": best,
            "threads": max(1, int(resources.cpus)),
            "device": "cuda" if resources.gpus else "cpu",
        },
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=needs,
        ),
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        run_config=ray.train.RunConfig(
            name=spec.folder.name,
            storage_path=str((storage / "train").resolve()),
            failure_config=ray.train.FailureConfig(max_failures=resources.max_failures),
            callbacks=[cast("Any", TuneReportCallback())],
        ),
    ).fit()


def _work(config: Mapping[str, Any]) -> None:
    """Unpack, train with the others, report."""
    torch.set_num_threads(config["threads"])
    spec: TrialSpec = config["spec"]
    device = str(ray.train.torch.get_device())
    crew = Crew.of_process_group(device)

    def on_epoch(record: EpochRecord) -> None:
        if record.epoch < spec.recipe.epochs:
            ray.train.report(metrics(spec, record))

    trial = run_trial(
        config["task"],
        config["state"],
        spec,
        device=device,
        on_epoch=on_epoch,
        best=config["best"],
        crew=crew,
    )
    if trial.epochs:
        ray.train.report(metrics(spec, trial.epochs[-1]))
