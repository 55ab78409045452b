"""PyHessian (Yao et al., 2020): its ``hessian.trace``, of the whole network and layer by layer.

It gives one number for all parameters that require gradients, no trace of a layer. To have those
one can let one layer at a time require gradients, which is one Hessian-vector product a layer.
"""

import math
from collections.abc import Callable

import numpy as np
from pyhessian import hessian
from torch import nn

from tests.benchmarks.peers.measure import Step, measure
from tests.benchmarks.peers.problem import Problem

# Its rule stops on (new − old) / old < tol: never, so that every probe is seen.
NEVER = -math.inf


def whole(problem: Problem, batch: int) -> Callable[[], Step]:
    """The trace of all layers together; the gradient's graph is kept between probes."""
    traced = _hessian(problem, batch)
    return lambda: Step(np.array(traced.trace(maxIter=1, tol=NEVER)))


def per_layer(problem: Problem, batch: int) -> Callable[[], Step]:
    """Layer by layer, by freezing all the others."""

    def step() -> Step:
        traces = []
        for weight in problem.weights:
            problem.model.requires_grad_(False)
            weight.requires_grad_(True)
            traces += _hessian(problem, batch).trace(maxIter=1, tol=NEVER)
            weight.grad = None  # else it keeps the graph of the gradient
        return Step(np.array(traces))

    return step


def _hessian(problem: Problem, batch: int) -> hessian:
    if batch >= len(problem.labels):
        data = {"data": (problem.images, problem.labels)}
    else:
        data = {"dataloader": list(problem.batches(batch))}
    return hessian(problem.model, nn.CrossEntropyLoss(), cuda=False, **data)


if __name__ == "__main__":
    measure({"whole network, no layers": whole, "layer by layer": per_layer}, "pyhessian")
