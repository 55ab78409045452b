"""``hawq evaluate``: an exported file measured: its score, its size, its speed."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from hawq.export import Packed, pack
from hawq.finetune import evaluate as scores_of
from hawq.task import Task
from search.config_file import load_config
from search.errors import InputError
from search.exported import Exported, graph_of, network_of, onnx_session, read_exported
from search.latency.stopwatch import Timing, timed_in_turns
from search.tasks.build import build_task

__all__ = ["Measured", "Speed", "evaluate_file", "measured_lines"]

# What ONNX Runtime calls layers that compute with integers, and with floats.
_INTEGER_KERNELS = {"QLinearConv", "QGemm", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
_INTEGER_KERNELS |= {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulNBits"}
_FLOAT_KERNELS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


@dataclass(frozen=True, slots=True)
class Speed:
    """What a forward pass takes, beside the network's in floating point.

    Attributes:
        runtime: What ran it.
        batch: Inputs at once.
        threads: To compute with.
        quantized: Median of the repeats.
        floating: Likewise, of the network as it was before quantization.
        num_integer: Layers that ONNX Runtime computes with integers; None where torch ran it.
        num_float: Layers that it computes with floats.
    """

    runtime: str
    batch: int
    threads: int
    quantized: Timing
    floating: Timing
    num_integer: int | None = None
    num_float: int | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What a file does.

    Attributes:
        file: What was measured.
        score_name: Of the task.
        split: Whose examples.
        scores: Of each example, shape (N,).
        num_bytes: Of the file.
        float_bytes: Of the network's tensors before quantization, in 32 bits.
        is_same_task: Whether the file was exported for this network, data and splits.
        speed: None where it was not asked for.
    """

    file: Exported
    score_name: str
    split: str
    scores: Tensor
    num_bytes: int
    float_bytes: int
    is_same_task: bool
    speed: Speed | None

    @property
    def score(self) -> float:
        """The mean."""
        return float(self.scores.double().mean())

    @property
    def standard_error(self) -> float:
        """Of the score, over the choice of examples."""
        return float(self.scores.double().std()) / math.sqrt(len(self.scores))


def evaluate_file(
    path: Path,
    config: Path,
    overrides: Sequence[str] = (),
    *,
    split: str = "test",
    batch: int = 1,
    threads: int = 1,
    seconds: float = 3.0,
) -> Measured:
    """Measure an exported file.

    Args:
        path: The file.
        config: Of the run that it came from, or one with the same task.
        overrides: Of the config.
        split: Whose examples are scored.
        batch: Inputs at once, for the time of a forward pass; a file that takes a certain number
            is timed with that.
        threads: To compute with.
        seconds: For the repeats, of the processor where it is one thread; 0 times nothing.

    Raises:
        InputError: If the file is none of ours, or of another network.
    """
    file = read_exported(path)
    loaded = load_config(config, overrides)
    task = build_task(loaded.task, loaded.seed)
    network = network_of(file, task, threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores = scores_of(network, task, split)
        speed = _speed(file, network, task, file.batch or batch, threads, seconds)
    finally:
        torch.set_num_threads(before)
    state = {t.data_ptr(): t for t in task.model().state_dict().values() if t.is_floating_point()}
    return Measured(
        file,
        task.score_name,
        split,
        scores,
        len(file.content),
        4 * sum(tensor.numel() for tensor in state.values()),
        file.about.get("task") == task.fingerprint,
        speed if seconds else None,
    )


def measured_lines(found: Measured) -> Iterator[str]:
    """Say what was measured."""
    reported = found.file.about.get("test")
    beside = ""
    if reported is not None and found.split == "test" and found.is_same_task:
        beside = f"; the run's report says {100 * reported:.2f} %"
    yield (
        f"{found.score_name}  {100 * found.score:.2f} ± {100 * found.standard_error:.2f} % on "
        f"{len(found.scores):,} examples of the {found.split} split{beside}"
    )
    if not found.is_same_task:
        yield "The file was exported for another network, other data or other splits."
    ratio = found.float_bytes / found.num_bytes
    compared = f"{ratio:.2f} times smaller than" if ratio >= 1 else f"{1 / ratio:.2f} times"
    yield (
        f"size      {found.num_bytes:,} bytes, {compared} the {found.float_bytes:,} of the "
        f"network's tensors in 32 bits"
    )
    if found.file.format == "onnx":
        error = found.file.about["max_error"]
        yield f"outputs   within {error:.3g} of the fake-quantized network's, when exported"
    if found.speed is not None:
        yield from _speed_lines(found.speed)


def _speed_lines(speed: Speed) -> Iterator[str]:
    mine, other = speed.quantized, speed.floating
    ratio = other.ns / mine.ns
    error = ratio * math.hypot(mine.error_ns / mine.ns, other.error_ns / other.ns)
    verdict = f"{ratio:.2f} ± {error:.2f} times as fast"
    if ratio < 1:
        verdict = f"{1 / ratio:.2f} ± {error / ratio**2:.2f} times as slow"
    told = ", the processor's time" if speed.threads == 1 else ""
    yield (
        f"latency   {mine.ns / 1e6:.3f} ms, in floating point {other.ns / 1e6:.3f} ms: {verdict} "
        f"(medians, {speed.runtime}, {speed.batch} at once, threads: {speed.threads}{told})"
    )
    if speed.num_integer is None or speed.num_float is None:
        yield "torch computes with floats: rounding is work on top of the network's own."
        return
    layers = speed.num_integer + speed.num_float
    if speed.num_float == 0:
        yield f"All {layers} layers compute with 8-bit integers, for no processor has fewer bits."
        return
    yield (
        f"{speed.num_float} of {layers} layers compute with floats: their integers are widened "
        "first, and rounding is work on top. There are kernels for 8-bit weights that read 8 bits, "
        "and only where nothing but ReLU lies between a layer and the next rounding to 8 bits: "
        "task.fold_batch_norm: true takes batch-norm away."
    )


def _speed(
    file: Exported, network: nn.Module, task: Task, batch: int, threads: int, seconds: float
) -> Speed | None:
    if not seconds:
        return None
    size = task.size("search")
    inputs = task.inputs(task.batch("search", torch.arange(batch) % size))
    plain = task.model()
    # Of one thread the processor's time: what else the machine does is not the network's.
    clock = time.process_time_ns if threads == 1 else time.perf_counter_ns
    if file.format == "torch":
        with torch.inference_mode():
            quantized, floating = timed_in_turns(
                [lambda: network(inputs), lambda: plain.eval()(inputs)], _nothing, seconds, clock
            )
        return Speed("torch", batch, threads, quantized, floating)
    content = file.content
    if file.packed is not None:
        content = _graph(file.packed, task, inputs)
    with TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        session = onnx_session(content, threads, optimized)
        num_integer, num_float = _kernels(optimized)
    other = onnx_session(_graph(pack(plain), task, inputs), threads)
    (taken,) = session.get_inputs()
    feed = {taken.name: inputs.contiguous().numpy()}
    quantized, floating = timed_in_turns(
        [lambda: session.run(None, feed), lambda: other.run(None, feed)], _nothing, seconds, clock
    )
    runtime = "ONNX Runtime" if file.packed is None else "ONNX Runtime, by its graph"
    return Speed(runtime, batch, threads, quantized, floating, num_integer, num_float)


def _graph(packed: Packed, task: Task, inputs: Tensor) -> bytes:
    try:
        made = graph_of(packed, task.model(), inputs, is_dynamic=False)
    except ValueError as error:
        raise InputError(f"--seconds: 0 leaves the latency out: {error}") from error
    content: bytes = made.model.SerializeToString()
    return content


def _kernels(path: Path) -> tuple[int, int]:
    """Count the layers that compute with integers, and with floats, in a graph of the runtime."""
    import onnx  # noqa: PLC0415  an optional part

    found = Counter(node.op_type for node in onnx.load(str(path)).graph.node)
    return (
        sum(found[name] for name in _INTEGER_KERNELS),
        sum(found[name] for name in _FLOAT_KERNELS),
    )


def _nothing() -> None:
    """Take no time."""
