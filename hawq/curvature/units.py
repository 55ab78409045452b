"""One unit of a trace estimation: some examples and a few probes.

A plan numbers its units: round after round over the batches, a few probes each. A unit is a pure
function of (task, weights, plan, index), so any worker may do it, again if need be.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from hawq.channels import channels_first, transposed_groups
from hawq.curvature.estimate import UnitSums
from hawq.curvature.finite_difference import finite_difference_samples
from hawq.curvature.gauss_newton import gauss_newton_samples
from hawq.curvature.hutchinson import hutchinson_samples
from hawq.curvature.network import differentiable, refuse_nonfinite, weights_of
from hawq.curvature.per_example import Tape, WeightTape, per_example_traces
from hawq.curvature.plan import TracePlan
from hawq.curvature.probes import probe_seed, totals
from hawq.curvature.residual import residual_loss
from hawq.curvature.sites import ActivationTape, channel_sums, group_sums
from hawq.task import Batch, Factor, Objective, moved

__all__ = ["run_unit"]


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
        num_probes=0 if plan.is_exact else len(seeds),
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
            tape, leaves = ActivationTape(self.model, plan.layers, len(self.examples)), []
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
        tape = None
        if plan.subject == "activations":
            tape = ActivationTape(model, plan.layers, len(self.examples))
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
                layers = [self.model.get_submodule(name) for name in plan.layers]
                rows = [
                    None if part is None else channels_first(part, transposed_groups(layer))
                    for part, layer in zip(parts, layers, strict=True)
                ]
                channels = channel_sums(rows, sites, [0] * len(rows))
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
