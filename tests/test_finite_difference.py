"""Differences of gradients against closed forms and Hessian-vector products."""

import copy

import numpy as np
import pytest
import torch
from oracles import TinyTask
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align

from hawq.curvature.finite_difference import finite_difference_samples, missing_second_derivative
from hawq.curvature.hutchinson import hutchinson_samples
from hawq.curvature.network import differentiable, weights_of
from hawq.curvature.probes import rademacher


class OnceSquare(torch.autograd.Function):
    """x², whose derivative no one can differentiate: what compiled kernels do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def leaf(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def rms(*weights: Tensor) -> float:
    return float(torch.cat([w.detach().flatten() for w in weights]).square().mean().sqrt())


# --- closed forms -------------------------------------------------------------------------------


def test_a_quadratic_s_differences_are_its_hessian_s_products():
    a, b = leaf(4, seed=1), leaf(3, seed=2)
    matrix = leaf(7, 7, seed=3).detach()
    matrix = matrix + matrix.T

    def loss() -> Tensor:
        w = torch.cat([a, b])
        return w @ matrix @ w / 2

    expected = hutchinson_samples(loss(), [a, b], range(5))
    got = finite_difference_samples(loss, [a, b], range(5))
    np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("step", [0.3, 0.01])
def test_the_truncation_of_a_fourth_power_is_known(step):
    # Σ(w⁴)'' = 12 Σw², and (4(w + h)³ − 4(w − h)³) / 2h = 12w² + 4h²
    a, b = leaf(5, seed=1), leaf(3, seed=2)
    h = step * rms(a, b)
    got = finite_difference_samples(lambda: a.pow(4).sum() + b.pow(4).sum(), [a, b], [3], step=step)
    expected = [float((12 * w.detach() ** 2 + 4 * h**2).sum()) for w in (a, b)]
    np.testing.assert_allclose(got, [expected], rtol=1e-9)


def test_weights_that_are_all_zero_have_a_step_too():
    w = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    got = finite_difference_samples(lambda: 3 * w.square().sum(), [w], [0])
    np.testing.assert_allclose(got, [[24]], rtol=1e-8)


def test_a_kink_within_reach_counts_with_its_jump_over_two_steps():
    w = torch.tensor([0.001, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    h = 0.01 * rms(w)
    got = finite_difference_samples(lambda: w.relu().sum(), [w], [0], step=0.01)
    np.testing.assert_allclose(got, [[1 / (2 * h)]], rtol=1e-9)


# --- networks -----------------------------------------------------------------------------------


class SmoothTask(TinyTask):
    """Neither ReLU nor max-pooling."""

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            first, second = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
            last = nn.Linear(75, 4)
            network = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), nn.Flatten(), last)
        return network.to(self.dtype)


LAYERS = ("0", "2", "5")
SMOOTH = SmoothTask(dtype=torch.float64)


def samples_of(task: TinyTask, step: float | None = None, seeds=range(6)) -> np.ndarray:
    model = task.model()
    batch = task.batch("train", torch.arange(task.num_examples))
    weights = weights_of(model, LAYERS)
    with differentiable(model, weights):
        return finite_difference_samples(
            lambda: task.losses(model, batch).mean(), weights, seeds, step=step
        )


def exact(num: int = 6) -> np.ndarray:
    model = SMOOTH.model()
    batch = SMOOTH.batch("train", torch.arange(SMOOTH.num_examples))
    weights = weights_of(model, LAYERS)
    with differentiable(model, weights):
        return hutchinson_samples(SMOOTH.losses(model, batch).mean(), weights, range(num))


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 3e-3), (torch.float64, 1e-8)])
def test_on_a_smooth_network_the_default_step_costs_nothing_and_is_near_the_best(dtype, least):
    task = SmoothTask(dtype=dtype)
    expected = exact()
    deviation = expected.std(0, ddof=1)

    def error(step: float | None) -> float:
        return float((np.abs(samples_of(task, step) - expected) / deviation).max())

    default = 0.5 * torch.finfo(dtype).eps ** (1 / 3)
    assert error(None) == error(default) < least
    assert error(None) < error(default / 30)
    assert error(None) < error(default * 30)


def test_splitting_the_seeds_changes_no_bit():
    whole = samples_of(SMOOTH, seeds=range(4))
    parts = [samples_of(SMOOTH, seeds=part) for part in ([0], [1, 2], [3])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_reduction_gets_the_elements_of_every_weight():
    w = leaf(3, 2)
    scale = torch.tensor([[1.0], [2], [3]], dtype=torch.float64)

    def rows(parts) -> Tensor:
        return parts[0].sum(1)

    got = finite_difference_samples(lambda: torch.sum(scale * w**2), [w], [0], reduce=rows)
    np.testing.assert_allclose(got, [[4, 8, 12]], rtol=1e-8)


def test_an_operator_without_second_derivative_has_its_trace():
    w, x = leaf(5, seed=1), leaf(7, 5, seed=2).detach()

    def loss() -> Tensor:
        return OnceSquare.apply(x @ w).sum()

    generator = torch.Generator().manual_seed(0)
    z = rademacher((5,), generator, w)
    expected = float(2 * (x @ z).square().sum())
    np.testing.assert_allclose(finite_difference_samples(loss, [w], [0]), [[expected]], rtol=1e-8)


def test_weights_that_do_not_matter_have_trace_zero():
    used, straight, unused = leaf(3, seed=1), leaf(4, seed=2), leaf(2, seed=3)
    got = finite_difference_samples(
        lambda: used.square().sum() + straight.sum(), [unused, straight, used], [0, 1]
    )
    assert got[:, 0].tolist() == [0, 0]
    np.testing.assert_allclose(got[:, 1:], [[0, 6], [0, 6]], atol=1e-8)
    assert not finite_difference_samples(lambda: torch.zeros(()), [unused], [0]).any()


# --- what must be as before ---------------------------------------------------------------------


def state(weights) -> list[tuple]:
    return [(w.detach().clone(), w.requires_grad, w.grad) for w in weights]


def assert_state(weights, before) -> None:
    for w, (values, flag, gradient) in zip(weights, before, strict=True):
        assert torch.equal(w, values)
        assert (w.requires_grad, w.grad) == (flag, gradient)


def test_the_weights_come_back_with_their_old_bits():
    weights = [leaf(50, seed=i, dtype=torch.float32) for i in range(2)]
    before = state(weights)
    seen = []

    def loss() -> Tensor:
        seen.append(copy.deepcopy([w.detach() for w in weights]))
        return sum(w.pow(3).sum() for w in weights)

    generators = torch.get_rng_state()
    finite_difference_samples(loss, weights, range(3), step=0.1)
    assert_state(weights, before)
    assert torch.equal(torch.get_rng_state(), generators)
    assert len(seen) == 6  # two gradients a probe
    assert all(not torch.equal(moved[0], weights[0]) for moved in seen)


def test_they_come_back_after_an_error_too():
    weights = [leaf(50, dtype=torch.float32)]
    before = state(weights)
    calls = []

    def loss() -> Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return weights[0].pow(3).sum()

    with pytest.raises(RuntimeError, match="out of luck"):
        finite_difference_samples(loss, weights, range(3))
    assert_state(weights, before)


def test_what_is_no_scalar_and_no_step_is_refused():
    w = leaf(3)
    with pytest.raises(ValueError, match=r"loss must return a scalar, got shape \(3,\)"):
        finite_difference_samples(lambda: w * w, [w], [0])
    with pytest.raises(ValueError, match="step must be positive, got 0"):
        finite_difference_samples(w.sum, [w], [0], step=0)


# --- is there a second derivative? --------------------------------------------------------------


def test_a_smooth_or_a_linear_loss_has_a_second_derivative():
    w, x = leaf(5), leaf(5, seed=1).detach()
    for loss in (w.pow(3).sum(), (w * x).sum(), x.sum()):
        assert missing_second_derivative(loss, [w]) == ""
    unused = leaf(2, seed=2)
    assert missing_second_derivative(w.pow(3).sum(), [unused, w]) == ""


@pytest.mark.parametrize(
    "loss",
    [
        lambda w: OnceSquare.apply(w).sum(),
        lambda w: OnceSquare.apply(2 * w).square().sum(),
        lambda w: OnceSquare.apply(w.square()).sum() + w.square().sum(),
    ],
    ids=["last", "within", "beside"],
)
def test_the_operator_that_may_be_differentiated_once_is_named(loss):
    # Autograd does not raise here: asked for a product, it leaves the operator's part out.
    w = leaf(5)
    assert missing_second_derivative(loss(w), [w]) == ("OnceSquare is marked once_differentiable")


def test_the_message_of_an_operator_that_refuses_is_told():
    picture = leaf(1, 1, 6, 6)
    boxes = torch.tensor([[0, 0.5, 0.5, 4, 4]], dtype=torch.float64)
    pooled = roi_align(picture, boxes, 2).square().sum()
    assert "roi_align" in missing_second_derivative(pooled, [picture])


def test_a_loss_stays_usable_after_the_question():
    w = leaf(5)
    loss = w.square().square().sum()  # its second derivative passes the first square again
    assert missing_second_derivative(loss, [w]) == ""
    expected = 12 * float(w.detach().square().sum())
    np.testing.assert_allclose(hutchinson_samples(loss, [w], [0]), [[expected]], rtol=1e-12)
    assert w.grad is None


class Broken(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("not even once")


def test_a_broken_first_derivative_is_an_error_and_no_answer():
    w = leaf(5)
    with pytest.raises(RuntimeError, match="not even once"):
        missing_second_derivative(Broken.apply(w).sum(), [w])
