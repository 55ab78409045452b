"""Packed networks as programs of ``torch.export``: rounded weights, and the rounding, in floats."""

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from hawq.export.packed import Packed, load

__all__ = ["torch_program"]


def torch_program(
    packed: Packed, model: nn.Module, example: Tensor, *, is_dynamic: bool = True
) -> ExportedProgram:
    """Make the program of a packed network.

    Args:
        packed: What it computes with.
        model: Its code, in floating point; loaded over.
        example: Inputs, shape (N, …).
        is_dynamic: Whether the program takes any number of inputs, or N alone.

    Raises:
        ValueError: If the network is another one, or its code cannot be exported.
    """
    network = load(packed, model)
    shapes = ({0: Dim.DYNAMIC},) if is_dynamic else None
    try:
        with torch.no_grad():
            return torch.export.export(network, (example,), dynamic_shapes=shapes)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        told = " ".join(str(error).split())[:300]
        raise ValueError(f"torch.export must be able to follow the network, got: {told}") from error
