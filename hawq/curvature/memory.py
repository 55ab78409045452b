"""How many examples fit into memory at once."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from hawq.curvature.network import differentiable, weights_of
from hawq.curvature.plan import EstimatorName
from hawq.curvature.sites import ActivationTape, Subject
from hawq.task import Batch, Objective

__all__ = ["fitting_examples"]

# A unit's peak in multiples of what its forward pass saves: gradients beside it, and the graph of
# the gradient where that is differentiated once more. Measured on ResNet20 and ResNet50.
_PEAK = {"hutchinson": 5.0}
_PEAK_OTHERS = 2.5


def fitting_examples(
    task: Objective,
    model: nn.Module,
    layers: list[str],
    batch: Batch,
    num_examples: int,
    *,
    estimator: EstimatorName,
    subject: Subject,
    budget_bytes: float,
) -> int:
    """Estimate how many examples a unit may take at once, at least 1.

    Args:
        task: Gives the loss.
        model: The network.
        layers: Those that are traced.
        batch: A few examples; what their forward pass saves is counted.
        num_examples: How many they are.
        estimator: Which estimator will run.
        subject: Weights or activations.
        budget_bytes: What there is.
    """
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = weights_of(model, layers) if subject == "weights" else []
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    tape = ActivationTape(model, layers)
    with (
        differentiable(model, leaves),
        tape.recording() if subject == "activations" else nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = task.losses(model, batch)  # alive until counted, or storages would be reused
        total = sum(size for pointer, size in saved.items() if pointer not in own)
        del loss
    peak = _PEAK.get(estimator, _PEAK_OTHERS) * total / num_examples
    return max(1, int(budget_bytes / max(peak, 1.0)))
