"""A network as curvature needs it: in eval mode, with gradients for the traced weights only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hawq.curvature.estimate import NonFiniteTraceError
from hawq.space import evaluating

__all__ = ["differentiable", "refuse_nonfinite", "weights_of"]


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
        # Fused attention can be differentiated once, the same in single operators twice. Eval mode
        # comes first: a backbone that trains with frozen stages freezes them on every change.
        with evaluating(model), sdpa_kernel(SDPBackend.MATH):
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for weight in weights:
                weight.requires_grad_(True)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def refuse_nonfinite(values: Tensor, what: str, where: str = "the first examples") -> None:
    """Refuse a loss or an output that is no number.

    Args:
        values: What must be finite.
        what: Its name.
        where: On which examples.

    Raises:
        NonFiniteTraceError: If a value is NaN or infinite.
    """
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteTraceError(
            f"the {what} must be finite, got NaN or infinity in {where}: "
            "check the checkpoint and the input normalization"
        )
