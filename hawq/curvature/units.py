"""Trace estimation cut into units of work that any worker may do, in any order.

A plan numbers its units: round after round over the batches, a few probes each. A unit is a pure
function of (task, weights, plan, index). A reducer takes finished units in any order, looks only
at complete rounds without gaps, and decides from those when the estimate is good enough. So the
result has the same bits for any number of workers and any accidents on the way, on the same kind
of machine, torch, number of threads a worker and micro-batch.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hawq.curvature.estimate import Population, TraceEstimate, UnitSums, summarize
from hawq.curvature.finite_difference import finite_difference_samples
from hawq.curvature.gauss_newton import gauss_newton_samples
from hawq.curvature.hutchinson import hutchinson_samples
from hawq.curvature.network import differentiable, refuse_nonfinite, weights_of
from hawq.curvature.per_example import Tape, WeightTape, per_example_traces
from hawq.curvature.probes import probe_seed, totals
from hawq.curvature.residual import residual_loss
from hawq.curvature.sites import (
    ActivationTape,
    Granularity,
    Site,
    Subject,
    channel_sums,
    group_names,
    group_sums,
)
from hawq.task import Batch, Factor, Objective, moved

__all__ = ["EstimatorName", "Reducer", "StopRule", "TracePlan", "estimate_traces", "run_unit"]

EstimatorName = Literal[
    "exact_gauss_newton",
    "mixed_gauss_newton",
    "gauss_newton",
    "corrected_gauss_newton",
    "hutchinson",
    "finite_difference",
    "fisher",
]
StopRule = Literal["error", "shares", "order", "count"]

# Those that see the examples one by one, and those of them without probes.
_BY_EXAMPLE = ("exact_gauss_newton", "mixed_gauss_newton", "fisher")
_EXACT = ("exact_gauss_newton", "fisher")
# A standard error from fewer degrees of freedom may be small by luck, and would stop the plan.
_MIN_FREEDOM = 10


@dataclass(frozen=True, slots=True)
class TracePlan:
    """What to estimate, on which examples, how, and when to stop.

    Attributes:
        layers: Names of the layers whose weights, or inputs, are traced.
        estimator: ``"exact_gauss_newton"`` and ``"fisher"`` (the empirical one) need no probes, and
            the numbers of them do not matter; ``"mixed_gauss_newton"``; ``"gauss_newton"``, by
            random signs; ``"corrected_gauss_newton"``, with Hutchinson's probes of what the Hessian
            has besides; ``"hutchinson"``; ``"finite_difference"``.
        split: Split of the task that the examples come from.
        examples: Indices into it.
        batch_size: Examples a unit.
        probes_per_unit: Probes a unit; they share one forward pass. At least 2.
        rtol: Stop when every group's probe error is at most ``rtol`` of its trace, judged from
            at least ten degrees of freedom (batches × (probes − 1)) …
        max_probes: … or when each example has seen this many probes.
        seed: Seed of all probes.
        sites: The tensors; empty for the layers' weights.
        subject: ``"weights"`` or ``"activations"``.
        granularity: ``"channel"`` also traces each channel of every site.
        weights: Of the examples, where they were drawn by importance; empty where all count alike.
        population: Where they were drawn from.
        floor: Directions of an example's loss whose energy, times its weight, is at most this are
            left out, by the estimators that see examples one by one.
        leading: Directions that ``"mixed_gauss_newton"`` takes one by one.
        atol: Added to the tolerance, as a share of Σ|trace|.
        stop: ``"error"`` as above; ``"shares"``: every share of Σ|trace| is known to ``rtol``;
            ``"order"``: the order of the average traces is beyond doubt; ``"count"``: never early.

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
    sites: tuple[Site, ...] = ()
    subject: Subject = "weights"
    granularity: Granularity = "layer"
    weights: tuple[float, ...] = ()
    population: Population | None = None
    floor: float = 0.0
    leading: int = 0
    atol: float = 0.0
    stop: StopRule = "error"

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != len(self.examples):
            raise ValueError(
                "weights must be one an example, "
                f"got {len(self.weights)} for {len(self.examples)} examples"
            )
        if self.weights and self.population is None:
            raise ValueError("weights must come with the population that they were drawn from")
        if not self.sites and (self.subject, self.granularity) != ("weights", "layer"):
            raise ValueError("sites must be given for activations, and for channels")
        if self.probes_per_unit < 2 or self.max_probes < self.probes_per_unit:
            raise ValueError(
                "probes_per_unit must be at least 2 and max_probes not less, "
                f"got {self.probes_per_unit} and {self.max_probes}"
            )
        least = 1 if self.sees_examples else 2
        if self.num_batches < least or len(self.examples) < 2:
            raise ValueError(
                f"examples must fill at least {least} batches, and be 2 at least, "
                f"got {len(self.examples)} examples and batches of {self.batch_size}"
            )

    @property
    def sees_examples(self) -> bool:
        """Whether the estimator finds each example's own traces."""
        return self.estimator in _BY_EXAMPLE

    @property
    def num_batches(self) -> int:
        """Batches that the examples make; the last may be smaller."""
        return -(-len(self.examples) // self.batch_size)

    @property
    def num_units(self) -> int:
        """Units if nothing stops early."""
        if self.estimator in _EXACT:
            return self.num_batches
        return self.num_batches * (self.max_probes // self.probes_per_unit)

    @property
    def names(self) -> tuple[str, ...]:
        """The groups' names: the sites, then all channels if they are asked for."""
        return group_names(self.sites, self.granularity) if self.sites else self.layers

    @property
    def num_sites(self) -> int:
        """Tensors traced; the first groups."""
        return len(self.sites) or len(self.layers)

    @property
    def elements(self) -> tuple[int, ...]:
        """Elements of each group, shape (G,); needs ``sites``."""
        sizes = [site.num_elements for site in self.sites]
        if self.granularity == "channel":
            for site in self.sites:
                sizes += [site.num_elements // site.num_channels] * site.num_channels
        return tuple(sizes)


def run_unit(
    task: Objective,
    model: nn.Module,
    plan: TracePlan,
    index: int,
    *,
    micro_batch: int | None = None,
) -> UnitSums:
    """Do one unit of a plan.

    Args:
        task: Builds the examples.
        model: The network, with the weights to be searched, on its device.
        plan: The plan.
        index: Which unit, from 0.
        micro_batch: Examples in memory at once; None for the whole unit. Bits depend on it.

    Raises:
        NonFiniteTraceError: If a loss is NaN or infinite.
    """
    visit, batch_index = divmod(index, plan.num_batches)
    first = batch_index * plan.batch_size
    examples = plan.examples[first : first + plan.batch_size]
    weights = plan.weights[first : first + plan.batch_size] or (1.0,) * len(examples)
    probes = range(visit * plan.probes_per_unit, (visit + 1) * plan.probes_per_unit)
    seeds = [probe_seed(plan.seed, batch_index, probe) for probe in probes]
    step = micro_batch or len(examples)
    parts, known = [], []
    for at in range(0, len(examples), step):
        one = _Part(
            task,
            model,
            plan,
            batch_index,
            torch.tensor(examples[at : at + step]),
            torch.tensor(weights[at : at + step], dtype=torch.float64),
            # Parts of a unit are other examples: they want other probes.
            [probe_seed(seed, 0, at) if at else seed for seed in seeds],
        )
        parts.append(one.traces() if plan.sees_examples else one.samples())
        if plan.estimator == "corrected_gauss_newton" and visit == 0:
            known.append(np.einsum("n,kng->g", one.weights.numpy(), one.traces()))
    if not plan.sees_examples:
        return UnitSums.of(
            batch_index,
            len(examples),
            np.sum(parts, 0),
            plan.num_sites,
            known=np.sum(known, 0) if known else None,
        )
    w = np.array(weights)
    pool = plan.population.pool if plan.population else len(plan.examples)
    inclusion = len(plan.examples) / (pool * w)
    return UnitSums.of_examples(
        batch_index,
        np.concatenate(parts, 1),
        plan.num_sites,
        weights=w,
        excluded=np.maximum(1 - inclusion, 0),
        num_probes=0 if plan.estimator in _EXACT else len(seeds),
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """Examples that are in memory together."""

    task: Objective
    model: nn.Module
    plan: TracePlan
    batch_index: int
    examples: Tensor
    weights: Tensor
    seeds: Sequence[int]

    def traces(self) -> NDArray[np.float64]:
        """Each example's traces, shape (K, N, G)."""
        plan = self.plan
        exact = plan.estimator != "mixed_gauss_newton"
        tape: Tape
        leaves = weights_of(self.model, plan.layers)
        if plan.subject == "weights":
            tape = WeightTape(self.model, plan.layers)
        else:
            tape, leaves = ActivationTape(self.model, plan.layers), []
        with differentiable(self.model, leaves):
            batch = self._batch()
            channels = per_example_traces(
                lambda: self._scores(batch) if plan.estimator == "fisher" else self._outputs(batch),
                tape,
                weights=self.weights.to(next(self.model.parameters()).device),
                floor=plan.floor,
                leading=None if exact else plan.leading,
                seeds=() if exact else self.seeds,
            )
        if isinstance(tape, ActivationTape):
            channels = self._scaled(channels, tape)
        traces: NDArray[np.float64] = group_sums(channels, plan.granularity).numpy()
        return traces

    def samples(self) -> NDArray[np.float64]:
        """The traces of all examples' summed loss, shape (K, G)."""
        plan, model = self.plan, self.model
        tape = ActivationTape(model, plan.layers) if plan.subject == "activations" else None
        leaves = [] if tape else weights_of(model, plan.layers)
        with differentiable(model, leaves):
            batch = self._batch()

            def losses() -> Tensor:
                each = self.task.losses(model, batch)
                refuse_nonfinite(each, "loss", self._where)
                return each

            def loss() -> Tensor:
                each = losses()
                return (each * self.weights.to(each)).sum()

            if plan.estimator == "finite_difference":
                return finite_difference_samples(
                    loss, leaves, self.seeds, reduce=self._reduction(tape)
                )
            with tape.recording() if tape else nullcontext():
                root = None
                if plan.estimator == "hutchinson":
                    root = loss()
                elif plan.estimator == "corrected_gauss_newton":
                    residual = residual_loss(losses, model, self.weights)
                    if residual is None:
                        raise ValueError(
                            "corrected_gauss_newton needs a network that returns one tensor, once"
                        )
                    root, _ = residual
                else:
                    outputs, factors = self._outputs(batch)
            inputs: Sequence[Tensor] | Sequence[GradientEdge] = tape.edges if tape else leaves
            reduce = self._reduction(tape)
            if root is not None:
                return hutchinson_samples(root, inputs, self.seeds, reduce=reduce)
            return gauss_newton_samples(
                outputs, factors, inputs, self.seeds, weights=self.weights, reduce=reduce
            )

    @property
    def _where(self) -> str:
        return f"batch {self.batch_index}"

    def _batch(self) -> Batch:
        device = next(self.model.parameters()).device
        return moved(self.task.batch(self.plan.split, self.examples), device)

    def _outputs(self, batch: Batch) -> tuple[Tensor, Sequence[Factor]]:
        curvature = self.task.curvature(self.model, batch)
        if curvature is None:
            raise ValueError(f"{self.plan.estimator} needs the task's curvature(), got None")
        refuse_nonfinite(curvature[0], "network's output", self._where)
        return curvature

    def _scores(self, batch: Batch) -> tuple[Tensor, Sequence[Factor]]:
        """The losses as outputs with the factor 1: traces of the empirical Fisher matrix."""
        losses = self.task.losses(self.model, batch)
        refuse_nonfinite(losses, "loss", self._where)
        return losses, [Factor(1, lambda s: s[:, 0], energies=torch.ones_like(losses)[:, None])]

    def _reduction(
        self, tape: ActivationTape | None
    ) -> Callable[[Sequence[Tensor | None]], Tensor]:
        plan = self.plan

        def reduce(parts: Sequence[Tensor | None]) -> Tensor:
            if tape is None:
                sites = plan.sites
                if not sites:
                    return totals(parts)
                channels = channel_sums(parts, sites, [0] * len(parts))
            else:
                own = [seen.site for seen in tape.seen]
                channels = channel_sums(tape.spread(parts), own, [s.axis for s in tape.seen])
                channels = self._scaled(channels, tape)
            return group_sums(channels, plan.granularity)

        return reduce

    def _scaled(self, channels: list[Tensor], tape: ActivationTape) -> list[Tensor]:
        """Let every example count with its average trace, times the site's nominal elements."""
        found = [(seen.site.name, seen.site.num_channels) for seen in tape.seen]
        expected = [(site.name, site.num_channels) for site in self.plan.sites]
        if found != expected:
            raise ValueError(
                f"the network must read the same activations for all examples, got {found} in "
                f"{self._where} instead of {expected}"
            )
        pairs = zip(channels, self.plan.sites, tape.seen, strict=True)
        return [
            values * (site.num_elements / seen.site.num_elements) for values, site, seen in pairs
        ]


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
            self.estimate = summarize(prefix, self.plan.names, self.plan.population)
            # Where examples are seen one by one, each of them has its own spread.
            seen = self.plan.sees_examples
            spreads = self.estimate.num_examples if seen else width
            freedom = spreads * (self.estimate.num_probes - (self._rounds if seen else 1))
            self.finished = self._rounds * width >= self.plan.num_units or (
                freedom >= _MIN_FREEDOM and _good_enough(self.plan, self.estimate)
            )

    @property
    def missing(self) -> Sequence[int]:
        """Units that are not there yet, in index order; empty when finished."""
        if self.finished:
            return []
        return [i for i in range(self.plan.num_units) if i not in self._units]


def _good_enough(plan: TracePlan, estimate: TraceEstimate) -> bool:
    if plan.stop == "count":
        return False
    if plan.stop == "order":
        return estimate.ordered(np.array(plan.elements))
    if plan.stop == "shares":
        return bool((estimate.share_probe_error <= plan.rtol).all())
    return bool(estimate.converged(plan.rtol, plan.atol).all())


def estimate_traces(task: Objective, model: nn.Module, plan: TracePlan) -> TraceEstimate:
    """Carry out a plan in this process; workers give the same bits."""
    reducer = Reducer(plan)
    for index in range(plan.num_units):
        reducer.add(index, run_unit(task, model, plan, index))
        if reducer.finished:
            break
    assert reducer.estimate is not None
    return reducer.estimate
