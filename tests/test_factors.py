"""Square roots of losses' Hessians against dense Hessians, and tasks that use them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from oracles import TinyTask, block_traces, dense_hessian
from scipy.optimize import brentq
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from hawq.curvature.gauss_newton import gauss_newton_samples
from hawq.factors import (
    binary_cross_entropy_factor,
    focal_factors,
    smooth_l1_factor,
    softmax_factor,
    squared_error_factor,
)
from hawq.task import Factor
from hawq.testing import TaskContractError, check_task

BETA = 0.7


def focal_loss(z: Tensor, t: Tensor, alpha=0.25, gamma=2.0) -> Tensor:
    return sigmoid_focal_loss(z, t, alpha, gamma)


# Element by element: the loss of outputs and targets (0 or 1), and its factors.
ELEMENTWISE: dict[str, tuple[Callable[..., Tensor], Callable[..., Sequence[Factor]]]] = {
    "squared_error": (
        lambda z, t: F.mse_loss(z, t, reduction="none"),
        lambda z, t, **k: [squared_error_factor(z, **k)],
    ),
    "binary_cross_entropy": (
        lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="none"),
        lambda z, t, **k: [binary_cross_entropy_factor(z, **k)],
    ),
    "smooth_l1": (
        lambda z, t: F.smooth_l1_loss(z, t, reduction="none", beta=BETA),
        lambda z, t, **k: [smooth_l1_factor(z, t, beta=BETA, **k)],
    ),
    "focal": (focal_loss, focal_factors),
}
LOGITS = npst.arrays(
    np.float64,
    st.sampled_from([(1,), (3,), (1, 4), (2, 3), (2, 2, 2)]),
    elements=st.floats(-20, 20, allow_subnormal=False),
)


def tensor(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(factors: Sequence[Factor], shape: Sequence[int]) -> Tensor:
    """Σ sign·B Bᵀ of each example, shape (N, n, n)."""
    num, size = shape[0], int(np.prod(shape[1:]))
    total = torch.zeros(num, size, size, dtype=torch.float64)
    for factor in factors:
        unit = torch.eye(factor.rank, dtype=torch.float64)
        columns = [factor.apply(e.expand(num, -1)).reshape(num, size) for e in unit]
        b = torch.stack(columns, 2)
        total += factor.sign * b @ b.mT
    return total


def hessians(loss: Callable[[Tensor, int], Tensor], outputs: Tensor) -> Tensor:
    """Dense Hessians of ``loss(output of example n, n)``, shape (N, n, n)."""
    return torch.stack(
        [dense_hessian(lambda z, n=n: loss(z, n), [o]) for n, o in enumerate(outputs)]
    )


# --- element by element -------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("name", ELEMENTWISE)
@settings(max_examples=40)
@given(logits=LOGITS, data=st.data())
def test_the_factors_of_elementwise_losses_square_to_their_hessians(name, reduction, logits, data):
    loss, factors = ELEMENTWISE[name]
    outputs = torch.from_numpy(logits)
    targets = tensor(
        data.draw(npst.arrays(np.float64, logits.shape, elements=st.sampled_from([0.0, 1.0])))
    )
    weight = tensor(data.draw(npst.arrays(np.float64, logits.shape, elements=st.floats(0, 3))))
    if name == "smooth_l1":  # at the kink itself there is no second derivative
        assume((((outputs - targets).abs() - BETA).abs() > 1e-9).all())

    def of_example(z: Tensor, n: int) -> Tensor:
        return getattr(weight[n] * loss(z, targets[n]), reduction)()

    got = squared(factors(outputs, targets, reduction=reduction, weight=weight), outputs.shape)
    torch.testing.assert_close(got, hessians(of_example, outputs), rtol=1e-7, atol=1e-10)


@given(
    u=st.floats(-20, 20),
    positive=st.booleans(),
    alpha=st.floats(0, 1),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0]),
)
def test_the_focal_loss_has_its_second_derivative_for_every_alpha_and_gamma(
    u, positive, alpha, gamma
):
    z, t = tensor([[u]]), tensor([[float(positive)]])
    got = squared(focal_factors(z, t, reduction="sum", alpha=alpha, gamma=gamma), z.shape)
    want = hessians(lambda x, n: focal_loss(x, t[n], alpha, gamma).sum(), z)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_without_focus_the_focal_loss_is_cross_entropy():
    z = random(4, 3)
    t = (random(4, 3, seed=1) > 0).double()
    focal = focal_factors(z, t, reduction="sum", alpha=0.5, gamma=0.0)
    entropy = binary_cross_entropy_factor(z, reduction="sum", weight=0.5)
    torch.testing.assert_close(squared(focal, z.shape), squared([entropy], z.shape))


def focal_curvature(u: float, positive: bool) -> float:
    z = tensor([[u]])
    factors = focal_factors(z, torch.full_like(z, float(positive)), reduction="sum")
    return float(squared(factors, z.shape))


def test_the_focal_loss_is_concave_far_on_the_wrong_side():
    for positive, side, depth in ((True, -1, -0.0118), (False, 1, -0.0354)):
        crossing = brentq(lambda u, p=positive: focal_curvature(u, p), 2 * side, 4 * side)
        assert crossing == pytest.approx(2.79 * side, abs=0.005)
        curvature = [focal_curvature(side * u, positive) for u in np.arange(0, 20, 0.05)]
        assert min(curvature) == pytest.approx(depth, abs=5e-5)
        beyond = [focal_curvature(side * u, positive) for u in np.arange(2.8, 20, 0.1)]
        assert max(beyond) < 0
        before = [focal_curvature(side * u, positive) for u in np.arange(-20, 2.79, 0.1)]
        assert min(before) > 0


def test_one_of_the_two_focal_factors_vanishes_at_every_element():
    z = 6 * random(5, 2, 3)
    plus, minus = focal_factors(z, (random(5, 2, 3, seed=1) > 0).double(), reduction="sum")
    assert (plus.sign, minus.sign) == (1, -1)
    ones = torch.ones(5, 6, dtype=torch.float64)
    up, down = plus.apply(ones), minus.apply(ones)
    assert up.any()
    assert down.any()
    assert not (up * down).any()


def test_curvature_keeps_its_relative_precision_far_from_zero():
    # 1 − σ(z) would round to 0 in float32.
    z = torch.tensor([[30.0]])
    h = float(binary_cross_entropy_factor(z, reduction="sum").apply(torch.ones(1, 1))) ** 2
    assert h == pytest.approx(np.exp(-30), rel=1e-5, abs=0)
    plus, _ = focal_factors(-z, torch.zeros(1, 1), reduction="sum", gamma=0.0, alpha=0.0)
    assert float(plus.apply(torch.ones(1, 1))) ** 2 == pytest.approx(np.exp(-30), rel=1e-5, abs=0)


def test_huber_s_loss_is_smooth_l1_weighted_by_beta():
    z, t = random(4, 3), random(4, 3, seed=1)
    factor = smooth_l1_factor(z, t, beta=BETA, reduction="sum", weight=BETA)
    want = hessians(lambda x, n: F.huber_loss(x, t[n], reduction="sum", delta=BETA), z)
    assert want.any()
    torch.testing.assert_close(squared([factor], z.shape), want)


def test_a_weight_of_positives_is_an_element_weight():
    z, v = random(4, 3), tensor([1.0, 5.0, 0.5])
    t = (random(4, 3, seed=1) > 0).double()
    factor = binary_cross_entropy_factor(z, reduction="sum", weight=v * t + 1 - t)
    want = hessians(
        lambda x, n: F.binary_cross_entropy_with_logits(x, t[n], pos_weight=v, reduction="sum"), z
    )
    torch.testing.assert_close(squared([factor], z.shape), want)


def test_weights_of_anchors_broadcast_over_their_classes():
    z = random(2, 3, 4)
    weight = tensor([[0, 1, 2], [3, 0, 1]])[..., None]
    got = squared([squared_error_factor(z, reduction="sum", weight=weight)], z.shape)
    want = 2 * weight.expand_as(z).flatten(1)
    torch.testing.assert_close(got, torch.diag_embed(want))


# --- softmax ------------------------------------------------------------------------------------


@given(
    logits=npst.arrays(np.float64, (3, 4), elements=st.floats(-20, 20)),
    smoothing=st.floats(0, 1),
    classes=npst.arrays(np.float64, 4, elements=st.floats(0, 3)),
)
def test_softmax_s_factor_knows_label_smoothing_and_class_weights(logits, smoothing, classes):
    z, y, v = torch.from_numpy(logits), torch.tensor([2, 0, 2]), torch.from_numpy(classes)
    weight = (1 - smoothing) * v[y] + smoothing * v.mean()
    got = squared([softmax_factor(z, weight=weight)], z.shape)

    def loss(x: Tensor, n: int) -> Tensor:
        return F.cross_entropy(
            x[None], y[n : n + 1], weight=v, reduction="sum", label_smoothing=smoothing
        )

    torch.testing.assert_close(got, hessians(loss, z), rtol=1e-7, atol=1e-10)


def test_soft_targets_do_not_change_softmax_s_hessian():
    z, targets = random(3, 4), random(3, 4, seed=1).softmax(1)
    want = hessians(lambda x, n: F.cross_entropy(x, targets[n]), z)
    torch.testing.assert_close(squared([softmax_factor(z)], z.shape), want)


def test_softmax_at_every_position_of_a_picture():
    z, y = random(2, 3, 2, 2), torch.tensor([[[0, 1], [2, 0]], [[1, 1], [0, 2]]])
    weight = tensor([[[1, 2], [0, 1]], [[3, 1], [1, 0.5]]])
    factor = softmax_factor(z, weight=weight)
    assert factor.rank == 12

    def loss(x: Tensor, n: int) -> Tensor:
        losses = F.cross_entropy(x[None], y[n : n + 1], reduction="none")
        return (weight[n] * losses).sum()

    torch.testing.assert_close(squared([factor], z.shape), hessians(loss, z))
    plain = squared([softmax_factor(z, weight=0.5)], z.shape)
    torch.testing.assert_close(2 * plain, squared([softmax_factor(z)], z.shape))


# --- what all share -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ELEMENTWISE, "softmax"])
def test_a_factor_holds_no_graph_and_keeps_the_outputs_type(name):
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.ones(3, 4)
    found = (
        [softmax_factor(z)] if name == "softmax" else ELEMENTWISE[name][1](z, t, reduction="mean")
    )
    for factor in found:
        image = factor.apply(torch.ones(3, factor.rank))
        assert (image.shape, image.dtype, image.requires_grad) == (z.shape, z.dtype, False)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *product(ELEMENTWISE, [(4,), (2, 3), (2, 3, 2)]),
        *product(["softmax"], [(2, 3), (2, 3, 2)]),
    ],
)
def test_energies_are_the_columns_squared_norms(name, shape):
    z = 3 * random(*shape)
    t = (random(*shape, seed=1) > 0).double()
    weight = random(*shape, seed=2).abs()
    if name == "softmax":
        found = [softmax_factor(z, weight=weight[:, 0])]
    else:
        found = ELEMENTWISE[name][1](z, t, reduction="mean", weight=weight)
    for factor in found:
        unit = torch.eye(factor.rank, dtype=torch.float64)
        columns = [factor.apply(e.expand(len(z), -1)).reshape(len(z), -1) for e in unit]
        norms = torch.stack([column.square().sum(1) for column in columns], 1)
        torch.testing.assert_close(factor.energies, norms)


@dataclass(frozen=True)
class LossTask(TinyTask):
    """A tiny network of four outputs, as (N, 2, 2), under one of the losses."""

    loss: str = "softmax"
    scale: float = 1.0

    def model(self) -> nn.Module:
        return nn.Sequential(super().model(), nn.Unflatten(1, (2, 2)))

    def targets(self, batch: tuple[Tensor, Tensor], like: Tensor) -> Tensor:
        return F.one_hot(batch[1], 4).view(-1, 2, 2).to(like)

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = model(batch[0])
        if self.loss == "softmax":
            labels = torch.stack([batch[1] % 2, batch[1] // 2], 1)
            return F.cross_entropy(outputs, labels, reduction="none", label_smoothing=0.1).sum(1)
        return ELEMENTWISE[self.loss][0](outputs, self.targets(batch, outputs)).mean((1, 2))

    def curvature(self, model: nn.Module, batch: tuple[Tensor, Tensor]):
        outputs = model(batch[0])
        if self.loss == "softmax":
            return outputs, [softmax_factor(outputs, weight=self.scale)]
        targets = self.targets(batch, outputs)
        factors = ELEMENTWISE[self.loss][1]
        return outputs, factors(outputs, targets, reduction="mean", weight=self.scale)

    def scores(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return -self.losses(model, batch).detach()


@pytest.mark.parametrize("name", [*ELEMENTWISE, "softmax"])
def test_a_task_under_each_loss_keeps_the_contract(name):
    check_task(LossTask(loss=name))
    with pytest.raises(TaskContractError, match="must equal the Hessian of each example's loss"):
        check_task(LossTask(loss=name, scale=1.5))


def test_a_focal_loss_gives_a_layer_its_negative_trace():
    # All logits of positives are far on the wrong side; a linear layer's block is Gauss–Newton's.
    x, targets = random(6, 5), torch.ones(6, 3, dtype=torch.float64)
    weight = (0.1 * random(3, 5, seed=1)).requires_grad_()
    logits = x @ weight.T - 4
    factors = focal_factors(logits, targets, reduction="sum")
    samples = gauss_newton_samples(logits, factors, [weight], range(400))
    hessian = dense_hessian(lambda w: focal_loss(x @ w.T - 4, targets).sum(), [weight])
    exact = float(block_traces(hessian, [weight]))
    assert exact < 0
    error = samples.std(ddof=1) / 20
    assert abs(samples.mean() - exact) < 4.5 * error < 0.2 * abs(exact)


# --- refusals -----------------------------------------------------------------------------------

Z, ONES = torch.zeros(2, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: softmax_factor(Z, weight=torch.ones(3)), r"losses' shape \(2,\), got \(3,\)"),
        (lambda: softmax_factor(Z, weight=-1), "weight must not be negative, got -1"),
        (
            lambda: squared_error_factor(Z, reduction="none"),
            "reduction must be 'sum' or 'mean', got 'none'",
        ),
        (
            lambda: squared_error_factor(Z, reduction="sum", weight=torch.ones(3)),
            r"have 2 dimensions as the outputs have, got shape \(3,\)",
        ),
        (
            lambda: binary_cross_entropy_factor(Z, reduction="sum", weight=-ONES),
            "weight must not be negative, got -1",
        ),
        (
            lambda: smooth_l1_factor(Z, ONES, beta=0, reduction="sum"),
            r"beta must be positive \(the L1 loss has no curvature\), got 0",
        ),
        (
            lambda: smooth_l1_factor(Z, torch.ones(3), beta=1, reduction="sum"),
            r"targets must have the outputs' shape \(2, 3\), got \(3,\)",
        ),
        (lambda: focal_factors(Z, Z + 0.5, reduction="sum"), "targets must be 0 or 1"),
        (lambda: focal_factors(Z, ONES[:1], reduction="sum"), r"shape \(2, 3\), got \(1, 3\)"),
        (lambda: focal_factors(Z, ONES, reduction="sum", alpha=-1), "got -1 and 2.0"),
        (lambda: focal_factors(Z, ONES, reduction="sum", gamma=-1), "got 0.25 and -1"),
    ],
)
def test_what_makes_no_factor_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
