"""From what is asked for to a plan: which estimator, on which examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from hawq.curvature.choice import Choice, choose_estimator, choose_passes, not_taken_apart
from hawq.curvature.estimate import Population
from hawq.curvature.finite_difference import missing_second_derivative
from hawq.curvature.importance import draw_examples, output_curvature
from hawq.curvature.network import differentiable, weights_of
from hawq.curvature.plan import EstimatorName, StopRule, TracePlan
from hawq.curvature.sites import Granularity, Subject, activation_sites, weight_sites
from hawq.space import evaluating
from hawq.task import Batch, Objective, moved

__all__ = ["DrawnExamples", "Look", "drawn_examples", "look_here", "plan_traces"]

# From indices into a split to the curvature of those examples' outputs, shape (N,).
Look = Callable[[Sequence[int]], Tensor]

_FEW, _SOME = 2, 64
# Estimators that find each example's own weight gradients.
_APART = {"exact_gauss_newton", "mixed_gauss_newton", "corrected_gauss_newton", "fisher"}
# Share of the outputs' curvature that may be left out, at the very most: a hundredth of what a
# trace is ever asked to be known to.
_NEGLIGIBLE = 1e-4


def plan_traces(
    task: Objective,
    model: nn.Module,
    layers: Sequence[str],
    *,
    look: Look | None = None,
    subject: Subject = "weights",
    granularity: Granularity = "layer",
    estimator: EstimatorName | Literal["auto"] = "auto",
    split: str = "train",
    num_examples: int = 512,
    pool: int | None = 16384,
    batch_size: int = 32,
    probes_per_unit: int = 4,
    rtol: float = 0.05,
    atol: float = 0.0,
    max_probes: int = 200,
    stop: StopRule = "error",
    seed: int = 0,
) -> tuple[TracePlan, str]:
    """Make a plan for an estimation.

    Args:
        task: The network, its data and its loss.
        model: The network, with the weights to be traced, on its device.
        layers: Names of the layers whose weights, or inputs, are traced.
        look: Tells the curvature of examples' outputs; None looks here and now.
        subject: Weights or activations.
        granularity: Whether each channel is traced, too.
        estimator: ``"auto"``: Gauss–Newton where it is the Hessian, else Hutchinson;
            ``"gauss_newton"``: Gauss–Newton in the cheapest way; or any other by name.
        split: Where the examples come from.
        num_examples: How many; all of the split where it has no more.
        pool: Draw them by importance from so many; None: uniformly.
        batch_size: Examples a unit; 1 where the network runs example by example anyway, as a
            detector of two stages does.
        probes_per_unit: Probes a unit.
        rtol: Relative probe error to stop at.
        atol: Added to it, as a share of Σ|trace|.
        max_probes: Probes an example at most.
        stop: What the tolerance is of.
        seed: Of the draw and of all probes.

    Returns:
        The plan, and the reason for its estimator.

    Raises:
        ValueError: If the estimator needs what the task does not give.
        NonFiniteTraceError: If an output is NaN or infinite.
    """
    if estimator == "finite_difference" and subject == "activations":
        raise ValueError("finite_difference is for weights, got subject 'activations'")
    device = next(model.parameters()).device
    few = moved(task.batch(split, torch.arange(min(_FEW, batch_size, task.size(split)))), device)
    one = moved(task.batch(split, torch.arange(1)), device)
    sites = (
        weight_sites(model, layers)
        if subject == "weights"
        else activation_sites(model, layers, lambda: task.losses(model, one))
    )
    if batch_size > 1 and _runs_by_example(task, model, layers, one, few):
        batch_size = 1  # each pass of several examples would hold several passes
    rank = _rank(task, model, few)
    if not rank and estimator.endswith("gauss_newton"):
        raise ValueError(
            f"{estimator} needs a task that gives the factors of its loss's Hessian, got none: "
            "use auto or hutchinson"
        )
    if estimator == "auto":
        choice = choose_estimator(task, model, layers, few, subject=subject)
    else:
        choice = Choice(estimator, "asked for")
    if subject == "weights":
        choice = _apart(task, model, layers, one, choice, forced=estimator != "auto")
    elif choice.estimator == "finite_difference":
        raise ValueError(
            "traces of activations need a second derivative or the task's curvature(), got "
            f"neither: {choice.reason}"
        )
    if choice.estimator in {"hutchinson", "corrected_gauss_newton"} and estimator != "auto":
        _refuse_missing_derivative(task, model, layers, few)
    drawn = drawn_examples(
        task.size(split),
        (look or look_here(task, model, split, batch_size))
        if rank and choice.estimator != "fisher"
        else None,
        num_examples,
        pool,
        seed,
    )
    floor = 0.0
    if choice.estimator.endswith("gauss_newton"):
        floor = _NEGLIGIBLE * drawn.total / (len(drawn.examples) * rank)
        if choice.estimator == "gauss_newton":
            some = drawn.by_curvature().every(max(1, len(drawn.examples) // _SOME))
            with evaluating(model):
                passes = choose_passes(
                    task,
                    model,
                    layers,
                    [
                        moved(task.batch(split, part), device)
                        for part in torch.tensor(some.examples).split(batch_size)
                    ],
                    one=moved(task.batch(split, torch.tensor(some.examples[:1])), device),
                    subject=subject,
                    weights=torch.tensor(some.weights, dtype=torch.float64),
                    floor=floor,
                    num_examples=len(drawn.examples),
                    rtol=rtol,
                )
            choice = replace(passes, reason=f"{choice.reason}; {passes.reason}")
    if choice.estimator in {"exact_gauss_newton", "mixed_gauss_newton"}:
        # Examples alike in a batch: a direction that one of them lacks most of them lack.
        drawn = drawn.by_curvature()
    if choice.estimator == "mixed_gauss_newton" and estimator != "mixed_gauss_newton":
        probes_per_unit = choice.probes
    plan = TracePlan(
        layers=tuple(layers),
        estimator=choice.estimator,
        split=split,
        examples=tuple(drawn.examples),
        # Two at least, for errors.
        batch_size=min(batch_size, max(1, len(drawn.examples) // 2)),
        probes_per_unit=probes_per_unit,
        rtol=rtol,
        max_probes=max(max_probes, probes_per_unit),
        seed=seed,
        sites=sites,
        subject=subject,
        granularity=granularity,
        weights=tuple(drawn.weights),
        population=drawn.population,
        floor=floor,
        leading=choice.leading,
        atol=atol,
        stop=stop,
    )
    return plan, choice.reason


def look_here(task: Objective, model: nn.Module, split: str, batch_size: int) -> Look:
    """Look at examples in this process."""

    def look(examples: Sequence[int]) -> Tensor:
        device = next(model.parameters()).device
        with evaluating(model):
            return torch.cat(
                [
                    output_curvature(task, model, moved(task.batch(split, part), device))
                    for part in torch.tensor(examples).split(batch_size)
                ]
            )

    return look


def _apart(
    task: Objective,
    model: nn.Module,
    layers: Sequence[str],
    one: Batch,
    choice: Choice,
    *,
    forced: bool,
) -> Choice:
    """Refuse, or replace, an estimator whose layers cannot be taken apart by example."""
    odd = not_taken_apart(task, model, layers, one) if choice.estimator in _APART else ""
    if odd and forced:
        raise ValueError(
            f"{choice.estimator} needs layers whose gradients can be taken apart by example, got "
            f"{odd}: use auto or gauss_newton"
        )
    if odd:
        reason = f"{choice.reason}; {odd} cannot be taken apart by example"
        return Choice("hutchinson", reason)
    return choice


def _refuse_missing_derivative(
    task: Objective, model: nn.Module, layers: Sequence[str], batch: Batch
) -> None:
    """Refuse what autograd would take for a second derivative of zero."""
    weights = weights_of(model, layers)
    with differentiable(model, weights):
        missing = missing_second_derivative(task.losses(model, batch).sum(), weights)
    if missing:
        raise ValueError(
            f"a Hessian-vector product needs second derivatives, got none: {missing}; use auto, "
            "gauss_newton or finite_difference"
        )


def _runs_by_example(
    task: Objective, model: nn.Module, layers: Sequence[str], one: Batch, few: Batch
) -> bool:
    """Whether layers run more often for a few examples than for one."""

    def calls(batch: Batch) -> int:
        count = 0

        def seen(_: nn.Module, __: object) -> None:
            nonlocal count
            count += 1

        handles = [model.get_submodule(n).register_forward_pre_hook(seen) for n in layers]
        try:
            with evaluating(model), torch.no_grad():
                task.losses(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return count

    return calls(few) > calls(one)


def _rank(task: Objective, model: nn.Module, batch: Batch) -> int:
    """Count the columns of all factors; 0 where the task gives none."""
    with evaluating(model), torch.no_grad():
        curvature = task.curvature(model, batch)
    return 0 if curvature is None else sum(factor.rank for factor in curvature[1])


@dataclass(frozen=True, slots=True)
class DrawnExamples:
    """Examples of a split.

    Attributes:
        examples: Indices.
        weights: What each counts for.
        curvature: Of their outputs, shape (N,); zeros where nobody looked.
        population: Where they come from.
    """

    examples: list[int]
    weights: list[float]
    curvature: Tensor
    population: Population

    @property
    def total(self) -> float:
        """Curvature of all outputs together."""
        return float((torch.tensor(self.weights, dtype=torch.float64) * self.curvature).sum())

    def by_curvature(self) -> "DrawnExamples":
        """Sort them, the largest curvature first."""
        return self._take(self.curvature.argsort(descending=True, stable=True).tolist())

    def every(self, step: int) -> "DrawnExamples":
        """Take one of every few."""
        return self._take(range(0, len(self.examples), step))

    def _take(self, order: Sequence[int]) -> "DrawnExamples":
        return replace(
            self,
            examples=[self.examples[i] for i in order],
            weights=[self.weights[i] for i in order],
            curvature=self.curvature[list(order)],
        )


def drawn_examples(
    size: int, look: Look | None, num: int, pool: int | None, seed: int
) -> DrawnExamples:
    """Draw examples from a split.

    Args:
        size: Examples of the split.
        look: Tells the curvature of examples' outputs, to draw in proportion to it; None draws all
            alike.
        num: How many; all where there are no more.
        pool: How many to look at; None for those that are drawn.
        seed: Of the draw.
    """
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    num = min(num, size)
    if look is None:
        zeros = torch.zeros(num, dtype=torch.float64)
        return DrawnExamples(order[:num], [1.0] * num, zeros, Population(num, size))
    among = order[: max(pool or 0, num)]
    curvature = look(among)
    draw = draw_examples(curvature, num, seed)
    mean = float(curvature.mean())
    spread = float(curvature.var(correction=0)) / mean**2 if mean else 0.0
    return DrawnExamples(
        [among[i] for i in draw.examples],
        list(draw.weights),
        curvature[list(draw.examples)],
        Population(len(among), size, spread),
    )
