"""Trace estimation cut into units of work that any worker may do, in any order.

A plan numbers its units: round after round over the batches, a few probes each. A unit is a pure
function of (task, weights, plan, index). A reducer takes finished units in any order, looks only
at complete rounds without gaps, and decides from those when the estimate is good enough. So the
result has the same bits for any number of workers and any accidents on the way, on the same kind
of machine, torch and number of threads a worker.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hawq.curvature.choice import EstimatorName
from hawq.curvature.estimate import TraceEstimate, UnitSums, summarize
from hawq.curvature.exact import exact_gauss_newton
from hawq.curvature.gauss_newton import gauss_newton_samples
from hawq.curvature.hutchinson import hutchinson_samples
from hawq.curvature.network import differentiable, refuse_nonfinite, weights_of
from hawq.curvature.probes import probe_seed
from hawq.task import Factor, Task, moved

__all__ = ["Reducer", "TracePlan", "estimate_traces", "run_unit"]

# A standard error from fewer degrees of freedom may be small by luck, and would stop the plan.
_MIN_FREEDOM = 10


@dataclass(frozen=True, slots=True)
class TracePlan:
    """What to estimate, on which examples, how, and when to stop.

    Attributes:
        layers: Names of the layers whose weights are traced.
        estimator: ``"exact_gauss_newton"`` needs no probes, and the numbers of them do not matter;
            ``"gauss_newton"``; ``"hutchinson"``.
        split: Split of the task that the examples come from.
        examples: Indices into it.
        batch_size: Examples a unit.
        probes_per_unit: Probes a unit; they share one forward pass. At least 2.
        rtol: Stop when every layer's probe error is at most ``rtol`` of its trace, judged from
            at least ten degrees of freedom (batches × (probes − 1)) …
        max_probes: … or when each example has seen this many probes.
        seed: Seed of all probes.
        weights: Of the examples, where they were drawn by importance; empty where all count alike.
            Only the exact estimator takes them.
        pool_variance: Of the pool that they were drawn from; see ``summarize``.

    Raises:
        ValueError: If a number is too small for an error to be estimated.
    """

    layers: tuple[str, ...]
    estimator: EstimatorName
    split: str
    examples: tuple[int, ...]
    batch_size: int
    probes_per_unit: int
    rtol: float
    max_probes: int
    seed: int
    weights: tuple[float, ...] = ()
    pool_variance: float = 0.0

    def __post_init__(self) -> None:
        if self.weights and (
            len(self.weights) != len(self.examples) or self.estimator != "exact_gauss_newton"
        ):
            raise ValueError(
                "weights must be one an example, for the exact estimator, "
                f"got {len(self.weights)} for {len(self.examples)} and {self.estimator}"
            )
        if self.probes_per_unit < 2 or self.max_probes < self.probes_per_unit:
            raise ValueError(
                "probes_per_unit must be at least 2 and max_probes not less, "
                f"got {self.probes_per_unit} and {self.max_probes}"
            )
        if self.num_batches < 2:
            raise ValueError(
                "examples must fill at least 2 batches, "
                f"got {len(self.examples)} examples and batches of {self.batch_size}"
            )

    @property
    def num_batches(self) -> int:
        """Batches that the examples make; the last may be smaller."""
        return -(-len(self.examples) // self.batch_size)

    @property
    def num_units(self) -> int:
        """Units if nothing stops early."""
        if self.estimator == "exact_gauss_newton":
            return self.num_batches
        return self.num_batches * (self.max_probes // self.probes_per_unit)


def run_unit(task: Task, model: nn.Module, plan: TracePlan, index: int) -> UnitSums:
    """Do one unit of a plan.

    Args:
        task: Builds the examples.
        model: The network, with the weights to be searched, on its device.
        plan: The plan.
        index: Which unit, from 0.

    Raises:
        NonFiniteTraceError: If a loss is NaN or infinite.
    """
    visit, batch_index = divmod(index, plan.num_batches)
    first = batch_index * plan.batch_size
    examples = torch.tensor(plan.examples[first : first + plan.batch_size])
    device = next(model.parameters()).device
    batch = moved(task.batch(plan.split, examples), device)
    probes = range(visit * plan.probes_per_unit, (visit + 1) * plan.probes_per_unit)
    seeds = [probe_seed(plan.seed, batch_index, probe) for probe in probes]
    weights = weights_of(model, plan.layers)

    def forward() -> tuple[Tensor, Sequence[Factor]]:
        curvature = task.curvature(model, batch)
        if curvature is None:
            raise ValueError(f"{plan.estimator} needs the task's curvature(), got None")
        refuse_nonfinite(curvature[0], "network's output", f"batch {batch_index}")
        return curvature

    with differentiable(model, weights):
        if plan.estimator == "exact_gauss_newton":
            layers = {name: model.get_submodule(name) for name in plan.layers}
            channels = exact_gauss_newton(forward, layers)
            traces = torch.stack([rows.sum(1) for rows in channels], 1)
            weights_here = plan.weights[first : first + plan.batch_size] or (1.0,) * len(traces)
            return UnitSums.exact(batch_index, traces.numpy(), np.array(weights_here))
        if plan.estimator == "gauss_newton":
            samples = gauss_newton_samples(*forward(), weights, seeds)
        else:
            loss = task.losses(model, batch).sum()
            refuse_nonfinite(loss, "loss", f"batch {batch_index}")
            samples = hutchinson_samples(loss, weights, seeds)
    return UnitSums.of(batch_index, len(examples), samples)


class Reducer:
    """Collect units in any order; estimate from complete rounds only, in index order.

    Attributes:
        plan: The plan whose units are collected.
        estimate: From all complete rounds so far; None before the first.
        finished: Whether the plan's error or its last probe is reached; later units are ignored.
    """

    def __init__(self, plan: TracePlan) -> None:
        self.plan = plan
        self.estimate: TraceEstimate | None = None
        self.finished = False
        self._units: dict[int, UnitSums] = {}
        self._rounds = 0

    def add(self, index: int, unit: UnitSums) -> None:
        """Take one finished unit."""
        if self.finished:
            return
        self._units[index] = unit
        width = self.plan.num_batches
        while not self.finished and all(
            i in self._units for i in range(self._rounds * width, (self._rounds + 1) * width)
        ):
            self._rounds += 1
            prefix = [self._units[i] for i in range(self._rounds * width)]
            self.estimate = summarize(prefix, self.plan.layers, self.plan.pool_variance)
            freedom = width * (self.estimate.num_probes - 1)
            self.finished = self._rounds * width >= self.plan.num_units or (
                freedom >= _MIN_FREEDOM and bool(self.estimate.converged(self.plan.rtol).all())
            )

    @property
    def missing(self) -> Sequence[int]:
        """Units that are not there yet, in index order; empty when finished."""
        if self.finished:
            return []
        return [i for i in range(self.plan.num_units) if i not in self._units]


def estimate_traces(task: Task, model: nn.Module, plan: TracePlan) -> TraceEstimate:
    """Carry out a plan in this process; workers give the same bits."""
    reducer = Reducer(plan)
    for index in range(plan.num_units):
        reducer.add(index, run_unit(task, model, plan, index))
        if reducer.finished:
            break
    assert reducer.estimate is not None
    return reducer.estimate
