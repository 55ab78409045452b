"""The estimators against closed forms, dense Hessians and their own theory."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import (
    LAYERS,
    TinyTask,
    block_traces,
    dense_hessian,
    mean_loss_gauss_newton,
    mean_loss_hessian,
)
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hawq.curvature.gauss_newton import gauss_newton_samples
from hawq.curvature.hutchinson import hutchinson_samples
from hawq.curvature.network import differentiable, weights_of
from hawq.curvature.probes import probe_seed, rademacher
from hawq.curvature.residual import residual_loss
from hawq.factors import softmax_factor
from hawq.task import Factor

TINY = TinyTask(dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).requires_grad_()


def identity_factor(outputs: Tensor) -> Factor:
    """Of ½‖outputs − target‖², whose Hessian is the identity."""
    return Factor(outputs[0].numel(), lambda s: s.view_as(outputs))


def assert_mean(samples: np.ndarray, expected: Tensor | Sequence[float]) -> None:
    """Every column's mean is within four and a half of its standard errors, and these are small."""
    mean, error = samples.mean(0), samples.std(0, ddof=1) / len(samples) ** 0.5
    expected = np.asarray(expected)
    assert (np.abs(mean - expected) <= 4.5 * error + 1e-9 * np.abs(expected)).all()
    assert (error <= 0.1 * np.abs(expected) + 1e-12).all()


# --- closed forms -------------------------------------------------------------------------------


class LinearSoftmax:
    """Cross-entropy of Wx + b over six examples, its weight given by rows."""

    def __init__(self):
        self.x, self.y = random(6, 5, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
        self.rows = [leaf(5, seed=10 + c) for c in range(3)]
        self.bias = leaf(3, seed=2)
        self.logits = self.x @ torch.stack(self.rows).T + self.bias
        self.p = self.logits.detach().softmax(1)
        self.leaves = [*self.rows, self.bias]

    def traces(self) -> list[float]:
        """Row c: Σ p_c(1 − p_c)‖x‖²; bias: Σ 1 − ‖p‖²."""
        rows = (self.p * (1 - self.p) * self.x.square().sum(1, keepdim=True)).sum(0)
        return [*rows.tolist(), float((1 - self.p.square().sum(1)).sum())]


def test_hutchinson_meets_the_closed_form_of_softmax_regression():
    problem = LinearSoftmax()
    loss = F.cross_entropy(problem.logits, problem.y, reduction="sum")
    assert_mean(hutchinson_samples(loss, problem.leaves, range(2000)), problem.traces())


def test_gauss_newton_meets_the_closed_form_of_softmax_regression():
    problem = LinearSoftmax()
    factor = softmax_factor(problem.logits)
    samples = gauss_newton_samples(problem.logits, [factor], problem.leaves, range(2000))
    assert_mean(samples, problem.traces())


def test_the_rows_of_softmax_regression_add_up_to_its_layer():
    problem = LinearSoftmax()
    layer = (1 - problem.p.square().sum(1)) * problem.x.square().sum(1)
    assert sum(problem.traces()[:3]) == pytest.approx(float(layer.sum()), rel=1e-12)


@pytest.mark.parametrize("estimator", ["hutchinson", "gauss_newton"])
def test_both_meet_the_closed_form_of_an_activation_s_channels(estimator):
    weight, x = random(4, 3, seed=3), random(7, 3, seed=4)
    channels = [x[:, j].clone().requires_grad_() for j in range(3)]
    logits = torch.stack(channels, 1) @ weight.T
    p = logits.detach().softmax(1)
    # Σ_c p_c w_cj² − (Σ_c p_c w_cj)², summed over the examples
    expected = (p @ weight.square() - (p @ weight).square()).sum(0)
    seeds = range(2000)
    if estimator == "hutchinson":
        loss = F.cross_entropy(logits, torch.zeros(7, dtype=torch.int64), reduction="sum")
        samples = hutchinson_samples(loss, channels, seeds)
    else:
        samples = gauss_newton_samples(logits, [softmax_factor(logits)], channels, seeds)
    assert_mean(samples, expected)


@pytest.mark.parametrize("estimator", ["hutchinson", "gauss_newton"])
def test_both_meet_the_closed_form_of_a_two_layer_linear_network(estimator):
    x, y = random(9, 4, seed=1), random(9, 3, seed=2)
    first, second = leaf(5, 4, seed=3), leaf(3, 5, seed=4)
    hidden = x @ first.T
    outputs = hidden @ second.T
    # Tr_W1 = ‖W2‖² Σ‖x‖² and Tr_W2 = m Σ‖h‖²
    expected = [
        float(second.detach().square().sum() * x.square().sum()),
        float(3 * hidden.detach().square().sum()),
    ]
    seeds = range(2000)
    if estimator == "hutchinson":
        loss = (outputs - y).square().sum() / 2
        samples = hutchinson_samples(loss, [first, second], seeds)
    else:
        factor = identity_factor(outputs)
        samples = gauss_newton_samples(outputs, [factor], [first, second], seeds)
    assert_mean(samples, expected)


def test_softmax_s_factor_is_a_square_root_of_its_hessian():
    logits = random(3, 4)
    factor = softmax_factor(logits)
    assert factor.rank == 4
    columns = torch.stack([factor.apply(e.expand(3, 4)) for e in torch.eye(4).double()], 2)
    p = logits.softmax(1)
    expected = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    torch.testing.assert_close(columns @ columns.mT, expected)
    hessian = dense_hessian(lambda z: F.cross_entropy(z, torch.tensor([2])), [logits[:1]])
    torch.testing.assert_close(expected[0], hessian)


def test_factors_of_negative_sign_are_subtracted():
    # ℓ = ½(o₀² − o₁²): an indefinite Hessian diag(1, −1), one factor for each sign.
    weight, x = leaf(2, 3, seed=1), random(5, 3, seed=2)
    outputs = x @ weight.T
    plus = Factor(1, lambda s: torch.cat([s, torch.zeros_like(s)], 1))
    minus = Factor(1, lambda s: torch.cat([torch.zeros_like(s), 2 * s], 1), sign=-1.0)
    samples = gauss_newton_samples(outputs, [plus, minus], [weight], range(3000))
    assert_mean(samples, [float((1 - 4) * x.square().sum())])


def test_outputs_of_any_shape_are_traced():
    weight, x = leaf(2, 1, 3, 3, seed=1), random(4, 1, 6, 6, seed=2)
    outputs = F.conv2d(x, weight)
    samples = gauss_newton_samples(outputs, [identity_factor(outputs)], [weight], range(2000))
    jacobian_norm = F.unfold(x, 3).square().sum()
    assert_mean(samples, [float(2 * jacobian_norm)])


def test_examples_may_count_differently():
    weight, x = leaf(2, 3, seed=1), random(4, 3, seed=2)
    outputs = x @ weight.T
    weights = torch.tensor([0.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    factor = identity_factor(outputs)
    samples = gauss_newton_samples(outputs, [factor], [weight], range(2000), weights=weights)
    assert_mean(samples, [float(2 * (weights * x.square().sum(1)).sum())])


def test_a_reduction_gets_the_squares_of_every_input():
    weight, unused, x = leaf(2, 3, seed=1), leaf(4), random(4, 3, seed=2)
    outputs = x @ weight.T

    def rows(parts: Sequence[Tensor | None]) -> Tensor:
        assert parts[1] is None
        return torch.zeros(2).double() if parts[0] is None else parts[0].sum(1)

    arguments = (outputs, [identity_factor(outputs)], [weight, unused], range(2000))
    samples = gauss_newton_samples(*arguments, reduce=rows)
    assert_mean(samples, [float(x.square().sum())] * 2)
    np.testing.assert_allclose(samples.sum(1), gauss_newton_samples(*arguments)[:, 0])


def test_edges_of_the_graph_are_as_good_as_leaves():
    x, first, second = random(5, 4, seed=1), leaf(3, 4, seed=2), leaf(2, 3, seed=3)
    hidden = x @ first.T
    edge = get_gradient_edge(hidden)
    outputs = F.silu(hidden) @ second.T

    def samples(at: Tensor | GradientEdge) -> np.ndarray:
        loss = F.cross_entropy(outputs, torch.tensor([0, 1, 0, 1, 0]), reduction="sum")
        hutchinson = hutchinson_samples(loss, [at], [0, 1])
        return np.stack(
            [hutchinson, gauss_newton_samples(outputs, [softmax_factor(outputs)], [at], [0, 1])]
        )

    np.testing.assert_array_equal(samples(edge), samples(hidden))


# --- quadratics: everything is known ------------------------------------------------------------


def quadratic(matrix: Tensor, sizes: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """½ wᵀAw over leaves of the given sizes."""
    leaves = [leaf(size, seed=i) for i, size in enumerate(sizes)]
    w = torch.cat(leaves)
    return w @ matrix @ w / 2, leaves


def symmetric(size: int) -> Tensor:
    half = random(size, size, seed=5)
    return half + half.T


def test_one_random_sign_probe_is_exact_for_a_diagonal_hessian():
    loss, leaves = quadratic(torch.diag(torch.tensor([1.0, 2, 3, -4, 0.5]).double()), [3, 2])
    np.testing.assert_allclose(hutchinson_samples(loss, leaves, [7]), [[6, -3.5]], rtol=1e-14)


def test_the_mean_is_unbiased_and_the_variance_is_that_of_the_formula():
    sizes, matrix = [4, 3, 5], symmetric(12)
    loss, leaves = quadratic(matrix, sizes)
    samples = hutchinson_samples(loss, leaves, range(6000))
    # Var X_g = 2‖offdiag H_gg‖² + ‖H_g,¬g‖²
    start, variances, traces = 0, [], []
    for size in sizes:
        rows = matrix[start : start + size]
        block = rows[:, start : start + size]
        inside = block.square().sum() - block.diagonal().square().sum()
        outside = rows.square().sum() - block.square().sum()
        variances.append(float(2 * inside + outside))
        traces.append(float(block.trace()))
        start += size
    error = np.sqrt(np.array(variances) / len(samples))
    assert (np.abs(samples.mean(0) - traces) < 4.5 * error).all()
    np.testing.assert_allclose(samples.var(0, ddof=1), variances, rtol=0.1)


def test_the_layers_of_one_probe_add_up_to_the_whole_quadratic_form():
    matrix = symmetric(9)
    loss, leaves = quadratic(matrix, [4, 5])
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        z = torch.cat([rademacher(w.shape, generator, w) for w in leaves])
        total = hutchinson_samples(loss, leaves, [seed]).sum()
        assert total == pytest.approx(float(z @ matrix @ z), rel=1e-12)


def test_splitting_the_seeds_changes_nothing():
    loss, leaves = quadratic(symmetric(9), [4, 5])
    whole = hutchinson_samples(loss, leaves, range(6))
    parts = [hutchinson_samples(loss, leaves, part) for part in ([0, 1], [2], [3, 4, 5])]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_batch_of_losses_is_refused():
    loss, leaves = quadratic(symmetric(2), [2])
    with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(3,\)"):
        hutchinson_samples(loss.expand(3), leaves, [0])


# --- a residual network against its dense Hessian -----------------------------------------------


def examples(task: TinyTask) -> tuple[Tensor, Tensor]:
    return task.batch("train", torch.arange(task.num_examples))


def samples_of(task: TinyTask, estimator: str, seeds: Sequence[int]) -> np.ndarray:
    """Samples of the *mean* loss's traces over all examples at once."""
    model, batch = task.model(), examples(task)
    weights = weights_of(model, LAYERS)
    with differentiable(model, weights):
        if estimator == "hutchinson":
            return hutchinson_samples(task.losses(model, batch).mean(), weights, seeds)
        outputs, factors = task.curvature(model, batch)
        return gauss_newton_samples(outputs, factors, weights, seeds) / task.num_examples


def test_on_a_relu_network_the_gauss_newton_blocks_are_the_hessian_s():
    model, (x, y) = TINY.model(), examples(TINY)
    for layer in LAYERS:
        hessian = mean_loss_hessian(model, [layer], x, y)
        torch.testing.assert_close(mean_loss_gauss_newton(model, [layer], x), hessian)


@pytest.mark.parametrize("estimator", ["hutchinson", "gauss_newton"])
def test_on_a_relu_network_both_estimators_meet_the_exact_blocks(estimator):
    model, (x, y) = TINY.model(), examples(TINY)
    exact = block_traces(mean_loss_hessian(model, LAYERS, x, y), weights_of(model, LAYERS))
    assert_mean(samples_of(TINY, estimator, range(1500)), exact)


def test_each_hutchinson_sample_is_its_probe_s_quadratic_form():
    model, (x, y) = TINY.model(), examples(TINY)
    weights = weights_of(model, LAYERS)
    matrix = mean_loss_hessian(model, LAYERS, x, y)
    samples = samples_of(TINY, "hutchinson", range(5))
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        z = torch.cat([rademacher(w.shape, generator, w).flatten() for w in weights])
        products = (z * (matrix @ z)).split([w.numel() for w in weights])
        np.testing.assert_allclose(samples[seed], [float(p.sum()) for p in products], rtol=1e-9)


def test_hutchinson_agrees_with_differences_of_the_gradient():
    task = TinyTask("silu", dtype=torch.float64)
    model, batch = task.model(), examples(task)
    weights = weights_of(model, LAYERS)
    generator = torch.Generator().manual_seed(4)
    z = [rademacher(w.shape, generator, w) for w in weights]

    def gradient(step: float) -> tuple[Tensor, ...]:
        moved = task.model()
        parameters = weights_of(moved, LAYERS)
        with differentiable(moved, parameters):
            for parameter, direction in zip(parameters, z, strict=True):
                parameter.data += step * direction
            return torch.autograd.grad(task.losses(moved, batch).mean(), parameters)

    difference = [(a - b) / 2e-5 for a, b in zip(gradient(1e-5), gradient(-1e-5), strict=True)]
    expected = [float((v * hv).sum()) for v, hv in zip(z, difference, strict=True)]
    np.testing.assert_allclose(samples_of(task, "hutchinson", [4])[0], expected, rtol=1e-6)


def test_on_a_silu_network_hutchinson_is_right_and_gauss_newton_is_something_else():
    task = TinyTask("silu", dtype=torch.float64)
    model, (x, y) = task.model(), examples(task)
    weights = weights_of(model, LAYERS)
    exact = block_traces(mean_loss_hessian(model, LAYERS, x, y), weights)
    other = block_traces(mean_loss_gauss_newton(model, LAYERS, x), weights)
    relative = ((other - exact) / exact).abs()
    assert (relative[:2] > 0.05).all()
    assert relative[2] < 1e-9  # the last layer is linear in its weights whatever comes before
    assert_mean(samples_of(task, "hutchinson", range(1500)), exact)
    assert_mean(samples_of(task, "gauss_newton", range(1500)), other)


@pytest.mark.parametrize("weights", [None, torch.linspace(0, 2, 12, dtype=torch.float64)])
def test_gauss_newton_and_the_residual_add_up_to_the_hessian(weights):
    task = TinyTask("silu", dtype=torch.float64)
    model, batch = task.model().eval(), examples(task)
    leaves = weights_of(model, LAYERS)
    counts = torch.ones(12, dtype=torch.float64) if weights is None else weights
    loss = (task.losses(model, batch) * counts).sum()
    rest, outputs = residual_loss(lambda: task.losses(model, batch), model, weights)
    p = outputs.detach().softmax(1)
    inner = counts[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])

    def product(value: Tensor, z: Sequence[Tensor]) -> Tensor:
        gradient = torch.autograd.grad(value, leaves, create_graph=True)
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(gradient, leaves, z, retain_graph=True)]
        )

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        z = [rademacher(w.shape, generator, w) for w in leaves]
        u = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, leaves, u, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, u, z)
        image = (inner @ pushed[:, :, None])[:, :, 0]
        back = torch.autograd.grad(outputs, leaves, image, retain_graph=True)
        gauss_newton = torch.cat([g.flatten() for g in back])
        torch.testing.assert_close(product(loss, z), gauss_newton + product(rest, z))


def test_a_network_that_runs_twice_or_not_at_all_has_no_residual():
    task = TinyTask("silu")
    model, batch = task.model().eval(), examples(task)
    once = task.losses(model, batch).detach()
    assert residual_loss(lambda: once, model) is None
    twice = lambda: task.losses(model, batch) + task.losses(model, batch)  # noqa: E731
    assert residual_loss(twice, model) is None
    assert not model._forward_hooks


def test_adding_a_constant_to_the_loss_changes_nothing():
    loss, leaves = quadratic(symmetric(5), [2, 3])
    np.testing.assert_array_equal(
        hutchinson_samples(loss + 100, leaves, [0]), hutchinson_samples(loss, leaves, [0])
    )


# --- weights that do not matter -----------------------------------------------------------------


def test_unused_weights_have_trace_zero():
    used, unused = leaf(3, seed=1), leaf(4, seed=2)
    outputs = (random(5, 3) @ used)[:, None]
    loss = outputs.square().sum()
    hutchinson = hutchinson_samples(loss, [unused, used], [0, 1])
    gauss_newton = gauss_newton_samples(outputs, [identity_factor(outputs)], [unused, used], [0, 1])
    for samples in (hutchinson, gauss_newton):
        assert samples[:, 0].tolist() == [0, 0]
        assert (samples[:, 1] > 0).all()


def test_an_unused_weight_draws_no_probe_from_the_others():
    used, unused = leaf(3, seed=1), leaf(4, seed=2)
    loss = (random(5, 3) @ used).square().sum()
    with_it = hutchinson_samples(loss, [unused, used], [0])[:, 1:]
    np.testing.assert_array_equal(with_it, hutchinson_samples(loss, [used], [0]))


def test_a_loss_that_uses_no_weight_at_all_has_trace_zero():
    unused, outputs = leaf(4), random(5, 3)
    assert not hutchinson_samples(outputs.sum(), [unused], [0]).any()
    factor = identity_factor(outputs)
    assert not gauss_newton_samples(outputs, [factor], [unused], [0]).any()


def test_a_loss_that_is_linear_in_a_weight_has_trace_zero():
    straight, curved = leaf(4, seed=1), leaf(3, seed=2)
    loss = straight.sum() + curved.square().sum()
    np.testing.assert_allclose(hutchinson_samples(loss, [straight, curved], [0]), [[0, 6]])
    assert not hutchinson_samples(straight.sum(), [straight], [0]).any()


# --- probes -------------------------------------------------------------------------------------


def test_probes_are_signs_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    z = rademacher((400,), torch.Generator().manual_seed(0), torch.zeros(1))
    assert set(z.tolist()) == {-1, 1}
    assert abs(float(z.sum())) < 4.5 * 20
    assert torch.equal(torch.get_rng_state(), state)


def test_every_seed_batch_and_probe_has_its_own_seed():
    triples = [(s, b, p) for s in range(12) for b in range(12) for p in range(12)]
    seeds = {probe_seed(*triple) for triple in triples}
    assert len(seeds) == len(triples)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert probe_seed(1, 2, 3) == probe_seed(1, 2, 3)
