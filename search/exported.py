"""Exported networks read back: packed integers, ONNX graphs, torch programs.

Each file says where it came from, in ``about``: a packed file in its index, an ONNX graph in its
metadata under ``hawq``, a torch program in an extra file ``hawq.json``.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten, treespec_loads

from hawq.export import Packed, load, read
from hawq.task import Task
from search.errors import InputError

if TYPE_CHECKING:
    from hawq.export.onnx_graph import OnnxGraph

__all__ = [
    "ABOUT",
    "Exported",
    "Format",
    "OnnxRun",
    "graph_of",
    "network_of",
    "onnx_session",
    "read_exported",
]

Format = Literal["packed", "onnx", "torch"]
ABOUT = "hawq"
_EXTRA = "hawq.json"


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A file that ``hawq export`` wrote.

    Attributes:
        path: Where it is.
        format: What it is.
        content: Its bytes.
        about: Where it came from: plain data.
        packed: The integers, of a packed file.
    """

    path: Path
    format: Format
    content: bytes
    about: Mapping[str, Any]
    packed: Packed | None = None

    @property
    def batch(self) -> int | None:
        """How many inputs it takes at once; None for any number."""
        size: int | None = self.about.get("batch")
        return size


def read_exported(path: Path) -> Exported:
    """Read a file that ``hawq export`` wrote.

    Raises:
        InputError: If it is none.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: must be an exported network ({error.strerror})") from error
    if content.startswith(b"PK"):
        return Exported(path, "torch", content, _torch_about(path, content))
    if content[8:9] == b"{":
        try:
            packed = read(content)
        except ValueError as error:
            raise InputError(f"{path}: {error}: make one with hawq export") from error
        return Exported(path, "packed", content, packed.about, packed)
    return Exported(path, "onnx", content, _onnx_about(path, content))


def network_of(exported: Exported, task: Task, threads: int = 1) -> nn.Module:
    """Return what the file computes, as a network that takes and returns what the task's does.

    Raises:
        InputError: If the task's network is another one.
    """
    if exported.packed is not None:
        try:
            return load(exported.packed, task.model())
        except ValueError as error:
            raise InputError(f"{exported.path}: {error}") from error
    function: Callable[[Tensor], Any]
    if exported.format == "torch":
        function = torch.export.load(io.BytesIO(exported.content)).module()
    else:
        function = OnnxRun(exported.content, exported.about["outputs"], threads)
    runner = _Runner(function, exported.batch)
    plain = task.model()
    return _detector(exported.path, plain, runner) if hasattr(plain, "predict") else runner


def graph_of(packed: Packed, model: nn.Module, example: Tensor, *, is_dynamic: bool) -> "OnnxGraph":
    """Make the graph of a packed network; see ``hawq.export.onnx_graph``.

    Raises:
        InputError: If onnx is not installed.
        ValueError: If the network is another one, or an operator of it has no place in ONNX.
    """
    with _needing("onnx", "make an ONNX graph"):
        from hawq.export.onnx_graph import onnx_graph  # noqa: PLC0415  an optional part
    return onnx_graph(packed, model, example, is_dynamic=is_dynamic)


def onnx_session(content: bytes, threads: int, optimized: Path | None = None) -> Any:
    """Open a graph in ONNX Runtime, on the processor.

    Args:
        content: The graph.
        threads: To compute with.
        optimized: File for what the runtime makes of it.

    Raises:
        InputError: If ONNX Runtime is not installed.
    """
    with _needing("onnxruntime", "run ONNX"):
        import onnxruntime  # noqa: PLC0415  an optional part
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # an optimized graph that is kept is for this machine: we know
    # Else products of 4-bit weights round their other factor to 8 bits, which was not asked for.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@contextmanager
def _needing(package: str, what_for: str) -> Iterator[None]:
    """Refuse what a package of the extra is missing for."""
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{package} must be installed to {what_for}, got none: "
            "pip install 'hawq-search[export]'"
        ) from error


class OnnxRun:
    """A graph as a function of the network's inputs.

    Args:
        content: The graph.
        outputs: How its outputs are nested, as torch's pytrees write it.
        threads: To compute with.
    """

    def __init__(self, content: bytes, outputs: str, threads: int = 1) -> None:
        self._session = onnx_session(content, threads)
        self._spec = treespec_loads(outputs)

    def __call__(self, x: Tensor) -> Any:
        """Return what the network returns."""
        (taken,) = self._session.get_inputs()
        found = self._session.run(None, {taken.name: x.contiguous().numpy()})
        return tree_unflatten([torch.from_numpy(value) for value in found], self._spec)


class _Runner(nn.Module):
    """A function in a network's place; in pieces, where it takes a certain number of inputs."""

    def __init__(self, function: Callable[[Tensor], Any], batch: int | None) -> None:
        super().__init__()
        # In a list, for a program is a module that refuses to be put into eval mode.
        self._functions, self._batch = [function], batch
        self.device = nn.Parameter(torch.zeros(0), requires_grad=False)  # tells where it is

    def forward(self, x: Tensor) -> Any:
        """Run it."""
        (function,) = self._functions
        if self._batch is None:
            return function(x)
        short = -len(x) % self._batch
        padded = torch.cat([x, x[-1:].expand(short, *x.shape[1:])])
        pieces = [tree_flatten(function(piece)) for piece in padded.split(self._batch)]
        leaves = [torch.cat(of) for of in zip(*(found for found, _ in pieces), strict=True)]
        return tree_map(lambda leaf: leaf[: len(x)], tree_unflatten(leaves, pieces[0][1]))


def _detector(path: Path, plain: nn.Module, runner: _Runner) -> nn.Module:
    """Let a detector find its boxes in what the file computes: the outputs of its head."""
    head = getattr(plain, "bbox_head", None)
    if not isinstance(head, nn.Module) or hasattr(plain, "roi_head"):
        raise InputError(
            f"{path}: must hold a detector of one stage to be scored, for the file ends with the "
            f"outputs of the head, got {type(plain).__name__}: evaluate the packed file"
        )
    # Features are not needed: the file takes images.
    setattr(plain, "extract_feat", lambda images: images)  # noqa: B010  no attribute of its type
    setattr(head, "forward", runner.forward)  # noqa: B010
    return plain


def _torch_about(path: Path, content: bytes) -> Mapping[str, Any]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (name,) = [n for n in archive.namelist() if n.endswith(f"extra/{_EXTRA}")]
            about: dict[str, Any] = json.loads(archive.read(name))
    except (zipfile.BadZipFile, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _none_of_ours(path, f"a torch file without {_EXTRA}") from error
    return about


def _onnx_about(path: Path, content: bytes) -> Mapping[str, Any]:
    with _needing("onnx", "read ONNX"):
        import onnx  # noqa: PLC0415  an optional part
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # noqa: PLC0415
    try:
        graph = onnx.load_from_string(content)
    except DecodeError as error:
        raise _none_of_ours(path, "something else") from error
    found = {entry.key: entry.value for entry in graph.metadata_props}
    if ABOUT not in found:
        if not graph.graph.node:
            raise _none_of_ours(path, "something else")
        raise _none_of_ours(path, f"an ONNX graph without the metadata {ABOUT!r}")
    about: dict[str, Any] = json.loads(found[ABOUT])
    return about


def _none_of_ours(path: Path, got: str) -> InputError:
    return InputError(f"{path}: must be a file that hawq export wrote, got {got}")
