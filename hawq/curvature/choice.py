"""Which estimator a network allows, which one is cheapest, and why.

Gauss–Newton where it is the Hessian: the operators that ran are piecewise linear in each weight
(or activation) alone, and a Hessian-vector product agrees with a Gauss–Newton product on a few
examples. Gauss–Newton with a correction where the network is smooth. Hutchinson where the task does
not know its loss's Hessian. Where an operator has no second derivative, Gauss–Newton if the task
knows its loss, or differences of gradients.

Of the ways to a Gauss–Newton trace, the one with the fewest backward passes for the error that is
asked for: all directions of every example's loss that matter, or only the leading ones and random
combinations of the others.
"""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map_only

from hawq.curvature.columns import directions
from hawq.curvature.finite_difference import missing_second_derivative
from hawq.curvature.linearity import nonlinearities
from hawq.curvature.network import differentiable, refuse_nonfinite, weights_of
from hawq.curvature.per_example import WeightTape, supports_examples
from hawq.curvature.plan import EstimatorName
from hawq.curvature.probes import probe_seed, rademacher
from hawq.curvature.residual import residual_loss
from hawq.curvature.sites import ActivationTape, Subject
from hawq.task import Batch, Factor, Objective, moved

__all__ = ["Choice", "choose_estimator", "choose_passes", "not_taken_apart"]

_T = TypeVar("_T")
_Inputs = Sequence[Tensor] | Sequence[GradientEdge]

# In float64 the two products agree to about 1e-12 where the blocks are equal.
_AGREEMENT = 1e-6
# Where the network is sure, both are what cancellation leaves of ‖J z‖².
_ROUNDING = 1e-12
# Of ‖Σ s_v G_v‖² over random signs, relative to its mean: √2 where all G_v are equal, 0 where they
# are orthogonal; measured 0.5 to 0.9 on the layers of a trained ResNet20.
_PROBE_DEVIATION = 0.9
_MIN_PROBES = 2
# In float32, of one example's gradient put together from its parts.
_APART = 1e-3


@dataclass(frozen=True, slots=True)
class Choice:
    """An estimator, and the reason in words.

    Attributes:
        estimator: Its name.
        reason: In words.
        leading: Directions that ``"mixed_gauss_newton"`` takes one by one.
        probes: Probes that are expected to do.
    """

    estimator: EstimatorName
    reason: str
    leading: int = 0
    probes: int = _MIN_PROBES


def choose_estimator(
    task: Objective,
    model: nn.Module,
    layers: Sequence[str],
    batch: Batch,
    *,
    subject: Subject = "weights",
) -> Choice:
    """Choose between Gauss–Newton, Hutchinson and differences: what the Hessian allows.

    Args:
        task: Gives the loss and its factors.
        model: The network; it is copied to float64 and left alone.
        layers: Names of the layers whose weights, or inputs, are traced.
        batch: A few examples to look at.
        subject: Weights or activations.

    Raises:
        NonFiniteTraceError: If an output is NaN or infinite.
    """
    twin = copy.deepcopy(model).double()
    batch = moved(batch, next(twin.parameters()).device)
    batch = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, batch)
    seen = _examined(task, twin, layers, batch, subject)
    what = "weight" if subject == "weights" else "activation"
    smooth = f"not piecewise linear in every {what}: {', '.join(seen.nonlinear[:5])}"
    linear = (
        f"the Hessian's blocks are Gauss–Newton's: every operator is piecewise linear in each "
        f"{what}, and a Hessian-vector product agrees"
    )
    rules: tuple[tuple[object, EstimatorName, str], ...] = (
        (
            seen.broken and not seen.factored,
            "finite_difference",
            f"no second derivative, hence differences of gradients, noisy at kinks: {seen.broken}",
        ),
        (
            seen.broken,
            "gauss_newton",
            f"no second derivative, hence Gauss–Newton's instead: {seen.broken}",
        ),
        (not seen.factored, "hutchinson", "the task gives no factor of its loss's Hessian"),
        (seen.disagreement, "hutchinson", seen.disagreement),
        (not seen.nonlinear, "gauss_newton", linear),
        (seen.splits, "corrected_gauss_newton", f"{smooth}; its two parts add up to the Hessian"),
    )
    for holds, estimator, reason in rules:
        if holds:
            return Choice(estimator, reason)
    return Choice("hutchinson", smooth)


@dataclass(frozen=True, slots=True)
class _Examined:
    """What a look at a few examples told.

    Attributes:
        broken: The operator that has no second derivative.
        factored: Whether the task gives factors of its loss's Hessian.
        nonlinear: Operators that are not piecewise linear.
        splits: Whether the Hessian can be taken as Gauss–Newton and a residual.
        disagreement: How a Hessian-vector product differs from what it should be.
    """

    broken: str = ""
    factored: bool = False
    nonlinear: Sequence[str] = ()
    splits: bool = False
    disagreement: str = ""


def _examined(
    task: Objective, twin: nn.Module, layers: Sequence[str], batch: Batch, subject: Subject
) -> _Examined:
    weights = weights_of(twin, layers) if subject == "weights" else []
    tape = ActivationTape(twin, layers) if subject == "activations" else None

    def run(forward: Callable[[], _T]) -> tuple[_T, _Inputs]:
        """Run the network; return what it gave, and what that depends on."""
        with tape.recording() if tape else nullcontext():
            result = forward()
        return result, tape.edges if tape else weights

    with differentiable(twin, weights):
        loss, of_loss = run(lambda: task.losses(twin, batch).sum())
        broken = missing_second_derivative(loss, of_loss) if of_loss else ""
        curvature, of_outputs = run(lambda: task.curvature(twin, batch))
        if curvature is None:
            return _Examined(broken)
        outputs, factors = curvature
        refuse_nonfinite(outputs, "network's output")
        if broken:
            return _Examined(broken, True)
        nonlinear = nonlinearities(outputs, weights if tape is None else None)
        rest, of_rest = run(lambda: residual_loss(lambda: task.losses(twin, batch), twin))
        apart = tape is not None or all(
            supports_examples(twin.get_submodule(name)) for name in layers
        )
        splits = bool(nonlinear) and rest is not None and apart
        names, shapes = list(layers), [weight.shape for weight in weights]
        if tape:
            traced = [seen for seen in tape.seen if seen.edge]
            names, shapes = [s.site.name for s in traced], [s.tensor.shape for s in traced]
        for i in sorted({0, len(names) // 2, len(names) - 1}) if names else ():
            if nonlinear and not splits:
                break
            z = rademacher(shapes[i], torch.Generator().manual_seed(probe_seed(0, 0, i)), outputs)
            whole = _hessian_product(loss, of_loss[i], z)
            parts, plain = _gauss_newton_product(outputs, factors, of_outputs[i], z)
            if splits and rest is not None:
                parts += _hessian_product(rest[0], of_rest[i], z)
            allowed = _AGREEMENT * max(abs(whole), abs(parts)) + _ROUNDING * plain
            if not abs(whole - parts) <= allowed:  # a NaN agrees with nothing
                disagreement = (
                    f"a Hessian-vector product disagrees with Gauss–Newton in {names[i]}: "
                    f"{whole:.6g} against {parts:.6g}"
                )
                return _Examined(broken, True, nonlinear, splits, disagreement)
    return _Examined(broken, True, nonlinear, splits)


def choose_passes(
    task: Objective,
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Batch],
    *,
    one: Batch,
    subject: Subject,
    weights: Tensor,
    floor: float,
    num_examples: int,
    rtol: float,
) -> Choice:
    """Choose the way to a Gauss–Newton trace with the fewest backward passes.

    Args:
        task: Gives the outputs and the factors.
        model: The network, in eval mode.
        layers: Names of the layers.
        batches: Some of the examples.
        one: One of them alone.
        subject: Weights or activations.
        weights: What each of them counts for, shape (N,).
        floor: As in ``TracePlan``.
        num_examples: How many there will be in all.
        rtol: Relative probe error that is asked for.
    """
    odd = not_taken_apart(task, model, layers, one) if subject == "weights" else ""
    if odd:
        return Choice("gauss_newton", f"{odd} cannot be taken apart by example: random signs")
    # Energies of all factors' directions, the largest first: shape (N, R).
    found = [_energies(task, model, batch) for batch in batches]
    longest = max(part.shape[1] for part in found)  # a batch pads its outputs to its own longest
    padded = [F.pad(part, (0, longest - part.shape[1])) for part in found]
    energy = weights[:, None] * torch.cat(padded)
    energy = energy.sort(1, descending=True).values
    active = energy > floor
    passes = float(active.sum(1).double().mean())
    total = float(energy.sum())
    rest = energy.flip(1).cumsum(1).flip(1)  # of direction k and those after it
    if total == 0:
        return Choice("exact_gauss_newton", "the outputs have no curvature on these examples")
    spreads = [
        float(rest[:, leading].square().sum()) / total**2 * len(energy) / num_examples
        for leading in range(min(64, energy.shape[1]))
    ]
    best = (math.inf, 0, 0)
    for leading, spread in enumerate(spreads):
        probes = max(_MIN_PROBES, math.ceil(_PROBE_DEVIATION**2 * spread / rtol**2))
        best = min(best, (leading + probes, leading, probes))
    cost, leading, probes = best
    # The examples' own error comes on top of the probes', and looking at them costs more than a
    # pass: one that halves the probes' error is worth it.
    if leading + 1 < len(spreads) and 4 * spreads[leading + 1] < spreads[leading]:
        cost, leading = cost + 1, leading + 1
    number = f"{passes:,.1f}".removesuffix(".0")
    if passes <= cost:
        return Choice(
            "exact_gauss_newton",
            f"{number} directions an example hold its outputs' curvature, against "
            f"{leading} and {probes} probes",
        )
    instead = f"{leading} leading directions an example and {probes} probes of the others"
    if not leading:
        instead = f"{probes} probes an example and no direction by itself"
    return Choice("mixed_gauss_newton", f"{instead}, against {number} directions", leading, probes)


@torch.no_grad()
def _energies(task: Objective, model: nn.Module, batch: Batch) -> Tensor:
    curvature = task.curvature(model, batch)
    assert curvature is not None
    outputs, factors = curvature
    return torch.cat([directions(outputs, factor).energy.cpu() for factor in factors], 1)


def not_taken_apart(task: Objective, model: nn.Module, layers: Sequence[str], one: Batch) -> str:
    """Name a layer whose gradient is not what its inputs and outputs make of it; empty if none.

    Such as one whose weight is used elsewhere too, in an embedding or in a forward method, or one
    that reads an example's parts as if they were examples.

    Args:
        task: Gives the outputs and the factors.
        model: The network.
        layers: Names of the layers.
        one: A single example.
    """
    for name in layers:
        if not supports_examples(model.get_submodule(name)):
            return name
    weights, tape = weights_of(model, layers), WeightTape(model, layers)
    with differentiable(model, weights):
        with tape.recording():
            curvature = task.curvature(model, one)
            outputs = task.losses(model, one) if curvature is None else curvature[0]
        if not outputs.requires_grad:
            return ""
        generator = torch.Generator().manual_seed(0)
        cotangent = rademacher(outputs.shape, generator, outputs)
        whole = torch.autograd.grad(
            outputs, weights, cotangent, retain_graph=True, allow_unused=True
        )
        parts = torch.autograd.grad(outputs, tape.edges, cotangent, allow_unused=True)
        rows = torch.arange(len(outputs), device=outputs.device)
        norms = [float(values.sum()) for values in tape.squared_norms(parts, rows)]
    for name, gradient, found in zip(layers, whole, norms, strict=True):
        expected = 0.0 if gradient is None else float(gradient.double().square().sum())
        if abs(found - expected) > _APART * max(found, expected):
            return name
    return ""


def _hessian_product(loss: Tensor, at: Tensor | GradientEdge, z: Tensor) -> float:
    """Return zᵀHz of one block."""
    if not loss.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(loss, at, create_graph=True, allow_unused=True)
    if gradient is None or not gradient.requires_grad:  # the loss is linear in it
        return 0.0
    (product,) = torch.autograd.grad(gradient, at, z, retain_graph=True, allow_unused=True)
    return 0.0 if product is None else float((product * z).sum())


def _gauss_newton_product(
    outputs: Tensor, factors: Sequence[Factor], at: Tensor | GradientEdge, z: Tensor
) -> tuple[float, float]:
    """Return zᵀGz of one block, Σ sign·‖Bᵀ J z‖², and ‖J z‖²."""
    if not outputs.requires_grad:
        return 0.0, 0.0
    u = torch.zeros_like(outputs, requires_grad=True)
    (pullback,) = torch.autograd.grad(
        outputs, at, u, create_graph=True, retain_graph=True, allow_unused=True
    )
    if pullback is None:
        return 0.0, 0.0
    (push,) = torch.autograd.grad(pullback, u, z, retain_graph=True)  # J z
    value = 0.0
    for factor in factors:
        s = outputs.new_zeros(len(outputs), factor.rank, requires_grad=True)
        (image,) = torch.autograd.grad(factor.apply(s), s, push)  # Bᵀ J z
        value += factor.sign * float(image.square().sum())
    return value, float(push.square().sum())
