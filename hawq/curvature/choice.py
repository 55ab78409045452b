"""Which estimator a network allows, which one is cheapest, and why.

Gauss–Newton where it is the Hessian: the operators that ran are piecewise linear in each weight
(or activation) alone, and a Hessian-vector product agrees with a Gauss–Newton product on a few
examples. Else Hutchinson, and where an operator has no second derivative, Gauss–Newton if the task
knows its loss, or differences of gradients.

Of the ways to a Gauss–Newton trace, the one with the fewest backward passes for the error that is
asked for: all directions of every example's loss that matter, or only the leading ones and random
combinations of the others.
"""

import copy
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map_only

from hawq.curvature.columns import directions
from hawq.curvature.finite_difference import differentiates_twice
from hawq.curvature.linearity import nonlinearities
from hawq.curvature.network import differentiable, refuse_nonfinite, weights_of
from hawq.curvature.per_example import supports_examples
from hawq.curvature.probes import probe_seed, rademacher
from hawq.curvature.sites import ActivationTape, Subject
from hawq.curvature.units import EstimatorName
from hawq.task import Batch, Factor, Task, moved

__all__ = ["Choice", "choose_estimator", "choose_passes"]

# In float64 the two products agree to about 1e-12 where the blocks are equal.
_AGREEMENT = 1e-6
# Of ‖Σ s_v G_v‖² over random signs, relative to its mean: √2 where all G_v are equal, 0 where they
# are orthogonal; measured 0.5 to 0.9 on the layers of a trained ResNet20.
_PROBE_DEVIATION = 0.9
_MIN_PROBES = 2


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
    task: Task,
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
    device = next(twin.parameters()).device
    batch = moved(batch, device)
    batch = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, batch)
    weights = weights_of(twin, layers) if subject == "weights" else None
    tape = ActivationTape(twin, layers) if weights is None else None
    with differentiable(twin, weights or []):
        with tape.recording() if tape else nullcontext():
            loss = task.losses(twin, batch).sum()
        inputs: Sequence[Tensor] | Sequence[GradientEdge] = tape.edges if tape else weights or []
        shapes = [seen.tensor.shape for seen in tape.seen if seen.edge] if tape else None
        broken = differentiates_twice(loss, inputs)
        with tape.recording() if tape else nullcontext():
            curvature = task.curvature(twin, batch)
        if curvature is None:
            if broken:
                return Choice("finite_difference", f"no second derivative: {broken}")
            return Choice("hutchinson", "the task gives no factor of its loss's Hessian")
        outputs, factors = curvature
        refuse_nonfinite(outputs, "network's output")
        if broken:
            return Choice(
                "gauss_newton", f"no second derivative, hence Gauss–Newton's instead: {broken}"
            )
        found = nonlinearities(outputs, weights)
        what = "weight" if subject == "weights" else "activation"
        if found:
            return Choice(
                "hutchinson", f"not piecewise linear in every {what}: {', '.join(found[:5])}"
            )
        after: Sequence[Tensor] | Sequence[GradientEdge] = tape.edges if tape else inputs
        for i in sorted({0, len(inputs) // 2, len(inputs) - 1} if inputs else set()):
            generator = torch.Generator().manual_seed(probe_seed(0, 0, i))
            shape = shapes[i] if shapes else (weights or [])[i].shape
            z = rademacher(shape, generator, outputs)
            hessian = _hessian_product(loss, inputs[i], z)
            gauss_newton = _gauss_newton_product(outputs, factors, after[i], z)
            size = max(abs(hessian), abs(gauss_newton))
            if not abs(hessian - gauss_newton) <= _AGREEMENT * size:  # a NaN agrees with nothing
                where = layers[i] if tape is None else tape.seen[i].site.name
                return Choice(
                    "hutchinson",
                    f"a Hessian-vector product disagrees with Gauss–Newton in {where}: "
                    f"{hessian:.6g} against {gauss_newton:.6g}",
                )
    return Choice(
        "gauss_newton",
        "the Hessian's blocks are Gauss–Newton's: every operator is piecewise linear in each "
        f"{what}, and a Hessian-vector product agrees",
    )


def choose_passes(
    task: Task,
    model: nn.Module,
    layers: Sequence[str],
    batch: Batch,
    *,
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
        batch: Some of the examples, by falling curvature of their outputs.
        subject: Weights or activations.
        weights: What each of them counts for, shape (N,).
        floor: As in ``TracePlan``.
        num_examples: How many there will be in all.
        rtol: Relative probe error that is asked for.
    """
    odd = [name for name in layers if not supports_examples(model.get_submodule(name))]
    if odd and subject == "weights":
        reason = f"{odd[0]} ({type(model.get_submodule(odd[0])).__name__}) cannot be taken apart"
        return Choice("gauss_newton", f"{reason} by example: random signs")
    with torch.no_grad():
        curvature = task.curvature(model, batch)
    assert curvature is not None
    outputs, factors = curvature
    weights = weights.to(outputs.device)
    # Energies of all factors' directions, the largest first: shape (N, R).
    bases = [directions(outputs, factor) for factor in factors]
    energy = torch.cat([weights[:, None] * basis.energy for basis in bases], 1)
    energy = energy.sort(1, descending=True).values
    active = energy > floor
    passes = float(active.sum(1).double().mean())
    total = float(energy.sum())
    rest = energy.flip(1).cumsum(1).flip(1)  # of direction k and those after it
    if total == 0:
        return Choice("exact_gauss_newton", "the outputs have no curvature on these examples")
    best = (math.inf, 0, 0)
    for leading in range(min(64, energy.shape[1])):
        spread = float(rest[:, leading].square().sum()) / total**2 * len(energy) / num_examples
        probes = max(_MIN_PROBES, math.ceil(_PROBE_DEVIATION**2 * spread / rtol**2))
        best = min(best, (leading + probes, leading, probes))
    cost, leading, probes = best
    if passes <= cost:
        return Choice(
            "exact_gauss_newton",
            f"{passes:.1f} directions an example hold its outputs' curvature, against "
            f"{leading} and {probes} probes",
        )
    return Choice(
        "mixed_gauss_newton",
        f"{leading} leading directions an example and {probes} probes of the others, against "
        f"{passes:.1f} directions",
        leading,
        probes,
    )


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
) -> float:
    """Return zᵀGz of one block: Σ sign·‖Bᵀ J z‖²."""
    if not outputs.requires_grad:
        return 0.0
    u = torch.zeros_like(outputs, requires_grad=True)
    (pullback,) = torch.autograd.grad(
        outputs, at, u, create_graph=True, retain_graph=True, allow_unused=True
    )
    if pullback is None:
        return 0.0
    (push,) = torch.autograd.grad(pullback, u, z, retain_graph=True)  # J z
    value = 0.0
    for factor in factors:
        s = outputs.new_zeros(len(outputs), factor.rank, requires_grad=True)
        (image,) = torch.autograd.grad(factor.apply(s), s, push)  # Bᵀ J z
        value += factor.sign * float(image.square().sum())
    return value
