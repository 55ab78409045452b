"""Which estimator a network allows, and why.

Gauss–Newton where it is the Hessian: the operators that ran are piecewise linear in each weight
alone, and a Hessian-vector product agrees with a Gauss–Newton product on a few examples. Without
any probe where the outputs are few, by random probes where they are many. Else Hutchinson.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from hawq.curvature.exact import supports_exact
from hawq.curvature.linearity import nonlinearities
from hawq.curvature.network import differentiable, refuse_nonfinite, weights_of
from hawq.curvature.probes import probe_seed, rademacher
from hawq.task import Batch, Factor, Task, moved

__all__ = ["Choice", "EstimatorName", "choose_estimator"]

EstimatorName = Literal["exact_gauss_newton", "gauss_newton", "hutchinson"]

# In float64 the two products agree to about 1e-12 where the blocks are equal.
_AGREEMENT = 1e-6
# Of one Gauss–Newton probe's trace, relative: 0.2 to 0.5 on the layers of a trained ResNet20.
_PROBE_DEVIATION = 0.35


@dataclass(frozen=True, slots=True)
class Choice:
    """An estimator, and the reason in words."""

    estimator: EstimatorName
    reason: str


def choose_estimator(
    task: Task, model: nn.Module, layers: Sequence[str], batch: Batch, *, rtol: float
) -> Choice:
    """Choose the cheapest estimator that is unbiased for this network's Hessian traces.

    Args:
        task: Gives the loss and its factors.
        model: The network; it is copied to float64 and left alone.
        layers: Names of the layers whose weights are traced.
        batch: A few examples to look at.
        rtol: Relative probe error that will be asked for.

    Raises:
        NonFiniteTraceError: If an output is NaN or infinite.
    """
    twin = copy.deepcopy(model).double()
    weights = weights_of(twin, layers)
    batch = moved(batch, weights[0].device)
    batch = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, batch)
    with differentiable(twin, weights):
        curvature = task.curvature(twin, batch)
        if curvature is None:
            return Choice("hutchinson", "the task gives no factor of its loss's Hessian")
        outputs, factors = curvature
        refuse_nonfinite(outputs, "network's output")
        found = nonlinearities(outputs, weights)
        if found:
            return Choice(
                "hutchinson", f"not piecewise linear in every weight: {', '.join(found[:5])}"
            )
        loss = task.losses(twin, batch).sum()
        for i in sorted({0, len(layers) // 2, len(layers) - 1}):
            generator = torch.Generator().manual_seed(probe_seed(0, 0, i))
            z = rademacher(weights[i].shape, generator, weights[i])
            hessian = _hessian_product(loss, weights[i], z)
            gauss_newton = _gauss_newton_product(outputs, factors, weights[i], z)
            size = max(abs(hessian), abs(gauss_newton))
            if not abs(hessian - gauss_newton) <= _AGREEMENT * size:  # a NaN agrees with nothing
                return Choice(
                    "hutchinson",
                    f"a Hessian-vector product disagrees with Gauss–Newton in {layers[i]}: "
                    f"{hessian:.6g} against {gauss_newton:.6g}",
                )
    equal = (
        "the Hessian's blocks are Gauss–Newton's: every operator is piecewise linear in each "
        "weight, and a Hessian-vector product agrees"
    )
    odd = [name for name in layers if not supports_exact(twin.get_submodule(name))]
    if odd:
        return Choice("gauss_newton", f"{equal}; {odd[0]} cannot be taken apart by example")
    columns = sum(factor.rank for factor in factors)
    probes = math.ceil((_PROBE_DEVIATION / rtol) ** 2)
    price = f"{columns} columns of outputs against about {probes} probes"
    name: EstimatorName = "exact_gauss_newton" if columns <= probes else "gauss_newton"
    return Choice(name, f"{equal}; {price}")


def _hessian_product(loss: Tensor, weight: Tensor, z: Tensor) -> float:
    """Return zᵀHz of one weight's block."""
    if not loss.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True, allow_unused=True)
    if gradient is None or not gradient.requires_grad:  # the loss is linear in this weight
        return 0.0
    (product,) = torch.autograd.grad(gradient, weight, z, retain_graph=True, allow_unused=True)
    return 0.0 if product is None else float((product * z).sum())


def _gauss_newton_product(
    outputs: Tensor, factors: Sequence[Factor], weight: Tensor, z: Tensor
) -> float:
    """Return zᵀGz of one weight's block: Σ sign·‖Bᵀ J z‖²."""
    if not outputs.requires_grad:
        return 0.0
    u = torch.zeros_like(outputs, requires_grad=True)
    (pullback,) = torch.autograd.grad(
        outputs, weight, u, create_graph=True, retain_graph=True, allow_unused=True
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
