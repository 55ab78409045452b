"""Latency measured here: each layer at each precision that ONNX Runtime really computes with.

On a processor that is fp32 and int8. Fewer bits have no kernels: they are priced at eight, for that
is what they would run at.

The precisions of a layer take turns, so that what else the machine does falls on all alike, and a
call of a graph that does nothing is subtracted from each: twenty layers of one network are called
once, not twenty times. The calls' shapes decide; calls of one shape are measured once. On a
network of 19 convolutions the layers' sum was within 6 % of the whole network's time, in fp32 and
in int8 (one thread of an AMD EPYC with VNNI, ONNX Runtime 1.31.1).
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from search.errors import InputError
from search.latency.calls import LayerCall, uncalled
from search.latency.graphs import Codes, float_graph, integer_graph, nothing_graph
from search.latency.stopwatch import Run, Timing, timed_in_turns
from search.latency.table import LatencyEntry, LatencyTable
from search.machine import machine, versions
from search.tracing import Progress

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["measure", "runtime_versions"]


def measure(
    calls: Mapping[str, Sequence[LayerCall]],
    *,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
    batch_size: int,
    threads: int = 1,
    seconds: float = 0.3,
    progress: Progress = lambda *_: None,
) -> LatencyTable:
    """Measure layers with ONNX Runtime on this machine's processor.

    Args:
        calls: Of each layer, with a whole batch; see ``layer_shapes``.
        weight_bits: Widths that weights may receive.
        activation_bits: Widths that activations may receive; none leaves them floating, and
            the layers run in fp32 then, whatever their weights' bits.
        batch_size: Examples of a call.
        threads: Of one layer.
        seconds: For each shape of a call, warm-up not counted; nine rounds run in any case.
        progress: Told how far it is, in shapes.

    Raises:
        InputError: If onnx or onnxruntime are not installed.
    """
    runtime = runtime_versions()
    shapes = list(dict.fromkeys(call for seen in calls.values() for call in seen))
    timings = {}
    for done, shape in enumerate(shapes):
        progress(done, len(shapes), "shapes", "")
        timings[shape] = _timed(shape, threads, seconds)
    progress(len(shapes), len(shapes), "shapes", "")
    called = [layer for layer in calls if calls[layer]]
    floating, integer = (
        {layer: Timing.total(timings[c][i] for c in calls[layer]) for layer in called}
        for i in range(2)
    )
    priced = integer if activation_bits else floating
    read: Sequence[int | None] = activation_bits or [None]
    return LatencyTable(
        schema_version=1,
        kind="measured",
        machine=machine(),
        versions=versions() | runtime,
        batch_size=batch_size,
        threads=threads,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        notes=_notes(activation_bits) + _transposed(calls) + uncalled(calls),
        macs={layer: sum(c.macs for c in calls[layer]) // batch_size for layer in called},
        fp32_ns={layer: timing.ns for layer, timing in floating.items()},
        fp32_standard_error_ns={layer: timing.error_ns for layer, timing in floating.items()},
        layers={
            layer: [
                LatencyEntry(
                    weight_bits=w,
                    activation_bits=a,
                    ns=timing.ns,
                    standard_error_ns=timing.error_ns,
                )
                for w in weight_bits
                for a in read
            ]
            for layer, timing in priced.items()
        },
    )


def runtime_versions() -> dict[str, str]:
    """Return the versions of the optional part that measures.

    Raises:
        InputError: If onnx or onnxruntime cannot be imported.
    """
    try:
        import onnx  # noqa: PLC0415
        import onnxruntime  # noqa: PLC0415
    except ImportError as error:
        raise InputError(
            "hawq profile needs onnxruntime: pip install 'hawq-search[export]', or give the "
            "machine's --peak and --bandwidth"
        ) from error
    return {"onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


def _timed(call: LayerCall, threads: int, seconds: float) -> tuple[Timing, Timing]:
    """Measure one call in fp32 and in int8; what has no int8 kernel, in fp32 for both."""
    rng = np.random.default_rng(0)
    num_channels = call.output[1]
    weight = rng.standard_normal(call.weight, np.float32)
    bias = np.zeros(num_channels, np.float32)
    floating = _runnable(float_graph(call, weight, bias), rng, threads)
    nothing = _runnable(nothing_graph(), rng, threads)
    if call.is_transposed:
        (fp32,) = timed_in_turns([floating], nothing, seconds)
        return fp32, fp32
    codes = Codes(
        weight=rng.integers(-127, 128, call.weight, np.int8),
        weight_scale=np.full(num_channels, 0.01, np.float32),
        bias=np.zeros(num_channels, np.int32),
        input_scale=0.02,
        input_zero=128,
        output_scale=1.0,
        output_zero=128,
    )
    integer = _runnable(integer_graph(call, codes), rng, threads)
    fp32, int8 = timed_in_turns([floating, integer], nothing, seconds)
    return fp32, int8


def _runnable(graph: "ModelProto", rng: np.random.Generator, threads: int) -> Run:
    """Load a graph; return what runs it once, on tensors that stay where they are."""
    import onnxruntime  # noqa: PLC0415

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = session.get_inputs()[0]
    values = rng.integers(0, 256, wanted.shape)
    values = values.astype(np.uint8 if wanted.type == "tensor(uint8)" else np.float32)
    (written,) = session.run(None, {"x": values})
    tensors = [onnxruntime.OrtValue.ortvalue_from_numpy(x) for x in (values, written)]
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", tensors[0])
    binding.bind_ortvalue_output("y", tensors[1])

    def run() -> object:
        session.run_with_iobinding(binding)
        return tensors  # the binding does not keep them alive

    return run


def _notes(activation_bits: Sequence[int]) -> list[str]:
    how = (
        "Each layer alone, with its data in the cache, at the median of repeats; a call of an "
        "empty graph is subtracted. Batch-norm is taken as folded; what lies between the layers "
        "is not in it."
    )
    if not activation_bits:
        return [
            "Activations stay in floating point: weights of any width are expanded and run in "
            "fp32, no width is faster than another.",
            how,
        ]
    return [
        "Weights and activations of 1 to 8 bits all run in int8 (QLinearConv, QGemm): ONNX Runtime "
        "has no kernels for fewer bits on a processor, so fewer bits are not faster here. Its "
        "4-bit product of matrices, MatMulNBits, reads floating activations and is not used.",
        how,
    ]


def _transposed(calls: Mapping[str, Sequence[LayerCall]]) -> list[str]:
    layers = ", ".join(name for name, seen in calls.items() if any(c.is_transposed for c in seen))
    note = "ONNX Runtime has no integer kernel of a transposed convolution: in fp32 at every width"
    return [f"{note}: {layers}."] if layers else []
