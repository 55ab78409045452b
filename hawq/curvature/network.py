"""A network as curvature needs it: in eval mode, with gradients for the traced weights only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from hawq.space import evaluating

__all__ = ["differentiable", "weights_of"]


def weights_of(model: nn.Module, layers: Sequence[str]) -> list[Tensor]:
    """Return the weights of layers by name."""
    weights = []
    for name in layers:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weights.append(weight)
    return weights


@contextmanager
def differentiable(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """Let ``weights`` alone require gradients, in eval mode; put everything back afterwards.

    In train mode batch-norm couples the examples of a batch, and the loss is another function.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
