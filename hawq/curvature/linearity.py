"""Is a network piecewise linear in each single layer's weights?

Where it is, each layer's Hessian block equals its Gauss–Newton block. The answer is read from the
graph that autograd recorded for one batch: every operator that really ran between a weight and
the outputs, which a list of modules misses (``F.silu``, ``x * gate(x)``). An operator that
multiplies two tensors is linear in a weight as long as only one of them depends on it.
"""

import re
from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["nonlinearities"]

# Linear, or piecewise linear, in all tensor operands together.
# fmt: off
_LINEAR = {
    "Abs", "AccumulateGrad", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "Add", "Alias", "Amax",
    "AsStrided", "AvgPool2D", "AvgPool3D", "Cat", "ChannelShuffle", "Clamp", "ClampMin", "Clone",
    "ConstantPadNd", "Copy", "Embedding", "Expand", "Flip", "Gather", "Hardsigmoid", "Hardtanh",
    "Index", "IndexSelect", "LeakyRelu", "MaskedFill", "Max", "MaxPool2DWithIndices",
    "MaxPool3DWithIndices", "Maximum", "Mean", "Min", "Minimum", "Neg", "Permute", "PixelShuffle",
    "PixelUnshuffle", "ReflectionPad2D", "Relu", "Repeat", "ReplicationPad2D", "ReshapeAlias",
    "Roll", "Rsub", "Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "Sub", "Sum",
    "T", "Threshold", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze",
    "UpsampleBilinear2D", "UpsampleNearest2D", "View", "Where",
}
# fmt: on
# Multiply operands: which positions of `next_functions` are multiplied with each other.
_BILINEAR = {
    "Convolution": (0, 1),
    "ConvolutionOverrideable": (0, 1),
    "Addmm": (1, 2),
    "Baddbmm": (1, 2),
    "Mm": (0, 1),
    "Bmm": (0, 1),
    "Mv": (0, 1),
    "Dot": (0, 1),
    "PreluKernel": (0, 1),
    "Mul": (0, 1),
    "Linear": (0, 1),
    "NativeBatchNorm": (0, 1),
    "CudnnBatchNorm": (0, 1),
    "MiopenBatchNorm": (0, 1),
}


def nonlinearities(outputs: Tensor, weights: Sequence[Tensor] | None) -> list[str]:
    """Name the operators that stop the outputs from being piecewise linear in a weight.

    Args:
        outputs: Attached to their graph; only ``weights`` may require gradients in it.
        weights: Leaves; None for all leaves as one, as the network's input is for activations:
            what is piecewise linear in it is so in every activation on the way.

    Returns:
        Operator names, each once, in alphabetical order; empty where the network is piecewise
        linear in each weight alone.
    """
    found: set[str] = set()
    bit = {id(weight): 1 << i for i, weight in enumerate(weights or [])}
    # The weights, as a bit mask, that the tensor behind each node depends on.
    depends: dict[Node | None, int] = {None: 0}
    for node in _inputs_first(outputs.grad_fn):
        parents = [depends[parent] for parent, _ in node.next_functions]
        variable = getattr(node, "variable", None)
        own = bit.get(id(variable), 0) if weights is not None else int(variable is not None)
        mask = own
        for parent in parents:
            mask |= parent
        depends[node] = mask
        # Torch's own nodes end in a digit; a custom function may be called anything.
        name = re.sub(r"Backward\d+$", "", node.name())
        if own or not mask or name.split("::")[-1] in _LINEAR:
            continue
        problem = _problem(name, node, parents)
        if problem:
            found.add(problem)
    return sorted(found)


def _problem(name: str, node: Node, parents: Sequence[int]) -> str:
    """Say why an operator is not linear in some weight; empty where it is."""
    if getattr(node, "_saved_training", False):
        return f"{name} in training mode"
    if name == "Div":
        return "Div by a tensor that depends on a weight" if any(parents[1:]) else ""
    if name not in _BILINEAR:
        return name
    left, right = _BILINEAR[name]
    if right < len(parents) and parents[left] & parents[right]:
        return f"{name} of two tensors that depend on the same weight"
    return ""


def _inputs_first(root: Node | None) -> list[Node]:
    """Order a graph so that every node comes after the nodes that it reads."""
    ordered: list[Node] = []
    seen: set[Node] = set()
    stack = [(root, False)] if root is not None else []
    while stack:
        node, finished = stack.pop()
        if finished:
            ordered.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((n, False) for n, _ in node.next_functions if n is not None)
    return ordered
