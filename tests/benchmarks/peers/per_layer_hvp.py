"""The usual recipe: for every layer, the gradient in its weight, then one product a probe."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.peers.measure import Step, measure
from tests.benchmarks.peers.problem import Problem

PROBES = 4  # that share a gradient's graph, batch by batch


def per_layer(problem: Problem, batch: int) -> Callable[[], Step]:
    """Hessian-vector products of one layer, one batch and a few probes at a time."""

    def step() -> Step:
        samples = np.zeros((PROBES, len(problem.layers)))
        for i, weight in enumerate(problem.weights):
            probes = [torch.randint_like(weight, 2) * 2 - 1 for _ in range(PROBES)]
            for images, labels in problem.batches(batch):
                samples[:, i] += _products(problem, images, labels, weight, probes)
        samples /= len(problem.labels)
        return Step(samples.mean(0), PROBES, np.square(samples - samples.mean(0)).sum(0))

    return step


def _products(
    problem: Problem, images: Tensor, labels: Tensor, weight: Tensor, probes: Sequence[Tensor]
) -> list[float]:
    """Return zᵀHz of the batch's summed loss for every probe z."""
    loss = F.cross_entropy(problem.model(images), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    products = [torch.autograd.grad(gradient, weight, z, retain_graph=True)[0] for z in probes]
    return [float((z * product).sum()) for z, product in zip(probes, products, strict=True)]


if __name__ == "__main__":
    measure({"one HVP a layer": per_layer})
