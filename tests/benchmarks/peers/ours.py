"""hawq's own estimators, through the same door as a search uses: a plan and its units."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hawq.curvature import EstimatorName, TracePlan, UnitSums, run_unit
from hawq.task import Factor, softmax_factor
from tests.benchmarks.peers.measure import Step, measure
from tests.benchmarks.peers.problem import Problem

ImageBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Held:
    """The problem as a task, as far as curvature asks; see ``hawq.task.Task``."""

    problem: Problem
    score_name = "accuracy"
    fingerprint = "held"
    search_seen = True

    def model(self) -> nn.Module:
        """Return the network."""
        return self.problem.model

    def size(self, split: str) -> int:
        """Count the images."""
        return len(self.problem.labels)

    def batch(self, split: str, indices: Tensor) -> ImageBatch:
        """Return images and labels."""
        return self.problem.images[indices], self.problem.labels[indices]

    def augment(self, batch: ImageBatch, generator: object) -> ImageBatch:
        """Return the batch as it is."""
        return batch

    def inputs(self, batch: ImageBatch) -> Tensor:
        """Return the images."""
        return batch[0]

    def losses(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """Return each image's cross-entropy."""
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def curvature(self, model: nn.Module, batch: ImageBatch) -> tuple[Tensor, Sequence[Factor]]:
        """Return the logits and softmax's factor."""
        logits = model(batch[0])
        return logits, [softmax_factor(logits)]

    def scores(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """Return 1 where the likeliest class is right."""
        return (model(batch[0]).argmax(1) == batch[1]).float()


def traces(
    estimator: EstimatorName, probes: int, problem: Problem, batch: int
) -> Callable[[], Step]:
    """One round of a plan's units: every batch once, with a few probes that share its forward."""
    task = Held(problem)
    plan = TracePlan(
        layers=problem.layers,
        estimator=estimator,
        split="train",
        examples=tuple(range(len(problem.labels))),
        batch_size=batch,
        probes_per_unit=probes,
        rtol=0.05,
        max_probes=1 << 20,
        seed=torch.initial_seed(),
    )
    at = 0

    def step() -> Step:
        nonlocal at
        units = [run_unit(task, problem.model, plan, at + i) for i in range(plan.num_batches)]
        at += plan.num_batches
        return _round(units)

    return step


def _round(units: Sequence[UnitSums]) -> Step:
    """Add the batches of one round up."""
    num = sum(unit.num_examples for unit in units)
    total = sum(unit.total for unit in units) / num
    probes = units[0].num_probes
    if not probes:
        return Step(total, probes=0)
    # Each batch has probes of its own: their variances add up.
    squares = sum(unit.square - unit.total**2 / probes for unit in units) / num**2
    return Step(total / probes, probes, np.maximum(squares, 0))


if __name__ == "__main__":
    measure(
        {
            "exact Gauss-Newton": partial(traces, "exact_gauss_newton", 2),
            "Gauss-Newton": partial(traces, "gauss_newton", 8),
            "Hutchinson": partial(traces, "hutchinson", 8),
        }
    )
