"""Stage 1: the weights that are searched, trained here or read from a file."""

import time
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from hawq.cost import num_elements
from hawq.finetune import Recipe
from hawq.space import unquantizable_weights
from hawq.task import Task
from search.artefacts import ModelArtefact
from search.config import TaskConfig
from search.fit import fit, read_progress
from search.folder import content_hash
from search.stages.scoring import score_all
from search.stages.search import Search
from search.tasks.checkpoint import state_sha256

__all__ = ["inputs", "make"]

_POLL_SECONDS = 0.5
_LATER = {
    "pretrained",
    "model",
    "batches",
    "loss",
    "metric",
    "train_size",
    "test_size",
    "resolution",
}


def inputs(search: Search) -> dict[str, Any]:
    """The network, its data and its weights; where they lie does not matter."""
    config, checkpoint = search.config, search.checkpoint
    return {
        "config": {
            "seed": config.seed,
            "task": _described(config.task),
            "checkpoint_sha256": None if checkpoint is None else state_sha256(checkpoint),
        },
        "data": search.task.fingerprint,
    }


def make(search: Search) -> ModelArtefact:
    """Train the network where the config says so; score it unquantized."""
    model, config = search.task.model(), search.config.task
    source = "factory" if config.factory or search.checkpoint is None else "checkpoint"
    state = search.checkpoint or model.state_dict()
    if config.pretrain is not None:
        source, state = "trained", _trained(search, config.pretrain.recipe())
    search.save_weights(state)
    kept = unquantizable_weights(model)
    if kept:
        names = ", ".join(f"{name} ({count:,})" for name, count in kept.items())
        search.events.emit("model", "warning", f"these weights stay in floating point: {names}")
    (scores,) = score_all(search, "model", [(state, None)], "search")
    if not scores.any():
        search.events.emit(
            "model",
            "warning",
            f"the unquantized network's {search.task.score_name} is 0 on every search example, so "
            "no drop can be seen: check its weights, or train it longer",
        )
    return ModelArtefact.model_validate(
        {
            "weights_sha256": state_sha256(state),
            "num_parameters": sum(p.numel() for p in model.parameters()),
            "num_quantizable": num_elements(search.space, "weights"),
            "source": source,
            "train_size": search.task.size("train"),
            "search_size": search.task.size("search"),
            "search_seen": search.task.search_seen,
            "score_name": search.task.score_name,
            "search_score": float(scores.mean()),
        }
    )


def _described(task: TaskConfig) -> dict[str, Any]:
    found = task.model_dump(mode="json", exclude={"root", "checkpoint", "cache"})
    # Where they are not given they are absent: a run of an earlier version goes on as it is.
    return {key: value for key, value in found.items() if value or key not in _LATER}


def _trained(search: Search, recipe: Recipe) -> dict[str, Tensor]:
    trials = search.config.trials
    folder = search.folder.path / f"pretrain-{content_hash(inputs(search))[:8]}"
    remote = _pretrain.options(name="model:train", num_cpus=trials.cpus, num_gpus=trials.gpus)
    training = remote.remote(
        search.task, recipe, folder.resolve(), search.config.seed, trials.cpus, trials.gpus > 0
    )
    while not ray.wait([training], timeout=_POLL_SECONDS)[0]:
        progress = read_progress(folder)
        if progress is not None:
            score = "" if progress.score is None else f"{100 * progress.score:.1f} %"
            search.progress("model", progress.done, progress.total, "epochs", score)
    state, cpu_seconds = ray.get(training)
    search.worker_cpu_seconds += cpu_seconds
    return {name: torch.tensor(value) for name, value in state.items()}


@ray.remote(max_retries=3)
def _pretrain(
    task: Task, recipe: Recipe, folder: Path, seed: int, cpus: float, gpu: bool
) -> tuple[dict[str, Any], float]:
    torch.set_num_threads(max(1, int(cpus)))
    started = time.process_time()
    model = task.model().to("cuda" if gpu else "cpu")
    fit(model, task, recipe, folder=folder, seed=seed)
    state = {name: value.cpu().numpy() for name, value in model.state_dict().items()}
    return state, time.process_time() - started
