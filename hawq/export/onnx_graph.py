"""Packed networks as ONNX graphs: integers with DequantizeLinear, activations rounded in the graph.

ONNX has integers of 4, 8 and 16 bits: what is narrower is held in the nearest of these and keeps
its own levels. What a layer reads goes through QuantizeLinear, which divides where training
multiplies by the reciprocal: a value in the middle between two codes may fall to the other side.

The page needs the package ``onnx``, an optional part.
"""

import io
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hawq.export.packed import Packed, QuantizedTensor, QuantizedWeight, Rounding, load

__all__ = ["OnnxGraph", "onnx_graph"]

INPUT = "input"
_DOMAIN, _MARK = "hawq", "Rounding"
# The exporter's latest opset, and the first one with integers of 4 bits; nothing else that
# exported networks use differs between the two.
_EXPORTED_OPSET, _OPSET, _IR_VERSION = 20, 21, 10
# What hands a tensor's values to Python. Sizes are numbers already, and none of these.
_READING = {
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.item,
    Tensor.tolist,
}
_TORCH = str(Path(torch.__file__).parent)
_MIDDLE = 128  # the code of zero where a tensor has signs: kernels are fastest for uint8


@dataclass(frozen=True, slots=True, eq=False)
class OnnxGraph:
    """A graph, and what it holds that the network did not say.

    Attributes:
        model: From ``input`` to ``output_0``, ``output_1``, …: the leaves of what the network
            returns, in order.
        notes: Which widths are held in which type, in words.
    """

    model: ModelProto
    notes: tuple[str, ...]


def onnx_graph(
    packed: Packed, model: nn.Module, example: Tensor, *, is_dynamic: bool = True
) -> OnnxGraph:
    """Make the graph of a packed network.

    Args:
        packed: What it computes with.
        model: Its code, in floating point; loaded over.
        example: Inputs, shape (N, …).
        is_dynamic: Whether the graph takes any number of inputs, or N alone.

    Raises:
        ValueError: If the network is another one, or an operator of it has no place in ONNX.
    """
    network = _Flat(load(packed, model)).eval()
    marks = _mark(network)
    with torch.no_grad(), _Decisions() as decisions:
        num_outputs = len(network(example))
    content = _exported(network, example, marks, num_outputs, is_dynamic=is_dynamic)
    exported = onnx.load_from_string(content)
    graph = exported.graph
    _free_biases(graph, packed, marks)
    notes = [
        *_insert_weights(graph, packed.weights),
        *_insert_tensors(graph, packed.tensors, marks),
        *decisions.told(),
    ]
    exported.ir_version = _IR_VERSION
    del exported.opset_import[:]
    exported.opset_import.append(helper.make_opsetid("", _OPSET))
    onnx.checker.check_model(exported)
    return OnnxGraph(exported, tuple(notes))


class _Flat(nn.Module):
    """A network that returns the leaves of what it returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(leaf for leaf in tree_leaves(self.network(x)) if isinstance(leaf, Tensor))


class _Decisions(TorchFunctionMode):
    """Finds where code reads a tensor's values: a graph holds what it made of the example's."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, None] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function in _READING:
            frames = traceback.extract_stack()[:-1]
            frame = next(f for f in reversed(frames) if not f.filename.startswith(_TORCH))
            self.places[f"{Path(frame.filename).name}:{frame.lineno}"] = None
        return function(*args, **(kwargs or {}))

    def told(self) -> Iterator[str]:
        """Say so."""
        if self.places:
            yield (
                f"code goes by the values of tensors at {', '.join(self.places)}: the graph holds "
                "what was decided for one batch, and is wrong where another needs otherwise"
            )


class _Mark(nn.Module):
    """Stands in the graph where a tensor is rounded."""

    def __init__(self, index: int, name: str) -> None:
        super().__init__()
        self.index, self.name, self.rank = index, name, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rank = x.ndim
        marked: Tensor = _MarkFunction.apply(x, self.index)
        return marked


class _MarkFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: int) -> Tensor:  # noqa: ARG004
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, index: int) -> Any:
        return g.op(f"{_DOMAIN}::{_MARK}", x, index_i=index).setType(x.type())


def _mark(network: nn.Module) -> list[_Mark]:
    """Put a mark in every place of a rounding."""
    marks: list[_Mark] = []
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Rounding):
                marks.append(_Mark(len(marks), child.name))
                parent.add_module(name, marks[-1])
    return marks


def _exported(
    network: nn.Module, example: Tensor, marks: list[_Mark], num_outputs: int, *, is_dynamic: bool
) -> bytes:
    outputs = [f"output_{i}" for i in range(num_outputs)]
    names = [INPUT, *outputs]
    buffer: Any = io.BytesIO()  # any file will do, whatever the signature says
    with warnings.catch_warnings():
        # The newer exporter needs a package of its own, and this one says so each time.
        warnings.simplefilter("ignore")
        try:
            torch.onnx.export(
                network,
                (example,),
                buffer,
                dynamo=False,
                opset_version=_EXPORTED_OPSET,
                # The integers are those of the weights as they are: nothing is folded into them.
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.PRESERVE,
                input_names=[INPUT],
                output_names=outputs,
                dynamic_axes={key: {0: "batch"} for key in names} if is_dynamic else None,
                custom_opsets={_DOMAIN: 1} if marks else None,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            told = " ".join(str(error).split())[:300]
            raise ValueError(
                f"every operator of the network must have one in ONNX, got: {told}"
            ) from error
    content: bytes = buffer.getvalue()
    return content


def _free_biases(graph: GraphProto, packed: Packed, marks: list[_Mark]) -> None:
    """Add biases behind their layers where ONNX Runtime would round them.

    Between a rounded input and a rounded weight it holds a bias in steps of the product of both
    scales. Its integer kernels need that, and of 8 bits the steps are small; of 4 bits they cost a
    tenth of what a network returns.
    """
    weights = {f"network.{name}": weight for weight in packed.weights for name in weight.names}
    tensors = {tensor.name: tensor for tensor in packed.tensors}
    reads = {
        node.output[0]: tensors[marks[node.attribute[0].i].name]
        for node in graph.node
        if node.domain == _DOMAIN
    }
    free = {
        node.output[0]: weights[node.input[1]].codes.ndim - 2
        for node in graph.node
        if len(node.input) > 2 and node.input[1] in weights and node.input[0] in reads
        if min(weights[node.input[1]].widths.min(), reads[node.input[0]].widths.min()) < 8
    }
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        target = node.output[0]
        if target not in free:
            continue
        bias = node.input.pop()
        if free[target]:
            shape = f"{target}/channels"
            sides = np.array([-1, *[1] * free[target]])
            graph.initializer.append(_constant(shape, sides, TensorProto.INT64, 64))
            nodes.append(_node("Reshape", [bias, shape], f"{target}/bias"))
            bias = f"{target}/bias"
        node.output[0] = f"{target}/unbiased"
        nodes.append(_node("Add", [node.output[0], bias], target))
    del graph.node[:]
    graph.node.extend(nodes)


def _insert_weights(graph: GraphProto, weights: Iterable[QuantizedWeight]) -> Iterator[str]:
    """Hold quantized weights as integers; say in which types."""
    places = {constant.name: i for i, constant in enumerate(graph.initializer)}
    nodes: list[NodeProto] = []
    held: Counter[tuple[int, str]] = Counter()
    has_small_products = False
    for weight in weights:
        name = next((f"network.{n}" for n in weight.names if f"network.{n}" in places), None)
        if name is None:  # nothing reads it, or it equals another one
            continue
        constants, kind = _integers(weight, name)
        graph.initializer[places[name]].CopyFrom(constants[0])
        graph.initializer.extend(constants[1:])
        own, sizes = _dequantized(weight, [c.name for c in constants], name)
        nodes += own
        graph.initializer.extend(sizes)
        held.update((width, kind) for width in np.unique(weight.widths).tolist())
        has_small_products |= weight.codes.ndim == 2 and kind.endswith("int4")
    for node in reversed(nodes):
        graph.node.insert(0, node)
    for kind in sorted({kind for _, kind in held}):
        widths = sorted(width for width, k in held if k == kind)
        yield f"weights of {_listed(widths)} bits are held in {kind}"
    if has_small_products:
        yield (
            "ONNX Runtime may round to 8 bits what linear layers with 4-bit weights read: give the "
            "session session.qdq_matmulnbits_accuracy_level = 1, as hawq evaluate does"
        )


def _is_kept(weight: QuantizedWeight) -> bool:
    """Whether its integers are held in the layer's own order: its scales then lie on one axis."""
    return weight.transposed_groups < 2 or len(weight.scale) == 1


def _dequantized(
    weight: QuantizedWeight, constants: list[str], name: str
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Make the nodes that turn integers into a weight, and the sizes that they need.

    Scales of the output channels of a transposed convolution lie on the weight's second axis; with
    groups they lie on two, so that its integers are held with the output channels first.
    """
    if _is_kept(weight):
        axis = min(weight.transposed_groups, 1)
        return [_node("DequantizeLinear", constants, name, axis)], []
    outputs, inputs, *kernel = weight.codes.shape
    groups = weight.transposed_groups
    sizes = {
        "grouped": (groups, outputs // groups, inputs, *kernel),
        "kept": (groups * inputs, outputs // groups, *kernel),
    }
    swap = _node("Transpose", [f"{name}.by_group"], f"{name}.swapped")
    swap.attribute.append(helper.make_attribute("perm", [0, 2, 1, *range(3, 3 + len(kernel))]))
    nodes = [
        _node("DequantizeLinear", constants, f"{name}.rows", axis=0),
        _node("Reshape", [f"{name}.rows", f"{name}.grouped"], f"{name}.by_group"),
        swap,
        _node("Reshape", [f"{name}.swapped", f"{name}.kept"], name),
    ]
    return nodes, [
        _constant(f"{name}.{key}", np.array(size), TensorProto.INT64, 64)
        for key, size in sizes.items()
    ]


def _integers(weight: QuantizedWeight, name: str) -> tuple[list[TensorProto], str]:
    """Return a weight's integers, scales and zero points, and the type of the integers."""
    shape = (-1, *[1] * (weight.codes.ndim - 1))
    widths = weight.widths.reshape(shape)
    scale, zero_point = weight.scale, weight.zero_point
    if weight.form == "dorefa":
        levels = np.maximum(2**weight.widths - 1, 1)
        q = (2 * weight.codes - levels.reshape(shape)) * (widths > 0)
        scale = np.where(weight.widths > 1, weight.scale[0] / levels, weight.scale[1])
        scale, zero_point = scale.astype(np.float32), np.zeros(len(levels), int)
    elif weight.form == "asymmetric":
        q = weight.codes
    else:
        odd = (widths == 1) | (widths == 2)
        q = np.where(widths > 0, weight.codes - 2.0 ** (widths - 1), 0).astype(int)
        q = np.where(odd, 2 * q + 1, q)
    unsigned = weight.form == "asymmetric"
    largest = max(q.max(initial=0), -1 - q.min(initial=0), zero_point.max(initial=0))
    bits = next(b for b in (4, 8, 16) if largest < 2 ** (b - 1 + unsigned))
    kind = f"{'uint' if unsigned else 'int'}{bits}"
    data_type = getattr(TensorProto, kind.upper())
    if len(scale) == 1:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    if _is_kept(weight):
        q = weight.as_kept(q)
    return [
        _constant(f"{name}.integers", q, data_type, bits),
        _constant(f"{name}.scale", scale, TensorProto.FLOAT, 32),
        _constant(f"{name}.zero_point", zero_point, data_type, bits),
    ], kind


def _insert_tensors(
    graph: GraphProto, tensors: Iterable[QuantizedTensor], marks: list[_Mark]
) -> Iterator[str]:
    """Put the rounding where the marks are; say what holds what."""
    by_name = {tensor.name: tensor for tensor in tensors}
    nodes: list[NodeProto] = []
    rounded: dict[tuple[str, str], str] = {}
    for node in graph.node:
        if node.domain != _DOMAIN:
            nodes.append(node)
            continue
        mark = marks[node.attribute[0].i]
        key = (node.input[0], mark.name)
        if key in rounded:  # another layer reads the same
            nodes.append(_node("Identity", [rounded[key]], node.output[0]))
            continue
        rounded[key] = node.output[0]
        own, constants = _rounding(by_name[mark.name], mark, *key[:1], node.output[0])
        nodes += own
        graph.initializer.extend(constants)
    del graph.node[:]
    graph.node.extend(nodes)
    used = [by_name[name] for _, name in rounded]
    widths = sorted({width for tensor in used for width in tensor.widths.tolist()})
    if widths:
        yield f"activations of {_listed(widths)} bits are held in uint8, clipped to their own codes"
    odd = [tensor.name for tensor in used if tensor.lines[3].any()]
    if odd:
        yield (
            f"ONNX has no odd codes: {', '.join(odd)} are shifted by half a step before rounding, "
            "and back after it"
        )


def _rounding(
    tensor: QuantizedTensor, mark: _Mark, source: str, target: str
) -> tuple[list[NodeProto], list[TensorProto]]:
    """Make the nodes that round a tensor, and their constants."""
    low, high, step, offset = tensor.lines
    unit, shift = tensor.scale * step, tensor.scale * offset
    is_one = len(unit) == 1
    axis = 1 if is_one else tensor.axis % mark.rank
    shape = () if is_one else (-1, *[1] * (mark.rank - 1 - axis))
    zero = tensor.zero_point if tensor.form == "asymmetric" else np.full(len(unit), _MIDDLE)
    if tensor.form == "unsigned":
        zero = np.zeros(len(unit), int)
    prefix = f"{target}/{tensor.name}"
    values = {
        "shift": shift.reshape(shape),
        "low": (low * unit).reshape(shape),
        "high": (high * unit).reshape(shape),
        "scale": unit.reshape(() if is_one else -1),
    }
    constants = [_constant(f"{prefix}/{k}", v, TensorProto.FLOAT, 32) for k, v in values.items()]
    zero = zero.reshape(() if is_one else -1)
    constants.append(_constant(f"{prefix}/zero_point", zero, TensorProto.UINT8, 8))
    steps = [("Max", ["low"]), ("Min", ["high"])]
    if is_one:
        steps = [("Clip", ["low", "high"])]
    steps += [("QuantizeLinear", ["scale", "zero_point"])]
    if is_one or axis < mark.rank - 1:
        steps += [("DequantizeLinear", ["scale", "zero_point"])]
    else:
        # ONNX Runtime would fuse scales of channels with the product that follows, and then refuse
        # to run it; a multiplication of its own keeps them apart.
        ones = np.ones_like(values["scale"])
        constants.append(_constant(f"{prefix}/one", ones, TensorProto.FLOAT, 32))
        steps += [("DequantizeLinear", ["one", "zero_point"]), ("Mul", ["scale"])]
    if shift.any():
        steps = [("Sub", ["shift"]), *steps, ("Add", ["shift"])]
    nodes = []
    for i, (operator, names) in enumerate(steps):
        result = target if i + 1 == len(steps) else f"{prefix}/{operator}"
        inputs = [source, *(f"{prefix}/{n}" for n in names)]
        own_axis = axis if operator.endswith("Linear") else None
        nodes.append(_node(operator, inputs, result, own_axis))
        source = result
    used = {name for node in nodes for name in node.input}
    return nodes, [constant for constant in constants if constant.name in used]


def _node(operator: str, inputs: list[str], output: str, axis: int | None = None) -> NodeProto:
    node = helper.make_node(operator, inputs, [output])
    if axis is not None:
        node.attribute.append(helper.make_attribute("axis", axis))
    return node


def _constant(name: str, value: NDArray[Any], data_type: int, bits: int) -> TensorProto:
    """Make a constant; integers of 4 bits lie two in a byte, the first one lowest."""
    if bits == 4:
        flat = np.pad(value.ravel(), (0, value.size % 2)) & 15
        raw = (flat[::2] | flat[1::2] << 4).astype(np.uint8).tobytes()
    else:
        kind = helper.tensor_dtype_to_np_dtype(data_type)
        raw = np.ascontiguousarray(value.astype(kind)).tobytes()
    return helper.make_tensor(name, data_type, value.shape, raw, raw=True)


def _listed(widths: list[int]) -> str:
    return ", ".join(map(str, widths))
