"""Hessians of losses with many inputs: found in the right form, or refused."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hawq.factors import focal_factors, softmax_factor
from hawq.hessian_forms import HessianForm, hessian_form, joint_factors
from hawq.task import Factor


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def squared_overlap(boxes: Tensor) -> Tensor:
    """A loss of each box as a whole, with curvature of both signs."""
    x, y, width, height = boxes.unbind(1)
    return ((x - y) ** 2 * width.cos() + width * height**3).sum()


def focal(targets: Tensor):
    def loss(logits: Tensor) -> Tensor:
        p = torch.where(targets == 1, logits.sigmoid(), 1 - logits.sigmoid())
        alpha = torch.where(targets == 1, 0.25, 0.75)
        return -(alpha * (1 - p) ** 2 * p.log()).sum()

    return loss


LABELS = torch.tensor([2, 0, 1, 2, 2])
WEIGHTS = torch.tensor([1.0, 0.0, 2.5, 0.3, 1.0], dtype=torch.float64)
TARGETS = torch.tensor([[1.0, 0, 0]] * 4)
LOSSES = {
    "focal": (focal(TARGETS), 3 * randn(4, 3)),
    "squares": (lambda x: (x**2).sum(), randn(2, 3, 2)),
    "softmax": (
        lambda x: (WEIGHTS * F.cross_entropy(x, LABELS, reduction="none")).sum(),
        randn(5, 3),
    ),
    "boxes": (squared_overlap, randn(5, 4)),
    "vector": (lambda x: (x[0] * x[1] * x[2]) ** 2, randn(3)),
    "linear": (lambda x: 3 * x.sum(), randn(3, 2)),
    "distance": (lambda x: x.abs().sum(), randn(3, 2)),
    "constant": (lambda x: torch.zeros(()), randn(2, 2)),
}


def dense(factors: list[Factor], shape: torch.Size) -> Tensor:
    """Σ sign · B Bᵀ of every example, shape (N, M, M)."""
    total = torch.zeros(shape[0], shape[1], shape[1], dtype=torch.float64)
    for factor in factors:
        eye = torch.eye(factor.rank, dtype=torch.float64)
        columns = [factor.apply(e.expand(shape[0], -1)).double() for e in eye]
        b = torch.stack(columns, 2)
        total += factor.sign * b @ b.transpose(1, 2)
    return total


def hessian_of(loss, at: Tensor) -> Tensor:
    """The dense Hessian, shape (m, m)."""
    flat = at.flatten()
    return torch.autograd.functional.hessian(lambda x: loss(x.reshape(at.shape)), flat)


def form_of(name: str) -> HessianForm:
    found = hessian_form(*LOSSES[name])
    assert found is not None
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_factors_rebuild_the_dense_hessian(name):
    loss, at = LOSSES[name]
    flat = at.flatten()[None]
    expected = hessian_of(loss, at)
    factors = joint_factors([[form_of(name)]], flat)
    torch.testing.assert_close(dense(factors, flat.shape)[0], expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", LOSSES)
def test_energies_are_those_of_the_columns(name):
    flat = LOSSES[name][1].flatten()[None]
    for factor in joint_factors([[form_of(name)]], flat):
        eye = torch.eye(factor.rank, dtype=torch.float64)
        norms = torch.stack([factor.apply(e[None]).square().sum() for e in eye])
        torch.testing.assert_close(factor.energies[0], norms)


def test_softmax_and_focal_loss_agree_with_their_formulas():
    logits = LOSSES["softmax"][1]
    expected = [dense([softmax_factor(x[None], weight=float(w))], torch.Size((1, 3)))
                for x, w in zip(logits, WEIGHTS, strict=True)]  # fmt: skip
    found = dense(
        joint_factors([[form_of("softmax")]], logits.flatten()[None]), torch.Size((1, 15))
    )
    torch.testing.assert_close(found[0], torch.block_diag(*[e[0] for e in expected]))
    _, logits = LOSSES["focal"]
    flat = logits.flatten()[None]
    factors = focal_factors(flat, TARGETS.flatten()[None], reduction="sum")
    found = dense(joint_factors([[form_of("focal")]], flat), flat.shape)
    torch.testing.assert_close(found, dense(list(factors), flat.shape))


def test_negative_curvature_has_a_factor_of_its_own_with_columns_for_it_alone():
    logits = torch.tensor([[[-5.0, 0.0, 1.0]]], dtype=torch.float64)  # of a positive and negatives
    form = hessian_form(focal(torch.tensor([[[1.0, 0.0, 0.0]]])), logits)
    assert form is not None
    factors = joint_factors([[form]], logits.flatten(1))
    assert [(factor.sign, factor.rank) for factor in factors] == [(1.0, 2), (-1.0, 1)]


def test_examples_are_joined_each_in_its_own_length():
    names = (["softmax", "boxes"], ["focal"], ["squares", "vector"])
    parts = [[LOSSES[name] for name in row] for row in names]
    flat = [torch.cat([at.flatten() for _, at in row]) for row in parts]
    longest = max(map(len, flat))
    outputs = torch.stack([F.pad(row, (0, longest - len(row))) for row in flat])
    found = dense(joint_factors([[form_of(n) for n in row] for row in names], outputs),
                  outputs.shape)  # fmt: skip
    for hessian, row in zip(found, parts, strict=True):
        blocks = [hessian_of(loss, at) for loss, at in row]
        expected = torch.block_diag(*blocks)
        size = len(expected)
        torch.testing.assert_close(hessian[:size, :size], expected, atol=1e-10, rtol=1e-8)
        assert not hessian[size:].any()
        assert not hessian[:, size:].any()


@pytest.mark.parametrize(
    ("loss", "at"),
    [
        (lambda x: (x.sum(0) ** 2).sum(), randn(3, 4)),  # rows that depend on each other
        (lambda x: (x.sum(0) ** 2).sum(), 100 * randn(3, 4)),  # whose softmax is all ones and zeros
        (lambda x: (x.softmax(1) ** 2).sum(), randn(3, 65)),  # rows that are too long
        (lambda x: x.sum() ** 2, randn(65)),
        (lambda x: (x**1.5).sum(), -randn(4).abs()),  # NaN
    ],
)
def test_a_hessian_of_another_form_is_refused(loss, at):
    assert hessian_form(loss, at) is None


def test_long_rows_of_softmax_are_no_dense_blocks():
    labels = torch.arange(7)
    loss, at = lambda x: F.cross_entropy(x, labels), randn(7, 1000)
    form = hessian_form(loss, at)
    assert form is not None
    p = at.softmax(1)
    trace = (p * (1 - p)).sum() / 7
    torch.testing.assert_close((form.values * form.norms).sum(), trace)


def test_a_loss_of_nothing_has_no_curvature():
    form = hessian_form(lambda x: x.square().sum(), randn(0, 4))
    assert form is not None
    assert not form.values.numel()


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        (x,) = ctx.saved_tensors
        return 2 * x * slope


def test_a_loss_without_a_second_derivative_is_refused():
    assert hessian_form(OnceDifferentiable.apply, randn(3, 4)) is None


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 5))
def test_any_weighted_softmax_is_recognized(seed, num, classes):
    logits = 6 * randn(num, classes, seed=seed)
    weights = randn(num, seed=seed + 1).clamp_min(0)
    labels = torch.arange(num) % classes
    form = hessian_form(
        lambda x: (weights * F.cross_entropy(x, labels, reduction="none")).sum(), logits
    )
    assert form is not None
    assert bool((form.values >= -1e-12).all())
    p = logits.softmax(1)
    expected = (weights[:, None] * p * (1 - p)).sum()
    torch.testing.assert_close((form.values * form.norms).sum(), expected, atol=1e-9, rtol=1e-7)
