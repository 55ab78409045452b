"""Any network with any examples, loss and score: what ``search.run`` searches.

Inputs are one tensor a split, targets anything with one example a row. Nothing is asked of the loss
but one value an example; cross-entropy is recognized, which gives the curvature its formula.
"""

import copy
import hashlib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hawq.factors import factors_of, softmax_factor
from hawq.task import Factor
from search.errors import InputError
from search.folder import write_atomically
from search.tasks.checkpoint import state_sha256
from search.tasks.cross_entropy import is_right, softened_divergence
from search.tasks.examples import SPLITS, Batches, Rows, gathered, picked
from search.tasks.factories import called, checked_network, outputs_of, source_of
from search.tasks.portable import packed, unpacked

__all__ = ["Given", "GivenTask", "Made", "Stored", "given", "given_task", "store", "stored"]

Loss = Callable[[Any, Any], Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Given:
    """A network with examples in memory.

    Attributes:
        model: With its weights.
        splits: Split to inputs, shape (N, …), and targets, N rows.
        loss: Of outputs and targets, one value an example; None for cross-entropy.
        metric: Likewise; None for the accuracy of classes.
        augment: Of a batch's inputs, by a generator alone; None for none.
        search_seen: Whether the network was trained on the search split.
        fingerprint: Hash of all of this.
    """

    model: nn.Module
    splits: Mapping[str, Rows]
    loss: Loss | None
    metric: Loss | None
    augment: Augment | None
    search_seen: bool
    fingerprint: str


class Source(Protocol):
    """What finds, or makes, the same network and examples anywhere."""

    def open(self) -> Given:
        """Return them; a process does the work once."""
        ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A network and examples in a folder, which ``store`` left.

    Attributes:
        folder: The folder.
    """

    folder: str

    def open(self) -> Given:
        """Read them; the examples stay on disk until they are asked for."""
        return _read(self.folder)


@dataclass(frozen=True, slots=True)
class Made:
    """A network and examples that functions of the user's make.

    Attributes:
        maker: A function without arguments that returns ``Given``, as ``packed`` has it.
    """

    maker: bytes

    def open(self) -> Given:
        """Call them."""
        return _make(self.maker)


@dataclass(frozen=True)
class GivenTask:
    """A network with examples, a loss and a score; see ``hawq.task.Task``.

    Attributes:
        source: Where they come from.
    """

    source: Source

    @property
    def score_name(self) -> str:
        """The metric's name."""
        metric = self.source.open().metric
        name = "accuracy" if metric is None else getattr(metric, "__name__", "score")
        return name if name.isidentifier() else "score"  # a lambda has no name

    @property
    def fingerprint(self) -> str:
        """Hash of the network, its weights, the examples and the functions' texts."""
        return self.source.open().fingerprint

    @property
    def search_seen(self) -> bool:
        """Whether the search split is a part of the given training split."""
        return self.source.open().search_seen

    def model(self) -> nn.Module:
        """Copy the network, with its weights."""
        return copy.deepcopy(self.source.open().model)

    def size(self, split: str) -> int:
        """Count the examples of a split."""
        return len(self._split(split)[0])

    def batch(self, split: str, indices: Tensor) -> Rows:
        """Return inputs, shape (N, …), and targets, N rows."""
        return picked(self._split(split), indices)

    def augment(self, batch: Rows, generator: torch.Generator) -> Rows:
        """Augment the inputs, if the user said how."""
        augment = self.source.open().augment
        return batch if augment is None else (augment(batch[0], generator), batch[1])

    def inputs(self, batch: Rows) -> Tensor:
        """Return the inputs."""
        return batch[0]

    def losses(self, model: nn.Module, batch: Rows) -> Tensor:
        """Return each example's loss, shape (N,)."""
        return _losses(self.source.open().loss, model(batch[0]), batch[1])

    def curvature(self, model: nn.Module, batch: Rows) -> tuple[Tensor, Sequence[Factor]] | None:
        """Return the outputs and the factors: softmax's, or any loss's of at most 64 outputs."""
        loss, targets = self.source.open().loss, batch[1]
        outputs = model(batch[0])
        if not isinstance(outputs, Tensor):
            return None
        if _is_cross_entropy(loss) and outputs.ndim == 2:
            return outputs, [softmax_factor(outputs)]
        with torch.enable_grad():
            factors = factors_of(lambda o: _losses(loss, o, targets), outputs.detach())
        return None if factors is None else (outputs, factors)

    def scores(self, model: nn.Module, batch: Rows) -> Tensor:
        """Return each example's score, shape (N,)."""
        metric, outputs, targets = self.source.open().metric, model(batch[0]), batch[1]
        if metric is None:
            return is_right(outputs, targets)
        return _one_each(metric(outputs, targets), len(batch[0]), "metric").float()

    def _split(self, split: str) -> Rows:
        if split not in SPLITS:
            raise ValueError(f"split must be 'train', 'search' or 'test', got {split!r}")
        return self.source.open().splits[split]


class _GivenClassifier(GivenTask):
    """The same with softmax cross-entropy: its network may learn from another one's classes."""

    def distillation(self, outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
        """Return each example's divergence from the teacher, shape (N,)."""
        return softened_divergence(outputs, teacher_outputs, temperature)


def given_task(source: Source) -> GivenTask:
    """Make the task of a source, and look whether its parts fit.

    Raises:
        InputError: If they do not.
    """
    found = source.open()
    is_classifier = _is_cross_entropy(found.loss)
    task = _GivenClassifier(source) if is_classifier else GivenTask(source)
    _refuse_misfits(task, found)
    return task


def given(
    model: nn.Module | Callable[[], nn.Module],
    batches: Batches,
    loss: Loss | None = None,
    metric: Loss | None = None,
    *,
    augment: Augment | None = None,
    search_size: int | None = None,
    trained: bool = True,
    seed: int = 0,
) -> Given:
    """Put a network and its examples together.

    Args:
        model: The network, or a function that builds it.
        batches: For ``"train"``, ``"test"`` and, where there is one, ``"search"``: a pair of inputs
            and targets, or batches of such pairs.
        loss: Takes outputs and targets, returns one value an example; None for cross-entropy, or a
            loss of torch's, whatever its reduction.
        metric: Takes outputs and targets, returns one score an example, higher is better; None for
            the accuracy of classes.
        augment: Takes a training batch's inputs and a generator.
        search_size: Training examples held out as the search split where none is given; None for
            one in ten.
        trained: Whether the network has seen the training split.
        seed: Draws the search split, and the weights of a network that is built.

    Raises:
        InputError: If something is not what it must be.
    """
    if not isinstance(model, nn.Module) and callable(model):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = called(model, {}, "model")
    network = checked_network(copy.deepcopy(model), "model")
    splits, drawn = gathered(batches, search_size, seed)
    parts = {
        f"{split}.{i}": leaf
        for split, rows in splits.items()
        for i, leaf in enumerate(tree_leaves(rows))
    }
    classes = {type(module) for module in network.modules()}
    texts = [str(network), *sorted(source_of(c) for c in classes if not _is_torch(c))]
    texts += [_text(function) for function in (loss, metric, augment)]
    texts += [state_sha256(network.state_dict()), state_sha256(parts), str(drawn and trained)]
    fingerprint = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
    return Given(network, splits, loss, metric, augment, drawn and trained, fingerprint)


def store(found: Given, folder: Path) -> Path:
    """Write a network and its examples into a folder of their own, for workers to read.

    Returns:
        The folder, ``folder/FINGERPRINT``: ``examples.pt``, tensors alone, and ``code.pkl``, the
        network and the functions, which is code of the user's and runs when it is read.
    """
    path = folder / found.fingerprint
    code = (found.model, found.loss, found.metric, found.augment, found.search_seen)
    buffer = io.BytesIO()
    torch.save(dict(found.splits), buffer)
    write_atomically(path / "code.pkl", packed(code, "model, loss and metric"))
    write_atomically(path / "examples.pt", buffer.getvalue())
    return path


def stored(folder: str) -> GivenTask:
    """Make the task that ``store`` left in a folder: a factory for ``task.factory``.

    Raises:
        InputError: If it is not there.
    """
    return given_task(Stored(folder))


@lru_cache(maxsize=2)
def _read(folder: str) -> Given:
    path = Path(folder)
    try:
        code = unpacked((path / "code.pkl").read_bytes())
        splits = torch.load(path / "examples.pt", mmap=True, weights_only=True)
    except OSError as error:
        raise InputError(
            f"task.arguments.folder: {folder} must hold what search.run left there "
            f"({error.strerror}): call search.run again"
        ) from error
    model, loss, metric, augment, search_seen = code
    return Given(model, splits, loss, metric, augment, search_seen, path.name)


@lru_cache(maxsize=2)
def _make(maker: bytes) -> Given:
    made: Given = unpacked(maker)()
    return made


def _refuse_misfits(task: GivenTask, found: Given) -> None:
    """Run two examples, and refuse a loss or a metric that does not take what comes of them."""
    model, batch = task.model(), task.batch("train", torch.arange(min(2, task.size("train"))))
    outputs = outputs_of(model, batch[0])
    is_tensor = isinstance(outputs, Tensor)
    kind = tuple(outputs.shape) if is_tensor else type(outputs).__name__
    if found.loss is None and not is_tensor:
        raise InputError(
            f"loss: must be given where outputs are no tensor, got outputs {kind}: a function of "
            "outputs and targets that returns one value an example"
        )
    if found.metric is None and not (is_tensor and outputs.ndim == 2):
        raise InputError(
            f"metric: must be given where outputs are no classes (N, C), got outputs {kind}: a "
            "function of outputs and targets that returns one value an example"
        )
    with torch.no_grad():
        for what, measure in (("loss", task.losses), ("metric", task.scores)):
            values = called(lambda m=measure: m(model, batch), {}, f"{what} of outputs {kind}")
            if not bool(torch.isfinite(values).all()):
                raise InputError(f"{what}: must be finite, got {values.tolist()}")


def _losses(loss: Loss | None, outputs: Any, targets: Any) -> Tensor:
    """Each example's loss, shape (N,)."""
    if loss is None or loss is F.cross_entropy:
        loss = nn.CrossEntropyLoss()
    num = len(next(leaf for leaf in tree_leaves(targets) if isinstance(leaf, Tensor)))
    if not isinstance(loss, nn.modules.loss._Loss):
        return _one_each(loss(outputs, targets), num, "loss")
    each = copy.deepcopy(loss)
    each.reduction = "none"
    if isinstance(outputs, Tensor):
        each = each.to(outputs.dtype)  # its own weights: some checks run in float64
    values: Tensor = each(outputs, targets)
    flat = values.reshape(len(values), -1)
    return flat.sum(1) if loss.reduction == "sum" else flat.mean(1)


def _is_cross_entropy(loss: Loss | None) -> bool:
    """Whether softmax's factor is the Hessian, whatever the targets are."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return loss.weight is None and loss.ignore_index < 0
    return loss is None or loss is F.cross_entropy


def _one_each(values: object, num: int, what: str) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != (num,):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"{what}: must be one value an example, shape ({num},), got {shape}; "
            "torch's functions give it with reduction='none'"
        )
    return values


def _text(function: object) -> str:
    """What a function does, a loss's own weights included."""
    if isinstance(function, nn.Module):
        return f"{source_of(type(function))} {function} {state_sha256(function.state_dict())}"
    return source_of(function)


def _is_torch(kind: type) -> bool:
    return inspect.getmodule(kind) is None or kind.__module__.partition(".")[0] == "torch"
