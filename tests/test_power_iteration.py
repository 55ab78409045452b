"""Top eigenvalues of blocks against dense Hessians and quadratics whose spectrum is known."""

import gc
import weakref
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import LAYERS, TinyTask, free_space, mean_loss_hessian
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from hawq.curvature.estimate import NonFiniteTraceError
from hawq.curvature.network import differentiable, weights_of
from hawq.curvature.power_iteration import TopEigenvalues, hessian_product, top_eigenvalues
from hawq.sensitivity import omega
from search.tasks.classification import ClassificationTask

TINY = TinyTask(dtype=torch.float64)


class Quadratic:
    """½ wᵀA_n w for every example n, w all weights of two layers named 0 and 1."""

    def __init__(self, matrices: Tensor, first_size: int = 1):
        self.matrices, self.first_size, self.calls = matrices.double(), first_size, 0

    def model(self) -> nn.Module:
        size = self.matrices.shape[1]
        sizes = [self.first_size, size - self.first_size]
        return nn.Sequential(*(nn.Linear(n, 1, bias=False).double() for n in sizes))

    def batch(self, split: str, indices: Tensor) -> Tensor:
        return self.matrices[indices]

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.calls += 1
        w = torch.cat([layer.weight.flatten() for layer in model])
        return torch.einsum("i,nij,j->n", w, batch, w) / 2


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_spectrum(*eigenvalues: float, num: int = 4, seed: int = 0) -> Quadratic:
    """Quadratics whose mean has these eigenvalues; each differs from it."""
    size = len(eigenvalues)
    basis, _ = torch.linalg.qr(random(size, size, seed=seed))
    mean = basis @ torch.diag(torch.tensor(eigenvalues).double()) @ basis.T
    noise = random(num, size, size, seed=seed + 1)
    noise = 0.3 * (noise + noise.mT)
    return Quadratic(mean + noise - noise.mean(0))


def top(task, layers: Sequence[str] = ("0", "1"), model=None, **changes) -> TopEigenvalues:
    settings = {"examples": range(4), "batch_size": 2, "rtol": 1e-6, "max_iterations": 2000}
    return top_eigenvalues(task, model or task.model(), layers, split="train", **settings | changes)


def flat(vector: Sequence[Tensor]) -> np.ndarray:
    return torch.cat([part.flatten() for part in vector]).double().numpy()


def by_modulus(matrix: Tensor) -> np.ndarray:
    values = np.linalg.eigvalsh(matrix.numpy())
    return values[np.argsort(-np.abs(values))]


# --- networks against their dense Hessians ------------------------------------------------------


@pytest.mark.parametrize("network", ["relu", "silu", "shared"])
@pytest.mark.parametrize("layers", [("conv2",), ("conv1", "conv2"), LAYERS], ids="+".join)
def test_the_top_three_are_those_of_the_dense_hessian(network, layers):
    task = TinyTask(network, dtype=torch.float64)
    model, (x, y) = task.model(), task.batch("train", torch.arange(12))
    hessian = mean_loss_hessian(model, layers, x, y)
    # Batches of five, five and two: the last one weighs less.
    found = top(task, layers, model, examples=range(12), batch_size=5, num=3, rtol=1e-4)
    np.testing.assert_allclose(found.values, by_modulus(hessian)[:3], rtol=1e-6)
    assert found.converged.all()
    vectors = np.stack([flat(v) for v in found.vectors])
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-9)
    residual = np.linalg.norm(vectors @ hessian.numpy() - found.values[:, None] * vectors, axis=1)
    np.testing.assert_allclose(found.residual, residual, atol=1e-9)


def test_a_block_s_hessian_holds_what_its_layers_do_to_each_other():
    alone = [top(TINY, (layer,), examples=range(12)).values[0] for layer in ("conv1", "conv2")]
    together = top(TINY, ("conv1", "conv2"), examples=range(12)).values[0]
    assert together > 1.01 * max(alone)


def test_the_data_error_is_the_spread_of_the_batches_with_the_vector_held_fixed():
    model = TINY.model()
    found = top(TINY, ("conv1", "conv2"), model, examples=range(12), batch_size=5, num=2)
    sizes = np.array([5, 5, 2])
    for i in range(2):
        v, forms = flat(found.vectors[i]), []
        for part in torch.arange(12).split(5):
            hessian = mean_loss_hessian(model, ("conv1", "conv2"), *TINY.batch("train", part))
            forms.append(v @ hessian.numpy() @ v)
        mean = np.average(forms, weights=sizes)
        assert found.values[i] == pytest.approx(mean, rel=1e-9)
        variance = 3 / 2 * np.sum((sizes / 12 * (forms - mean)) ** 2)
        assert found.data_error[i] == pytest.approx(variance**0.5, rel=1e-6)


def test_the_data_error_is_calibrated():
    # A lone eigenvalue of mean 10 over small ones: each run draws its own examples.
    def run(seed: int) -> TopEigenvalues:
        noise = random(15, 5, 5, seed=seed)
        matrices = torch.diag(torch.tensor([20, 1, 1, 0.5, 0]).double()) + noise + noise.mT
        return top(Quadratic(matrices), examples=range(15), batch_size=4, rtol=1e-2)

    runs = [run(seed) for seed in range(100)]
    spread = np.std([found.values[0] for found in runs])
    reported = np.mean([found.data_error[0] ** 2 for found in runs]) ** 0.5
    assert spread == pytest.approx(reported, rel=0.2)


def test_a_float32_network_agrees_with_lanczos():
    task = ClassificationTask("digits", None, "resnet8", 300)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = task.model()
    layers = ("layer2.0.conv1", "layer2.0.conv2")
    weights = weights_of(model, layers)
    sizes = [weight.numel() for weight in weights]

    def product(v: np.ndarray) -> np.ndarray:
        parts = torch.from_numpy(v).float().flatten().split(sizes)
        loss = task.losses(model, task.batch("train", torch.arange(24))).mean()
        vectors = [part.view_as(w) for part, w in zip(parts, weights, strict=True)]
        return flat(hessian_product(loss, weights, vectors))

    with differentiable(model, weights):
        operator = LinearOperator((sum(sizes),) * 2, matvec=product, dtype=np.float64)
        expected = eigsh(operator, k=2, which="LM", tol=1e-4, return_eigenvectors=False)
    found = top(task, layers, model, examples=range(24), batch_size=8, num=2, rtol=1e-3)
    np.testing.assert_allclose(found.values, sorted(expected, key=abs)[::-1], rtol=1e-4)
    assert (found.residual <= 1.1e-3 * np.abs(found.values)).all()
    assert found.vectors[0][0].dtype == torch.float32


# --- spectra ------------------------------------------------------------------------------------


def test_a_negative_eigenvalue_of_largest_modulus_keeps_its_sign():
    found = top(with_spectrum(3, -5, 1, 0.5), num=2)
    np.testing.assert_allclose(found.values, [-5, 3], rtol=1e-9)


@pytest.mark.parametrize("eigenvalues", [(2, -2), (-4, 1, 4, 0.1), (3, -3, 3, -3, 1)])
def test_a_pair_of_opposite_signs_is_told_apart_and_the_positive_one_comes_first(eigenvalues):
    for seed in range(5):
        found = top(with_spectrum(*eigenvalues, seed=seed), num=2, seed=seed, rtol=1e-6)
        assert found.converged.all()
        assert found.values[0] == pytest.approx(max(eigenvalues), rel=1e-9)
        assert abs(found.values[1]) == pytest.approx(max(eigenvalues), rel=1e-9)
        assert found.iterations[0] < 40


def test_opposite_signs_that_swing_the_iterate_exactly_are_no_trap():
    # H = [[0, 1], [1, 0]]: power steps alone swing between v and Hv for ever.
    task = Quadratic(torch.tensor([[0.0, 1], [1, 0]]).expand(4, 2, 2))
    found = top(task, num=2)
    np.testing.assert_allclose(found.values, [1, -1], rtol=1e-12)
    assert found.iterations.tolist() == [2, 1]


def test_a_repeated_eigenvalue_is_found_as_often_as_it_is_there():
    found = top(with_spectrum(3, 3, 1, 0.2), num=3)
    np.testing.assert_allclose(found.values, [3, 3, 1], rtol=1e-9)


def test_the_largest_comes_first_though_it_may_be_found_later():
    for seed in range(10):
        found = top(with_spectrum(5, 4.9, 4.8, 4.7, 1), num=3, rtol=0.1, seed=seed)
        assert found.values.tolist() == sorted(found.values, reverse=True)


def test_every_eigenvalue_can_be_found():
    eigenvalues = (5, -4, 3, 2, -1)
    np.testing.assert_allclose(top(with_spectrum(*eigenvalues), num=5).values, eigenvalues)


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_iteration_is_not_taken_for_its_end(seed):
    # One eigenvalue above a broad bulk: the first guesses change little for long.
    bulk = 2 * np.sin(np.linspace(-np.pi / 2, np.pi / 2, 400))
    matrix = torch.diag(torch.tensor([2.4, *bulk]))
    found = top(Quadratic(matrix.expand(2, -1, -1)), examples=range(2), batch_size=1, rtol=1e-2)
    assert found.converged.all()
    assert found.values[0] == pytest.approx(2.4, rel=1e-2)


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([0.5, 0.1, 1e-2, 1e-4]))
def test_an_eigenvalue_lies_within_the_residual_however_loose_the_tolerance(seed, rtol):
    half = random(6, 6, seed=seed)
    matrix = half + half.T
    found = top(Quadratic(matrix.expand(2, -1, -1)), examples=range(2), batch_size=1, rtol=rtol)
    distance = np.abs(np.linalg.eigvalsh(matrix.numpy()) - found.values[0]).min()
    assert distance <= found.residual[0] * (1 + 1e-9) + 1e-12
    assert found.residual[0] <= rtol * abs(found.values[0])


def test_the_residual_of_a_later_eigenvalue_counts_what_the_first_one_lacks():
    task = with_spectrum(5, 4, 3, 2, 1, 0.5)
    found = top(task, num=3, rtol=0.1)
    eigenvalues = np.array([5, 4, 3, 2, 1, 0.5])
    for value, residual in zip(found.values, found.residual, strict=True):
        assert np.abs(eigenvalues - value).min() <= residual


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_a_loss_that_is_linear_in_the_weights_has_eigenvalue_zero(scale):
    class Linear(Quadratic):
        def losses(self, model, batch):
            linear = sum(layer.weight.sum() for layer in model)
            return scale * linear.expand(len(batch)) if scale else batch.sum((1, 2))

    found = top(Linear(random(4, 3, 3)), num=2)
    for zeros in (found.values, found.residual, found.data_error):
        assert zeros.tolist() == [0, 0]
    assert found.converged.all()
    assert found.iterations.tolist() == [1, 1]
    assert np.linalg.norm(flat(found.vectors[0])) == pytest.approx(1)


def test_once_the_rank_is_used_up_the_eigenvalues_are_zero_up_to_rounding():
    v = random(6, seed=3)
    found = top(Quadratic(torch.outer(v, v).expand(4, 6, 6)), num=3)
    assert found.values[0] == pytest.approx(float(v @ v))
    assert np.abs(found.values[1:]).max() < 1e-12
    assert found.converged.all()
    assert found.iterations.max() <= 3


def test_a_layer_that_the_loss_does_not_use_has_rows_of_zeros():
    task = TinyTask("lazy", dtype=torch.float64)
    assert top(task, ("unused",)).values.tolist() == [0]
    both, used = top(task, ("unused", "used")), top(task, ("used",))
    np.testing.assert_allclose(both.values, used.values, rtol=1e-9)
    assert float(both.vectors[0][0].norm()) < 1e-8


def test_an_eigenvalue_scales_with_the_loss():
    task = with_spectrum(5, -4, 3)
    scaled = Quadratic(-7 * task.matrices)
    np.testing.assert_allclose(top(scaled, num=2).values, -7 * top(task, num=2).values, rtol=1e-9)


# --- work, seeds and tolerances -----------------------------------------------------------------


def test_an_iteration_is_one_product_over_all_batches():
    task = with_spectrum(5, 4, 3, 2)
    found = top(task, batch_size=1, num=3, rtol=1e-3)
    assert task.calls == 4 * found.iterations.sum()


def test_a_tolerance_that_was_not_met_is_said():
    task = with_spectrum(5, 4.9, 4.8, 4.7, 3)
    found = top(task, num=2, max_iterations=3, rtol=1e-6)
    assert not found.converged.any()
    assert found.iterations.tolist() == [3, 3]
    assert (found.residual > 1e-6 * np.abs(found.values)).all()


def test_a_looser_tolerance_costs_fewer_products():
    task = with_spectrum(5, 4.5, 4, 3.5, 3)
    counts = [top(task, rtol=rtol).iterations[0] for rtol in (1e-1, 1e-2, 1e-4, 1e-8)]
    assert counts == sorted(set(counts))


def test_float32_reaches_tolerances_near_its_rounding():
    task, model = TinyTask(), TinyTask().model()
    double = top(TINY, LAYERS, examples=range(12)).values[0]
    found = top(task, LAYERS, model, examples=range(12), rtol=3e-6, max_iterations=200)
    assert found.converged.all()
    assert found.values[0] == pytest.approx(double, rel=1e-5)


def test_a_tolerance_below_the_rounding_does_no_harm():
    # The last iterates differ by rounding alone, which must not be taken for a direction.
    double = top(TINY, LAYERS, examples=range(12)).values[0]
    for max_iterations in (50, 60):
        found = top(
            TinyTask(), LAYERS, examples=range(12), rtol=1e-12, max_iterations=max_iterations
        )
        assert not found.converged[0]
        assert found.values[0] == pytest.approx(double, rel=1e-6)
        assert found.residual[0] < 1e-4


def test_equal_seeds_give_equal_bits_and_other_seeds_the_same_eigenvalue():
    first, again, other = (top(TINY, LAYERS, examples=range(12), seed=seed) for seed in (0, 0, 1))
    assert first.values.tolist() == again.values.tolist()
    np.testing.assert_array_equal(flat(first.vectors[0]), flat(again.vectors[0]))
    assert first.values[0] == pytest.approx(other.values[0], rel=1e-9)
    assert not np.array_equal(flat(first.vectors[0]), flat(other.vectors[0]))


def test_an_example_of_weight_two_counts_as_if_it_were_there_twice():
    task = with_spectrum(5, 4, 3, num=4)
    weighted = top(task, examples=(0, 1, 2, 3), example_weights=(2.0, 0.0, 1.0, 1.0))
    twice = top(task, examples=(0, 0, 2, 3))
    np.testing.assert_allclose(weighted.values, twice.values, rtol=1e-9)
    np.testing.assert_allclose(weighted.data_error, twice.data_error, rtol=1e-6)


def test_hawq_s_objective_is_the_eigenvalue_over_the_block_s_size_times_the_squared_error():
    # Tied layers add up: Σ_l (λ / n)‖ΔW_l‖² is (λ / n)‖ΔW‖² of the block.
    sizes, eigenvalue, errors = np.array([6, 10]), 3.0, np.array([[0.5], [0.2]])
    table = omega(free_space([6, 10], [4]), eigenvalue * sizes / sizes.sum(), errors**2)
    norm = np.linalg.norm(errors)
    assert table.sum() == pytest.approx(eigenvalue / 16 * norm**2)


# --- what must be as before ---------------------------------------------------------------------


class Watched(TinyTask):
    """Remembers whether the losses it gave are still alive."""

    seen: ClassVar[list[weakref.ref]] = []

    def losses(self, model, batch):
        losses = super().losses(model, batch)
        self.seen.append(weakref.ref(losses))
        return losses


def test_no_graph_outlives_its_batch():
    task = Watched()
    task.seen.clear()
    gc.disable()  # a graph that needs the collector is a leak until it runs
    try:
        top(task, LAYERS, examples=range(12), num=2, rtol=1e-2)
        assert len(task.seen) > 6
        assert all(reference() is None for reference in task.seen)
    finally:
        gc.enable()


def test_the_network_and_the_generators_are_left_as_they_were():
    model = TINY.model().train()
    model.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = top(TINY, LAYERS, model, examples=range(12), rtol=1e-2)
    assert all(module.training for module in model.modules())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(part.requires_grad for part in found.vectors[0])


# --- the product --------------------------------------------------------------------------------


def test_the_product_is_symmetric_linear_and_that_of_the_dense_hessian():
    model, batch = TINY.model(), TINY.batch("train", torch.arange(12))
    weights = weights_of(model, LAYERS)
    u, v = ([random(*w.shape, seed=s + i) for i, w in enumerate(weights)] for s in (10, 20))

    def product(vector: Sequence[Tensor]) -> np.ndarray:
        with differentiable(model, weights):
            return flat(hessian_product(TINY.losses(model, batch).mean(), weights, vector))

    assert flat(u) @ product(v) == pytest.approx(flat(v) @ product(u), rel=1e-12)
    mixed = product([2 * a - b for a, b in zip(u, v, strict=True)])
    np.testing.assert_allclose(mixed, 2 * product(u) - product(v), atol=1e-12)
    dense = mean_loss_hessian(model, LAYERS, *batch).numpy()
    np.testing.assert_allclose(product(v), dense @ flat(v), atol=1e-12)


def test_a_weight_in_which_the_loss_is_linear_still_turns_with_the_others():
    # ℓ = a·b: no curvature in either alone, all of it between them.
    a, b = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    vectors = [torch.tensor([1.0, 2]).double(), torch.zeros(2).double()]
    parts = hessian_product(a @ b, [a, b], vectors)
    assert [part.tolist() for part in parts] == [[0, 0], [1, 2]]


def test_a_weight_in_which_the_loss_is_linear_has_rows_of_zeros_beside_one_that_it_bends():
    a, b = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parts = hessian_product(a.sum() + b @ b, [a, b], [a.detach(), 3 * b.detach()])
    assert [part.tolist() for part in parts] == [[0, 0], [6, 6]]


# --- refusals -----------------------------------------------------------------------------------


def test_a_loss_that_is_nan_is_refused():
    model = TINY.model()
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    with pytest.raises(NonFiniteTraceError, match=r"the loss must be finite, got NaN .* batch 0"):
        top(TINY, ("conv2",), model)


def test_a_product_that_is_nan_is_refused_by_layer_and_batch():
    class Kinked(Quadratic):
        def losses(self, model, batch):
            first, second = (layer.weight for layer in model)
            kink = (second**2).sqrt() if batch.max() > 2 else second**2  # not smooth at 0
            return (first.square().sum() + kink.sum()).expand(len(batch))

    task = Kinked(torch.ones(4, 3, 3) + 8 * torch.eye(4)[3][:, None, None])
    model = task.model()
    nn.init.zeros_(model[1].weight)
    with pytest.raises(NonFiniteTraceError, match=r"product in 1 must be finite, .* in batch 1"):
        top(task, model=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, r"layers must differ and be at least one, got \(\)"),
        ({"layers": ("0", "0")}, "layers must differ"),
        ({"batch_size": 4}, "examples must fill at least 2 batches, got 4"),
        ({"batch_size": 0}, "examples must fill at least 2 batches"),
        ({"num": 0}, r"num must be within 1..3 \(weights\), got 0"),
        ({"num": 4}, "num must be within"),
        ({"rtol": 0.0}, "rtol must be positive, got 0.0"),
        ({"max_iterations": 0}, "max_iterations must be positive, got 0"),
        ({"example_weights": (1.0,)}, "example_weights must be one an example or none, got 1"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    task = with_spectrum(3, 2, 1)
    with pytest.raises(ValueError, match=message):
        top(task, change.pop("layers", ("0", "1")), **change)
