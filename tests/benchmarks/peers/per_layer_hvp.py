"""The usual recipe: for every layer, the gradient in its weight, then one product a probe."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.peers.measure import Step, measure
from tests.benchmarks.peers.problem import Problem


def per_layer(problem: Problem, batch: int) -> Callable[[], Step]:
    """One Hessian-vector product a layer, a batch and a probe."""

    def step() -> Step:
        traces = []
        for weight in problem.weights:
            z = torch.randint_like(weight, 2) * 2 - 1
            traces.append(sum(_product(problem, *b, weight, z) for b in problem.batches(batch)))
        return Step(np.array(traces) / len(problem.labels))

    return step


def _product(problem: Problem, images: Tensor, labels: Tensor, weight: Tensor, z: Tensor) -> float:
    """Return zᵀHz of the batch's summed loss."""
    loss = F.cross_entropy(problem.model(images), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    (product,) = torch.autograd.grad(gradient, weight, z)
    return float((z * product).sum())


if __name__ == "__main__":
    measure({"one HVP a layer": per_layer})
