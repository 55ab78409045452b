"""Does a task keep the contract of ``hawq.task.Task``? A check for tasks that users write.

    from hawq.testing import check_task

    def test_my_task_keeps_the_contract():
        check_task(MyTask(...))

It builds the network and looks at a few examples of every split; it does not train. What it
cannot see: whether the constructor is cheap, and whether the splits share examples.
"""

import copy
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.hooks import RemovableHandle

from hawq.space import evaluating
from hawq.task import Batch, Factor, Objective, Task, pooled_scores

__all__ = ["TaskContractError", "check_task"]

_SPLITS = ("train", "search", "test")
_NUM_EXAMPLES = 4
_NUM_DIRECTIONS = 3
# Far above float32 sums in another order, far below one example's influence on another.
_RTOL, _ATOL = 1e-3, 1e-4
# Of the differences of gradients, in float64.
_STEP, _CURVATURE_ATOL = 1e-4, 1e-6


class TaskContractError(ValueError):
    """A task breaks the contract; the message says what must hold and what was got."""


def check_task(task: Task) -> None:
    """Check that a task keeps the contract of ``hawq.task.Task``.

    Raises:
        TaskContractError: At the first rule that is broken.
    """
    with _running("the task's description"):
        _check_description(task)
    for split in _SPLITS:
        with _running(f"size, batch and inputs of split {split!r}"):
            _check_batches(task, split)
    with _running("augment"):
        _check_augmentation(task)
    with _running("model()"):
        model = _checked_model(task)
    with evaluating(model):
        _check_forward(task, model)
        for split in _SPLITS:
            with _running(f"losses and scores of split {split!r}"):
                _check_per_example(task, model, split)
        with _running("curvature"):
            _check_curvature(task, model)


@contextmanager
def _running(what: str) -> Iterator[None]:
    """Say which part of a task it is that fails."""
    try:
        yield
    except TaskContractError:
        raise
    except Exception as error:  # it is the user's: anything may happen in it
        raise TaskContractError(f"{what} must not fail, got {_line(error)}") from error


def _check_description(task: Task) -> None:
    missing = [name for name in _members() if not hasattr(task, name)]
    _require(not missing, f"a task must have every member of hawq.task.Task, got no {missing}")
    try:
        twin = pickle.loads(pickle.dumps(task))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TaskContractError(f"a task must be picklable, got {error}") from error
    _require(
        isinstance(task.fingerprint, str) and bool(task.fingerprint),
        f"fingerprint must be a string that is not empty, got {task.fingerprint!r}",
    )
    _require(
        twin.fingerprint == task.fingerprint,
        "a pickled task must rebuild to the same fingerprint, "
        f"got {task.fingerprint} and {twin.fingerprint}",
    )
    _require(
        isinstance(task.score_name, str) and isinstance(task.search_seen, bool),
        "score_name must be a string and search_seen a bool, "
        f"got {task.score_name!r} and {task.search_seen!r}",
    )


def _check_batches(task: Task, split: str) -> None:
    """Batches are a function of the indices: deterministic, and in any order."""
    size = task.size(split)
    _require(
        isinstance(size, int) and size > 0, f"split {split!r} must hold examples, got size {size!r}"
    )
    indices = _some_indices(task, split)
    batch = task.batch(split, indices)
    _require(
        _equal(batch, task.batch(split, indices)),
        f"batch({split!r}, …) must return the same examples for the same indices, "
        "got others the second time",
    )
    inputs = task.inputs(batch)
    _require(
        isinstance(inputs, Tensor) and len(inputs) == len(indices),
        f"inputs must be a tensor of {len(indices)} examples, got {_shape(inputs)}",
    )
    reordered = task.batch(split, indices.flip(0))
    single = [task.batch(split, i[None]) for i in indices.flip(0)]
    _require(
        _stacks(single, reordered),
        f"batch({split!r}, [i, j]) must hold the examples of [i] and of [j] in that order, "
        "got other values",
    )


def _check_augmentation(task: Task) -> None:
    batch = task.batch("train", _some_indices(task, "train"))
    results = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            results.append(task.augment(copy.deepcopy(batch), torch.Generator().manual_seed(0)))
    _require(
        _equal(*results),
        "augment must draw from its generator alone, got two batches from one generator",
    )
    before, after = _shape(task.inputs(batch)), _shape(task.inputs(results[0]))
    _require(before == after, f"augment must keep the inputs' shape, {before}, got {after}")


def _checked_model(task: Task) -> nn.Module:
    models = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            models.append(task.model())
    _require(
        all(isinstance(model, nn.Module) for model in models),
        f"model() must return an nn.Module, got {type(models[0]).__name__}",
    )
    first, second = (model.state_dict() for model in models)
    _require(
        _equal(dict(first), dict(second)),
        "model() must build the same weights each time, got two different networks",
    )
    for name, value in first.items():
        _require(
            value.device.type == "cpu"
            and value.dtype not in {torch.float16, torch.bfloat16}
            and value.dtype != torch.float64,
            f"model() must be float32 on the CPU, got {name} in {value.dtype} on {value.device}",
        )
    return models[0]


def _check_forward(task: Task, model: nn.Module) -> None:
    """Who reads what is seen by calling the network with what ``inputs`` returns, and no more."""
    inputs = task.inputs(task.batch("train", _some_indices(task, "train")))
    try:
        with torch.no_grad():
            model(inputs)
    except (TypeError, RuntimeError) as error:
        raise TaskContractError(
            f"the network must take what inputs returns, one tensor, got {_line(error)}"
        ) from error


def _check_per_example(task: Task, model: nn.Module, split: str) -> None:
    indices = _some_indices(task, split)
    batch = task.batch(split, indices)
    losses = task.losses(model, batch)
    scores = task.scores(model, batch)
    if isinstance(scores, Tensor) and len(scores.shape) > 1:
        scores = pooled_scores(task, [scores])
    for what, values in (("losses", losses), ("scores", scores)):
        _require(
            isinstance(values, Tensor) and values.shape == indices.shape,
            f"{what} must have shape {tuple(indices.shape)}, got {_shape(values)}",
        )
        _require(
            bool(torch.isfinite(values).all()),
            f"{what} must be finite, got {values.tolist()} on split {split!r}",
        )
    _require(losses.requires_grad, "losses must be differentiable, got a tensor without gradients")
    alone = torch.cat([task.losses(model, task.batch(split, i[None])) for i in indices])
    _require(
        torch.allclose(losses, alone, rtol=_RTOL, atol=_ATOL),
        "an example's loss must not depend on the others of its batch (in eval mode), "
        f"got {losses.tolist()} together and {alone.tolist()} alone",
    )


def _check_curvature(task: Task, model: nn.Module) -> None:
    """Compare Σ sign·B Bᵀ z with differences of the loss's gradient in the outputs, in float64."""
    twin = copy.deepcopy(model).double()
    batch = task.batch("train", _some_indices(task, "train"))
    batch = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, batch)
    curvature = task.curvature(twin, batch)
    if curvature is None:
        return
    _require(
        isinstance(curvature, tuple) and len(curvature) == 2,
        f"curvature must return outputs and factors, or None, got {_shape(curvature)}",
    )
    outputs, factors = curvature
    outputs = outputs.detach()
    num_examples = len(task.inputs(batch))
    _require(
        len(outputs) == num_examples,
        f"curvature's outputs must hold {num_examples} examples, got shape {_shape(outputs)}",
    )
    _require(
        bool(factors) and all(factor.sign in {-1, 1} and factor.rank > 0 for factor in factors),
        f"curvature must give factors of sign +1 or −1 and positive rank, got {list(factors)}",
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(_NUM_DIRECTIONS):
        z = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        above, below = (_output_gradient(task, twin, batch, sign * _STEP * z) for sign in (1, -1))
        if above is None or below is None:
            return  # the outputs are not what the network returns: nothing to compare with
        expected = (above - below) / (2 * _STEP)
        got = _factor_product(factors, z)
        error = float((got - expected).abs().max())
        _require(
            torch.allclose(got, expected, rtol=_RTOL, atol=_CURVATURE_ATOL),
            "Σ sign·B Bᵀ must equal the Hessian of each example's loss in the outputs, "
            f"got products that differ by {error:.3g} where they reach {expected.abs().max():.3g}",
        )


def _factor_product(factors: Sequence[Factor], z: Tensor) -> Tensor:
    """Return Σ sign·B Bᵀ z, shape of ``z``."""
    product = torch.zeros_like(z)
    for factor in factors:
        s = z.new_zeros(len(z), factor.rank, requires_grad=True)
        image = factor.apply(s)
        _require(
            image.shape == z.shape,
            f"a factor must map (N, R) to the outputs' shape {_shape(z)}, got {_shape(image)}",
        )
        (pullback,) = torch.autograd.grad(image, s, z)  # Bᵀ z
        product += factor.sign * factor.apply(pullback).detach()
    return product


def _output_gradient(task: Task, model: nn.Module, batch: Batch, shift: Tensor) -> Tensor | None:
    """Return the losses' gradient in the network's outputs, shifted; None if it returns others."""
    shifted: list[Tensor] = []

    def move(_: nn.Module, __: object, output: object) -> Tensor | None:
        if not isinstance(output, Tensor) or output.shape != shift.shape:
            return None
        shifted.append((output.detach() + shift).requires_grad_())
        return shifted[-1]

    handle: RemovableHandle = model.register_forward_hook(move)
    try:
        loss = task.losses(model, batch).sum()
    finally:
        handle.remove()
    return torch.autograd.grad(loss, shifted[0])[0] if len(shifted) == 1 else None


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise TaskContractError(rule)


def _members() -> list[str]:
    public = {*vars(Objective), *vars(Task)}
    return sorted(name for name in public if not name.startswith("_"))


def _some_indices(task: Task, split: str) -> Tensor:
    """Return a few indices, spread over the split."""
    size = task.size(split)
    return torch.linspace(0, size - 1, min(_NUM_EXAMPLES, size)).long()


def _equal(a: Batch, b: Batch) -> bool:
    (left, left_form), (right, right_form) = tree_flatten(a), tree_flatten(b)
    return left_form == right_form and all(
        torch.equal(x, y) for x, y in zip(left, right, strict=True) if isinstance(x, Tensor)
    )


def _stacks(single: Sequence[Batch], whole: Batch) -> bool:
    """Whether tensors of a batch are those of its examples, one behind the other.

    Only of tensors that stack: pictures of several sizes may be padded or listed.
    """
    parts = [tree_flatten(batch) for batch in single]
    leaves, form = tree_flatten(whole)
    if any(part_form != form for _, part_form in parts):
        return True
    for leaf, *pieces in zip(leaves, *(part for part, _ in parts), strict=True):
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            continue
        if any(piece.shape[1:] != leaf.shape[1:] for piece in pieces):
            continue
        stacked = torch.cat(pieces)
        if stacked.shape == leaf.shape and not torch.equal(stacked, leaf):
            return False
    return True


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
