"""hawq's own estimators, through the same door as a search uses: a plan, and its estimate."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hawq.curvature import EstimatorName, TracePlan, estimate_traces, plan_traces
from hawq.factors import softmax_factor
from hawq.task import Factor
from tests.benchmarks.peers.measure import Step, measure
from tests.benchmarks.peers.problem import Problem

ImageBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Held:
    """The problem as curvature wants it; see ``hawq.task.Objective``."""

    problem: Problem

    def size(self, split: str) -> int:
        """Count the images."""
        return len(self.problem.labels)

    def batch(self, split: str, indices: Tensor) -> ImageBatch:
        """Return images and labels."""
        return self.problem.images[indices], self.problem.labels[indices]

    def losses(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """Return each image's cross-entropy."""
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def curvature(self, model: nn.Module, batch: ImageBatch) -> tuple[Tensor, Sequence[Factor]]:
        """Return the logits and softmax's factor."""
        logits = model(batch[0])
        return logits, [softmax_factor(logits)]


def automatic(problem: Problem, batch: int) -> Callable[[], Step]:
    """What a search would do by itself on these images, until every layer is within 5 %."""
    return _estimates(problem, _plan(problem, batch, "auto"))


def rounds(
    estimator: EstimatorName, probes: int, leading: int, problem: Problem, batch: int
) -> Callable[[], Step]:
    """A few probes on every image, which share a forward pass."""
    plan = replace(
        _plan(problem, batch, estimator),
        estimator=estimator,  # "gauss_newton" would let the planner choose the way to it
        probes_per_unit=probes,
        max_probes=probes,
        leading=leading,
        floor=0.0,
    )
    return _estimates(problem, plan)


def reference(problem: Problem, batch: int) -> Callable[[], Step]:
    """The exact traces in float64, nothing left out, which all others are compared with."""
    problem.model.double()
    twin = replace(problem, images=problem.images.double())
    return _estimates(twin, replace(_plan(twin, batch, "exact_gauss_newton"), floor=0.0))


def _plan(problem: Problem, batch: int, estimator: EstimatorName | Literal["auto"]) -> TracePlan:
    plan, _ = plan_traces(
        Held(problem),
        problem.model,
        problem.layers,
        estimator=estimator,
        num_examples=len(problem.labels),
        pool=None,
        batch_size=batch,
    )
    if sorted(plan.examples) != list(range(len(problem.labels))):
        raise ValueError("the plan must take every image once, got another draw of them")
    return plan


def _estimates(problem: Problem, plan: TracePlan) -> Callable[[], Step]:
    seeds = count(torch.initial_seed() << 10)

    def step() -> Step:
        found = estimate_traces(Held(problem), problem.model, replace(plan, seed=next(seeds)))
        probes = found.num_probes
        # From the standard error of the mean back to Σ (probe − mean)².
        return Step(found.trace, probes, np.square(found.probe_error) * probes * (probes - 1))

    return step


if __name__ == "__main__":
    measure(
        {
            "exact, float64": reference,
            "automatic": automatic,
            "1 direction and signs": partial(rounds, "mixed_gauss_newton", 2, 1),
            "Gauss-Newton by example": partial(rounds, "mixed_gauss_newton", 2, 0),
            "Gauss-Newton": partial(rounds, "gauss_newton", 8, 0),
            "Hutchinson": partial(rounds, "hutchinson", 8, 0),
            "Gauss-Newton, 2 at once": partial(rounds, "gauss_newton", 2, 0),
            "Hutchinson, 2 at once": partial(rounds, "hutchinson", 2, 0),
        }
    )
