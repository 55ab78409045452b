"""Traces of any network in one call."""

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hawq.curvature import (
    EstimatorName,
    Granularity,
    StopRule,
    Subject,
    TraceEstimate,
    estimate_traces,
    plan_traces,
)
from hawq.curvature.network import refuse_nonfinite
from hawq.factors import factors_of, softmax_factor
from hawq.space import evaluating, quantizable_layers
from hawq.task import Batch, Factor, moved

__all__ = ["Traces", "traces"]

Loss = Callable[[Any, Any], Tensor]

# Of a batch's loss against those of its examples alone, in float32.
_AGREEMENT = 1e-4


@dataclass(frozen=True, slots=True)
class Traces:
    """Hessian traces of the mean loss, group by group, with their errors.

    Attributes:
        names: Of the groups: sites, then with ``granularity="channel"`` their channels.
        num_elements: Weights, or activations of one example, in each.
        estimate: Traces with probe error, data error, and the errors of their shares.
        estimator: How they were found.
        reason: Why so.
        seconds: How long it took.
    """

    names: tuple[str, ...]
    num_elements: tuple[int, ...]
    estimate: TraceEstimate
    estimator: EstimatorName
    reason: str
    seconds: float

    def __getitem__(self, name: str) -> tuple[float, float]:
        """Return a group's trace and its standard error, over probes and examples together."""
        i = self.names.index(name)
        return float(self.estimate.trace[i]), float(self.estimate.error[i])

    @property
    def average(self) -> NDArray[np.float64]:
        """Traces per element, shape (G,): HAWQ-V2's sensitivity."""
        mean: NDArray[np.float64] = self.estimate.trace / np.array(self.num_elements)
        return mean

    def to_json(self) -> dict[str, Any]:
        """Return plain data: how it was done, and one object a group."""
        e = self.estimate
        columns = zip(
            self.names,
            self.num_elements,
            e.trace.tolist(),
            e.probe_error.tolist(),
            e.data_error.tolist(),
            e.share_error.tolist(),
            strict=True,
        )
        keys = ("group", "n", "trace", "probe_error", "data_error", "share_error")
        return {
            "estimator": self.estimator,
            "reason": self.reason,
            "num_probes": e.num_probes,
            "num_examples": e.num_examples,
            "seconds": self.seconds,
            "num_negative": int((e.trace < 0).sum()),
            "groups": [dict(zip(keys, values, strict=True)) for values in columns],
        }

    def __str__(self) -> str:
        """A table of the sites."""
        width = max(map(len, self.names))
        e, total = self.estimate, self.estimate.trace.sum()
        lines = [f"{'':{width}}  average trace   share  ± probes   ± data"]
        for i, name in enumerate(self.names):
            size = abs(e.trace[i]) or 1.0
            lines.append(
                f"{name:{width}}  {self.average[i]:13.4e}  {e.trace[i] / total:6.1%}"
                f"  {e.probe_error[i] / size:8.1%} {e.data_error[i] / size:8.1%}"
            )
        return "\n".join(lines)


def traces(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss | None = None,
    *,
    layers: Sequence[str] | None = None,
    of: Subject = "weights",
    granularity: Granularity = "layer",
    estimator: EstimatorName | Literal["auto"] = "auto",
    num_examples: int = 512,
    pool: int | None = None,
    batch_size: int = 32,
    probes_per_unit: int = 4,
    rtol: float = 0.05,
    atol: float = 0.0,
    max_probes: int = 200,
    stop: StopRule = "error",
    seed: int = 0,
) -> Traces:
    """Estimate the Hessian traces of a network, on its own device.

    The network is looked at in eval mode (in train mode batch-norm couples the examples) and left
    as it was.

    Args:
        model: Any network with convolutions, linear layers or embeddings.
        batches: Pairs of inputs and targets, such as a DataLoader: as many are read as ``pool`` or
            ``num_examples`` need, once, and kept.
        loss: Takes outputs and targets; a mean or a sum over the examples, or one value an example.
            What is traced is the mean. None for cross-entropy.
        layers: Which layers; None for all that can be quantized.
        of: ``"weights"``, or ``"activations"``: the tensors that those layers read.
        granularity: ``"channel"`` also traces each channel.
        estimator: See ``hawq.curvature.plan_traces``, as for all that follow.
        num_examples: How many examples.
        pool: Draw them by importance from so many; None: the first ones.
        batch_size: Examples at a time; 1 where their shapes differ.
        probes_per_unit: Probes a forward pass.
        rtol: Relative probe error to stop at.
        atol: Added to it, as a share of Σ|trace|.
        max_probes: Probes an example at most.
        stop: What the tolerance is of.
        seed: Of the draw and of all probes.

    Raises:
        ValueError: If there is no example or no such layer, if examples depend on each other, or if
            the loss is no mean or sum over the examples.
        NonFiniteTraceError: If an output, a loss or a trace is NaN or infinite.

    Example:
        >>> found = hawq.traces(model, loader, torch.nn.CrossEntropyLoss())
        >>> trace, error = found["layer1.0.conv1"]
    """
    started = time.perf_counter()
    known = quantizable_layers(model)
    unknown = [name for name in layers or () if name not in known]
    if unknown or not known:
        raise ValueError(
            "layers must be convolutions, linear layers or embeddings of the network, got "
            f"{unknown or 'none'}"
            f"; known are {', '.join(list(known)[:5])}"
        )
    examples = _read(batches, max(num_examples, pool or 0))
    objective = _Objective(examples, nn.CrossEntropyLoss() if loss is None else loss)
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        objective.examine(model, device)
    plan, reason = plan_traces(
        objective,
        model,
        list(layers or known),
        subject=of,
        granularity=granularity,
        estimator=estimator,
        num_examples=num_examples,
        pool=pool,
        batch_size=batch_size if objective.stacks else 1,
        probes_per_unit=probes_per_unit,
        rtol=rtol,
        atol=atol,
        max_probes=max_probes,
        stop=stop,
        seed=seed,
    )
    assert plan.population is not None
    # These examples stand for more of their kind: the error is that of a sample.
    plan = replace(plan, population=replace(plan.population, size=None))
    estimate = estimate_traces(objective, model, plan)
    seconds = time.perf_counter() - started
    return Traces(plan.names, plan.elements, estimate, plan.estimator, reason, seconds)


def _read(batches: Iterable[tuple[Any, Any]], num: int) -> list[Batch]:
    """Take batches apart into examples, each still with a batch axis of 1."""
    examples: list[Batch] = []
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"batches must be pairs of inputs and targets, got {type(batch).__name__}"
            )
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
        sizes = {len(leaf) for leaf in tensors if leaf.ndim}
        if len(sizes) != 1:
            raise ValueError(
                "inputs and targets must be tensors with one example a row, "
                f"got {sorted(sizes)} rows"
            )
        for i in range(sizes.pop()):
            examples.append(_row(tuple(batch), i))
        if len(examples) >= num:
            break
    if len(examples) < 2:
        raise ValueError(f"batches must hold at least 2 examples, got {len(examples)}")
    return examples[:num]


def _row(batch: Batch, i: int) -> Batch:
    return tree_map_only(Tensor, lambda x: x[i : i + 1], batch)


@dataclass(slots=True)
class _Objective:
    """Examples in memory and a loss of them, as ``hawq.task.Objective``."""

    examples: list[Batch]
    loss: Loss
    stacks: bool = field(init=False)

    def __post_init__(self) -> None:
        shapes = {
            tuple(x.shape for x in tree_leaves(e) if isinstance(x, Tensor)) for e in self.examples
        }
        self.stacks = len(shapes) == 1

    def size(self, _split: str) -> int:
        return len(self.examples)

    def batch(self, _split: str, indices: Tensor) -> Batch:
        chosen = [self.examples[i] for i in indices.tolist()]
        leaves = [torch.utils._pytree.tree_flatten(example) for example in chosen]
        columns = zip(*(values for values, _ in leaves), strict=True)
        stacked = [torch.cat(c) if isinstance(c[0], Tensor) else c[0] for c in columns]
        return torch.utils._pytree.tree_unflatten(stacked, leaves[0][1])

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return self._each(model(inputs), targets)

    def curvature(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Sequence[Factor]] | None:
        inputs, targets = batch
        outputs = model(inputs)
        if not isinstance(outputs, Tensor):
            return None
        if self._is_softmax(outputs):
            return outputs, [softmax_factor(outputs)]
        with torch.enable_grad():
            factors = factors_of(lambda o: self._each(o, targets), outputs.detach())
        return None if factors is None else (outputs, factors)

    def examine(self, model: nn.Module, device: torch.device) -> None:
        """Refuse examples that depend on each other, and a loss that is no mean or sum."""
        num = min(8, len(self.examples))
        single = [moved(self.batch("", torch.tensor([i])), device) for i in range(num)]
        outputs = [model(inputs) for inputs, _ in single]
        alone = torch.stack([self._one(o, t) for o, (_, t) in zip(outputs, single, strict=True)])
        refuse_nonfinite(alone, "loss")
        if not self.stacks:
            return
        inputs, targets = moved(self.batch("", torch.arange(num)), device)
        together = model(inputs)
        if isinstance(together, Tensor) and not torch.allclose(
            together, torch.cat(outputs), rtol=_AGREEMENT, atol=_AGREEMENT
        ):
            raise ValueError(
                "an example's outputs must not depend on the others of its batch in eval mode, got "
                "others alone: give batch-norm running statistics"
            )
        value = self.loss(together, targets)
        expected = {(): (alone.mean(), alone.sum()), (num,): (alone,)}.get(tuple(value.shape), ())
        if not any(
            torch.allclose(value, e.to(value), rtol=_AGREEMENT, atol=1e-6) for e in expected
        ):
            raise ValueError(
                "the loss must be a mean or a sum over the examples, or one value an example, got "
                f"{value.tolist()} for examples whose own are {alone.tolist()}"
            )

    def _each(self, outputs: Any, targets: Any) -> Tensor:
        """Each example's loss, shape (N,)."""
        if self._is_softmax(outputs):
            return nn.functional.cross_entropy(outputs, targets, reduction="none")
        rows = range(len(next(x for x in tree_leaves(targets) if isinstance(x, Tensor))))
        return torch.stack([self._one(_row(outputs, i), _row(targets, i)) for i in rows])

    def _is_softmax(self, outputs: Any) -> bool:
        """Whether it is the cross-entropy of one class an example, which has a formula."""
        loss = self.loss
        return (
            isinstance(loss, nn.CrossEntropyLoss)
            and loss.weight is None
            and loss.label_smoothing == 0
            and isinstance(outputs, Tensor)
            and outputs.ndim == 2
        )

    def _in_type_of(self, outputs: Any) -> Loss:
        """The loss with its own weights as precise as the outputs: some checks run in float64."""
        if not isinstance(self.loss, nn.Module) or not isinstance(outputs, Tensor):
            return self.loss
        if all(buffer.dtype == outputs.dtype for buffer in self.loss.buffers()):
            return self.loss
        return copy.deepcopy(self.loss).to(outputs.dtype)

    def _one(self, outputs: Any, targets: Any) -> Tensor:
        value = self._in_type_of(outputs)(outputs, targets)
        if value.numel() != 1:
            raise ValueError(
                f"the loss must be one number for one example, got shape {tuple(value.shape)}"
            )
        return value.reshape(())
