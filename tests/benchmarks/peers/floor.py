"""What any estimator is held against: one plain gradient, and one training step."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from tests.benchmarks.peers.measure import Step, measure
from tests.benchmarks.peers.problem import Problem

NOTHING = Step(np.zeros(0), probes=0)


def gradient(problem: Problem, batch: int) -> Callable[[], Step]:
    """One forward and one backward pass, for the traced weights alone, batch by batch."""

    def step() -> Step:
        for images, labels in problem.batches(batch):
            loss = F.cross_entropy(problem.model(images), labels)
            torch.autograd.grad(loss, problem.weights)
        return NOTHING

    return step


def training(problem: Problem, batch: int) -> Callable[[], Step]:
    """One training step: train mode, every parameter, SGD with momentum."""
    problem.model.train().requires_grad_(True)
    sgd = torch.optim.SGD(problem.model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> Step:
        for images, labels in problem.batches(batch):
            sgd.zero_grad()
            F.cross_entropy(problem.model(images), labels).backward()
            sgd.step()
        return NOTHING

    return step


if __name__ == "__main__":
    measure({"gradient": gradient, "training step": training})
