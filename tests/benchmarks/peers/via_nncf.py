"""NNCF's trace estimator, the one inside its HAWQ-V2: all layers from one joint probe.

Every probe runs forward, backward and the product anew. It starts its sums from normal noise
instead of zeros, which adds Σ z·noise / N to a layer's trace: no bias, some variance.
"""

from collections.abc import Callable

import numpy as np
from nncf.torch.quantization.hessian_trace import HessianTraceEstimator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks.peers.measure import Step, measure
from tests.benchmarks.peers.problem import Problem


def joint(problem: Problem, batch: int) -> Callable[[], Step]:
    """``get_average_traces``, one probe a call, times the layers' sizes."""
    estimator = HessianTraceEstimator(
        problem.model,
        lambda outputs, target, criterion: criterion(outputs, target),
        nn.CrossEntropyLoss(),
        "cpu",
        DataLoader(TensorDataset(problem.images, problem.labels), batch),
        len(problem.labels),
    )
    sizes = np.array([weight.numel() for weight in problem.weights])
    return lambda: Step(estimator.get_average_traces(max_iter=1).double().numpy() * sizes)


if __name__ == "__main__":
    measure({"joint": joint}, "nncf")
