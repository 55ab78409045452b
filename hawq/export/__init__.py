"""Networks out: packed integers, ONNX and torch programs that compute what was tested."""

from hawq.export.packed import Packed, QuantizedTensor, QuantizedWeight, load, read
from hawq.export.packing import encode, pack

__all__ = ["Packed", "QuantizedTensor", "QuantizedWeight", "encode", "load", "pack", "read"]
