"""ONNX graphs of one layer each, as ONNX Runtime's processor kernels want them.

An int8 layer reads and writes codes: uint8 tensors and int8 weights with a scale for each output
channel, the pair that x86 and Arm have fast kernels for. A signed tensor is a uint8 one with its
zero point in the middle. Convolutions take channels last: this is what ONNX Runtime makes of a
whole quantized network, and a layer alone need not pay for the transpositions at its ends.

``onnx`` is imported when a graph is made: it is an optional part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from search.latency.calls import LayerCall

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Codes", "float_graph", "integer_graph", "nothing_graph"]

# The oldest that say all this: later runtimes read them, too.
_OPSET, _IR_VERSION = 13, 8


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """A quantized layer: a value is its scale times (code − zero point).

    Attributes:
        weight: Codes, shape (O, C / groups, K…), zero point 0.
        weight_scale: Shape (O,).
        bias: In units of weight scale × input scale, shape (O,).
        input_scale: Of the tensor that is read.
        input_zero: Its zero point, 0..255.
        output_scale: Of the tensor that is written.
        output_zero: Its zero point, 0..255.
    """

    weight: NDArray[np.int8]
    weight_scale: NDArray[np.float32]
    bias: NDArray[np.int32]
    input_scale: float
    input_zero: int
    output_scale: float
    output_zero: int


def float_graph(
    call: LayerCall, weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> "ModelProto":
    """Make the graph of an unquantized call, from ``x`` to ``y``, float32, of the call's shapes."""
    operator, attributes = ("Conv", _window(call))
    if call.is_linear:
        operator, attributes = "Gemm", {"transB": 1}
    elif call.output_pads is not None:
        operator = "ConvTranspose"
        attributes["output_padding"] = call.output_pads
    constants = {"w": weight, "b": bias}
    return _graph(operator, ["x", "w", "b"], constants, attributes, call.input, np.float32)


def integer_graph(call: LayerCall, codes: Codes) -> "ModelProto":
    """Make the graph of a quantized call, from ``x`` to ``y``, both uint8, channels last.

    ONNX Runtime has no such kernel of a transposed convolution.
    """
    constants: dict[str, NDArray[Any]] = {
        "x_scale": np.array(codes.input_scale, np.float32),
        "x_zero": np.array(codes.input_zero, np.uint8),
        "w": codes.weight.T if call.is_linear else codes.weight,
        "w_scale": codes.weight_scale,
        "w_zero": np.zeros(len(codes.weight), np.int8),
        "b": codes.bias,
        "y_scale": np.array(codes.output_scale, np.float32),
        "y_zero": np.array(codes.output_zero, np.uint8),
    }
    read = ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero"]
    written = ["y_scale", "y_zero"]
    if call.is_linear:
        names = [*read, "b", *written]
        return _graph("QGemm", names, constants, {}, call.input, np.uint8)
    shape = (call.input[0], *call.input[2:], call.input[1])
    attributes = {**_window(call), "channels_last": 1}
    names = [*read, *written, "b"]
    return _graph("QLinearConv", names, constants, attributes, shape, np.uint8)


def nothing_graph() -> "ModelProto":
    """Make a graph that hands one number on: what a call costs besides its work."""
    return _graph("Identity", ["x"], {}, {}, (1,), np.float32)


def _window(call: LayerCall) -> dict[str, Any]:
    return {
        "kernel_shape": call.weight[2:],
        "strides": call.stride,
        "pads": call.pads,
        "dilations": call.dilation,
        "group": call.groups,
    }


def _graph(
    operator: str,
    names: list[str],
    constants: Mapping[str, NDArray[Any]],
    attributes: Mapping[str, Any],
    shape: tuple[int, ...],
    dtype: type[np.generic],
) -> "ModelProto":
    """Make a graph of one node that reads ``x`` and constants and writes ``y``."""
    from onnx import helper, numpy_helper  # noqa: PLC0415  an optional part

    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    # The integer kernels that whole networks run are ONNX Runtime's own.
    domain = "com.microsoft" if dtype == np.uint8 else ""
    return helper.make_model(
        helper.make_graph(
            [helper.make_node(operator, names, ["y"], domain=domain, **attributes)],
            "layer",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("y", kind, None)],
            [
                numpy_helper.from_array(np.ascontiguousarray(value), name)
                for name, value in constants.items()
            ],
        ),
        opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)],
        ir_version=_IR_VERSION,
    )
