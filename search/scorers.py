"""Processes that score allocations side by side, for a search that proposes several at once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError

from hawq.allocation import Allocation
from search.evaluate import Evaluate, Evaluation

__all__ = ["evaluated", "scored"]

_RESTARTS = 3


@ray.remote(max_retries=3)
def evaluated(evaluate: Evaluate, allocation: Allocation, cpus: float) -> Evaluation:
    """Score one allocation in another process."""
    torch.set_num_threads(max(1, int(cpus)))
    return evaluate(allocation)


class Scorer:
    """Scores in a process of its own. A plain class: it needs no cluster."""

    def __init__(self, evaluate: Evaluate, cpus: float) -> None:
        torch.set_num_threads(max(1, int(cpus)))
        self._evaluate = evaluate

    def score(self, allocation: Allocation) -> Evaluation:
        """Score an allocation."""
        return self._evaluate(allocation)


# A score is a pure function of the allocation, hence safe to ask for again.
RemoteScorer = ray.remote(max_restarts=_RESTARTS, max_task_retries=_RESTARTS)(Scorer)

Score = Callable[[Sequence[Allocation]], list[Evaluation]]


@contextmanager
def scored(evaluate: Evaluate, runners: int, cpus: float, gpus: float) -> Iterator[Score]:
    """Yield what scores several allocations at once, in their order.

    Args:
        evaluate: Scores one.
        runners: Processes; 0: this one.
        cpus: Of each process.
        gpus: Of each process.
    """
    if not runners:
        yield lambda allocations: [evaluate(allocation) for allocation in allocations]
        return
    remote = RemoteScorer.options(num_cpus=cpus, num_gpus=gpus)
    scorers: list[Any] = [remote.remote(evaluate, cpus) for _ in range(runners)]  # handles

    def asked_of(scorer: Any, allocation: Allocation) -> Any:
        return scorer.score.options(name="search:score").remote(allocation)

    def score(allocations: Sequence[Allocation]) -> list[Evaluation]:
        asked = [
            asked_of(scorers[i % runners], allocation) for i, allocation in enumerate(allocations)
        ]
        found: list[Evaluation] = []
        for i, (allocation, one) in enumerate(zip(allocations, asked, strict=True)):
            try:
                found.append(ray.get(one))
            except RayActorError:  # it died once too often, or is being restarted: replace it
                scorers[i % runners] = remote.remote(evaluate, cpus)
                found.append(ray.get(asked_of(scorers[i % runners], allocation)))
        return found

    try:
        yield score
    finally:
        for scorer in scorers:
            ray.kill(scorer)
