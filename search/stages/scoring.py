"""Scores of whole networks on a split, example by example, in parallel."""

import time
from collections.abc import Sequence
from typing import Any

import ray
import torch
from torch import Tensor

from hawq.finetune import evaluate
from hawq.task import Task
from search.stages.search import Search
from search.trials import TrialSpec, quantized_model

__all__ = ["score_all"]

# Weights, and how they are quantized; None for a network that is not.
Job = tuple[dict[str, Tensor], TrialSpec | None]


def score_all(search: Search, stage: str, jobs: Sequence[Job], split: str) -> list[Tensor]:
    """Score networks on a split.

    Args:
        search: Gives the task and the resources.
        stage: Whose progress it is.
        jobs: The networks.
        split: The split.

    Returns:
        Each network's scores, shape (N,), in order.
    """
    trials = search.config.trials
    remote = _score.options(name=f"{stage}:score", num_cpus=trials.cpus, num_gpus=trials.gpus)
    pending = [
        remote.remote(search.task, state, spec, split, trials.cpus, trials.gpus > 0)
        for state, spec in jobs
    ]
    for done in range(1, len(pending) + 1):
        ray.wait(pending, num_returns=done)
        search.progress(stage, done, len(pending), "networks")
    scores = []
    for values, cpu_seconds in ray.get(pending):
        search.worker_cpu_seconds += cpu_seconds
        scores.append(torch.tensor(values))
    return scores


@ray.remote(max_retries=3)
def _score(
    task: Task,
    state: dict[str, Tensor],
    spec: TrialSpec | None,
    split: str,
    cpus: float,
    gpu: bool,
) -> tuple[Any, float]:
    torch.set_num_threads(max(1, int(cpus)))
    started = time.process_time()
    model = task.model()
    if spec is not None:
        model = quantized_model(task, model.state_dict(), spec)
    model.load_state_dict(state)
    model.to("cuda" if gpu else "cpu")
    return evaluate(model, task, split).numpy(), time.process_time() - started
