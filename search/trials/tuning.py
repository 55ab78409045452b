"""Many trials at once under Ray Tune, which starts, restarts and, where asked, stops them.

Tune keeps a folder for each, ``RUN/tune/NAME/TRIAL``, with TensorBoard files (``tensorboard
--logdir RUN/tune``): the training loss, the score on the search split and the learning rate in the
middle of each epoch; step k is after k − 1 epochs, so step 1 is before any training.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.result_grid import ResultGrid
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search import Searcher
from torch import Tensor

from hawq.task import Task
from search.artefacts import EpochRecord, Trial
from search.config import TrialsConfig
from search.fit import read_progress
from search.trials.best import BestSoFar
from search.trials.crews import num_concurrent, run_together
from search.trials.metrics import description, metrics
from search.trials.running import read_trial, run_trial, settled
from search.trials.specification import TrialSpec
from search.trials.tracking import mlflow_callbacks

__all__ = ["Tuning", "cause", "run_trials", "tune_specs"]

_POLL_SECONDS = 1.0
SpecOf = Callable[[Mapping[str, Any]], TrialSpec]


@dataclass(frozen=True, slots=True)
class Tuning:
    """How trials run, besides what they are.

    Attributes:
        resources: CPUs, GPUs and processes of each, restarts, early stopping.
        storage: Folder for Tune's own files; shared between nodes, as the trials' folders.
        best: Is offered every epoch.
        name: Of what is run, in Tune's folder and in MLflow.
    """

    resources: TrialsConfig
    storage: Path
    best: BestSoFar | None = None
    name: str = "trials"


def run_trials(
    task: Task,
    state: Mapping[str, Tensor],
    specs: Sequence[TrialSpec],
    *,
    resources: TrialsConfig,
    storage: Path,
    best: BestSoFar | None = None,
    on_progress: Callable[[float], None] = lambda _: None,
) -> list[Trial]:
    """Run all trials that have no result yet, as many at once as fit.

    Args:
        task: Sent to every trial.
        state: Weights before quantization.
        specs: The trials.
        resources: CPUs, GPUs and processes of each, restarts, early stopping.
        storage: Folder for Tune's own files; shared between nodes, as the trials' folders.
        best: Is offered every epoch.
        on_progress: Called about every second with the epochs done by all trials together.

    Returns:
        Their results, in order; a trial whose worker died too often is one that failed.

    Raises:
        InputError: If the processes of one trial do not fit the cluster.
        OSError: If a trial could not write its files.
    """
    pending = [spec for spec in specs if read_trial(spec.folder) is None]
    ended = {}
    if pending:

        def look() -> None:
            progress = [read_progress(spec.folder) for spec in specs]
            on_progress(sum(p.done for p in progress if p is not None))

        described = [{"index": i} | description(spec) for i, spec in enumerate(pending)]
        grid = tune_specs(
            task,
            state,
            _Listed(tuple(pending)),
            tuning=Tuning(resources, storage, best),
            epochs=max(spec.recipe.epochs for spec in pending),
            space={"trial": tune.grid_search(described)},
            look=look,
        )
        for i, spec in enumerate(pending):
            ended[spec.folder] = settled(spec, cause(grid[i].error))
    return [read_trial(spec.folder) or ended[spec.folder] for spec in specs]


def cause(error: Exception | None) -> Exception | None:
    """Return what a trial's worker died of; a full disk is raised: it is no property of a trial."""
    found = getattr(error, "cause", error)
    if isinstance(found, OSError):
        raise found
    return error


def tune_specs(
    task: Task,
    state: Mapping[str, Tensor],
    spec_of: SpecOf,
    *,
    tuning: Tuning,
    epochs: int,
    look: Callable[[], None],
    space: Mapping[str, Any] | None = None,
    searcher: Searcher | None = None,
    num_samples: int = 1,
) -> ResultGrid:
    """Run trials under Tune.

    Args:
        task: Sent to every trial.
        state: Weights before quantization.
        spec_of: Makes a trial of what Tune chose; sent to every trial.
        tuning: How to run them.
        epochs: Of the longest.
        look: Called about every second, here.
        space: Tune's parameters, where no searcher chooses them.
        searcher: Chooses them.
        num_samples: How many it is asked for.
    """
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    resources = tuning.resources
    asha = ASHAScheduler(time_attr="epoch", max_t=epochs + 1, grace_period=1)
    is_crew = resources.workers > 1
    # The driver of a crew waits; its workers' resources are the crew's own.
    needs = (
        {"cpu": 0.1 * resources.cpus} if is_crew else {"cpu": resources.cpus, "gpu": resources.gpus}
    )
    parameters = {"task": task, "state": dict(state), "spec_of": spec_of, "tuning": tuning}
    is_pareto = searcher is not None and isinstance(searcher.metric, list)
    trainable = tune.with_parameters(_trainable, **parameters)
    trainable.__name__ = tuning.name  # as the dashboard calls its actors
    tuner = tune.Tuner(
        tune.with_resources(trainable, needs),
        param_space=dict(space or {}),
        tune_config=tune.TuneConfig(
            metric=None if is_pareto else "search_score",
            mode=None if is_pareto else "max",
            search_alg=searcher,
            num_samples=num_samples,
            scheduler=asha if resources.asha else FIFOScheduler(),
            max_concurrent_trials=num_concurrent(resources),
            reuse_actors=not is_crew,  # else every trial imports torch and Ray again
            trial_name_creator=_Names(spec_of),
            trial_dirname_creator=_Names(spec_of),
        ),
        run_config=tune.RunConfig(
            name=f"{tuning.name}-{int(time.time())}",
            storage_path=str(tuning.storage.resolve()),
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
            callbacks=[_Watcher(look), *mlflow_callbacks(resources.mlflow, tuning.name)],
            verbose=0,
        ),
    )
    return tuner.fit()


def _trainable(
    config: Mapping[str, Any],
    *,
    task: Task,
    state: Mapping[str, Tensor],
    spec_of: SpecOf,
    tuning: Tuning,
) -> None:
    """Unpack, run, report to Tune."""
    spec, resources = spec_of(config), tuning.resources
    if resources.workers > 1:
        run_together(
            task, state, spec, resources=resources, storage=tuning.storage, best=tuning.best
        )
        return
    torch.set_num_threads(max(1, int(resources.cpus)))

    def on_epoch(record: EpochRecord) -> None:
        if record.epoch < spec.recipe.epochs:
            tune.report(metrics(spec, record))

    # The last epoch is reported once its result is on disk: nothing is left to stop early then.
    # One that had ended when the driver died, before Tune heard of it, is not ended again.
    device = "cuda" if resources.gpus else "cpu"
    trial = read_trial(spec.folder) or run_trial(
        task, state, spec, device=device, on_epoch=on_epoch, best=tuning.best
    )
    if trial.epochs:
        tune.report(metrics(spec, trial.epochs[-1]))


@dataclass(frozen=True, slots=True)
class _Listed:
    """Makes the trials of a list, by index."""

    specs: tuple[TrialSpec, ...]

    def __call__(self, config: Mapping[str, Any]) -> TrialSpec:
        index: int = config["trial"]["index"]
        return self.specs[index]


@dataclass(frozen=True, slots=True)
class _Names:
    """Names Tune's trials after their folders."""

    spec_of: SpecOf

    def __call__(self, trial: Any) -> str:
        return self.spec_of(trial.config).folder.name


class _Watcher(tune.Callback):
    """Looks at the trials' folders, about once a second."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._last = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # Tune stores its callbacks; the listener belongs to this process alone.
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
        """Look."""
        if time.monotonic() - self._last >= _POLL_SECONDS:
            self._last = time.monotonic()
            self._look()
