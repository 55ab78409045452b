"""From what is asked for to a plan: the estimator, its passes, the examples and their floor."""

from dataclasses import dataclass
from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import LAYERS, NetTask, TinyTask, block_traces, mean_loss_hessian
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hawq.curvature import (
    EstimatorName,
    Population,
    estimate_traces,
    fitting_examples,
    output_curvature,
    plan_traces,
)
from hawq.curvature.choice import choose_passes
from hawq.curvature.columns import directions
from hawq.curvature.planning import look_here

SUBJECTS = ["weights", "activations"]
SEES_OUTPUTS = ("exact_gauss_newton", "mixed_gauss_newton")


def plan_of(task, layers=LAYERS, **settings):
    settings = {"num_examples": 12, "batch_size": 4} | settings
    return plan_traces(task, task.model(), layers, **settings)


@dataclass(frozen=True)
class ManyClasses(NetTask):
    """Softmax regression to 300 classes."""

    num_examples: int = 40
    dtype: torch.dtype = torch.float64
    scale: float = 1.0

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            network = nn.Sequential(nn.Flatten(), nn.Linear(50, 300)).to(self.dtype)
            nn.init.normal_(network[1].weight, std=self.scale / 50**0.5)
            return network


# --- the way to a Gauss–Newton trace --------------------------------------------------------------


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("estimator", ["auto", "gauss_newton"])
def test_few_classes_are_taken_one_by_one(estimator, subject):
    plan, reason = plan_of(TinyTask(), estimator=estimator, subject=subject)
    assert plan.estimator == "exact_gauss_newton"
    assert "3 directions an example hold its outputs' curvature" in reason
    start = "the Hessian's blocks are" if estimator == "auto" else "asked for"
    assert reason.startswith(start)


@pytest.mark.parametrize("estimator", ["auto", "gauss_newton"])
@pytest.mark.parametrize("rtol", [0.05, 0.2])
def test_many_classes_are_mixed_of_leading_directions_and_probes(estimator, rtol):
    task = ManyClasses()
    plan, reason = plan_of(task, ("1",), estimator=estimator, num_examples=40, rtol=rtol)
    assert plan.estimator == "mixed_gauss_newton"
    said = f"{plan.leading} leading directions an example and {plan.probes_per_unit} probes"
    if not plan.leading:
        said = f"{plan.probes_per_unit} probes an example and no direction by itself"
    assert said in reason
    estimate = estimate_traces(task, task.model(), plan)
    x, _ = task.batch("train", torch.arange(40))
    p = task.model()(x).detach().softmax(1)
    exact = float(((1 - p.square().sum(1)) * x.flatten(1).square().sum(1)).mean())
    assert abs(estimate.trace[0] - exact) < 4.5 * estimate.probe_error[0]
    # The forecast is good: one visit does, or two.
    assert estimate.num_probes <= 2 * plan.probes_per_unit
    assert estimate.converged(rtol).all()


def test_many_classes_of_which_the_network_doubts_few_are_taken_one_by_one():
    plan, reason = plan_of(ManyClasses(scale=10.0), ("1",), num_examples=40, rtol=1e-5)
    assert plan.estimator == "exact_gauss_newton"
    directions_held = float(reason.split("; ")[-1].split()[0])
    assert directions_held < 30


def test_a_tighter_error_is_planned_with_more_passes():
    passes = []
    for rtol in (0.3, 0.05, 0.01):
        plan, _ = plan_of(ManyClasses(), ("1",), num_examples=40, rtol=rtol)
        passes.append(plan.leading + plan.probes_per_unit)
    assert passes == sorted(passes)
    assert passes[0] < passes[-1]


def test_a_probe_counts_for_all_examples_together():
    # Ten times as many examples need a third of the passes each, or less, for the same error.
    few, _ = plan_of(ManyClasses(num_examples=60), ("1",), num_examples=60, rtol=0.01)
    many, _ = plan_of(ManyClasses(num_examples=600), ("1",), num_examples=600, rtol=0.01)
    assert 3 * (many.leading + many.probes_per_unit) < few.leading + few.probes_per_unit


def test_directions_of_examples_that_count_for_nothing_are_not_counted():
    task = TinyTask()
    model = task.model().eval()
    batch = task.batch("train", torch.arange(4))
    for weights, expected in (([1, 1, 1, 1], "3"), ([2, 2, 0, 0], "1.5")):
        choice = choose_passes(
            task,
            model,
            LAYERS,
            [batch],
            one=task.batch("train", torch.arange(1)),
            subject="weights",
            weights=torch.tensor(weights, dtype=torch.float64),
            floor=1e-6,
            num_examples=4,
            rtol=1e-3,
        )
        assert choice.estimator == "exact_gauss_newton"
        assert choice.reason.startswith(f"{expected} directions an example")


def test_outputs_without_any_curvature_need_no_direction():
    task = ManyClasses(scale=1e9)
    plan, reason = plan_of(task, ("1",), num_examples=40)
    assert plan.estimator == "exact_gauss_newton"
    assert "no curvature on these examples" in reason
    assert estimate_traces(task, task.model(), plan).trace.tolist() == [0]


class Widening(nn.Module):
    """A transposed convolution."""

    def __init__(self):
        super().__init__()
        self.wide, self.head = nn.ConvTranspose2d(2, 3, 3), nn.Linear(3 * 49, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wide(x).relu().flatten(1))


class Folded(nn.Module):
    """Folds ten tokens of every example into the batch, as window attention does."""

    def __init__(self, activation=F.relu):
        super().__init__()
        self.wide, self.head, self.activation = nn.Linear(5, 3), nn.Linear(30, 4), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(self.wide(x.reshape(-1, 5))).reshape(len(x), -1))


class Elsewhere(nn.Module):
    """Uses a layer's weight without running the layer."""

    def __init__(self):
        super().__init__()
        self.wide, self.head = nn.Linear(50, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.head((self.wide(x) + F.linear(x.flip(1), self.wide.weight)).relu())


def exact_traces(task: NetTask) -> np.ndarray:
    model, (x, y) = task.model(), task.batch("train", torch.arange(task.num_examples))
    layers = ("wide", "head")
    weights = [model.get_submodule(name).weight for name in layers]
    return block_traces(mean_loss_hessian(model, layers, x, y), weights).numpy()


def assert_right(task: NetTask, plan) -> None:
    estimate = estimate_traces(task, task.model(), plan)
    deviation = np.abs(estimate.trace - exact_traces(task))
    assert (deviation < 4.5 * estimate.probe_error + 1e-9).all()


@pytest.mark.parametrize("make", [Folded, Elsewhere])
@pytest.mark.parametrize("estimator", ["auto", "gauss_newton"])
def test_a_layer_that_cannot_be_taken_apart_by_example_gets_random_signs(make, estimator):
    task = NetTask(make=make, dtype=torch.float64)
    plan, reason = plan_of(task, ("wide", "head"), estimator=estimator, rtol=0.02)
    assert plan.estimator == "gauss_newton"
    assert "wide cannot be taken apart by example" in reason
    assert_right(task, plan)
    other, _ = plan_of(task, ("head",), estimator=estimator)
    assert other.estimator == "exact_gauss_newton"


def test_a_transposed_convolution_is_taken_apart_by_example():
    task = NetTask(make=Widening, dtype=torch.float64)
    plan, _ = plan_of(task, ("wide", "head"), rtol=0.02)
    assert plan.estimator == "exact_gauss_newton"
    assert_right(task, plan)


def test_a_smooth_network_that_folds_tokens_is_traced_right():
    task = NetTask(make=lambda: Folded(F.silu), dtype=torch.float64)
    plan, _ = plan_of(task, ("wide", "head"), rtol=0.02, max_probes=400)
    assert_right(task, plan)


@pytest.mark.parametrize("estimator", ["exact_gauss_newton", "mixed_gauss_newton"])
@pytest.mark.parametrize("make", [Widening, Folded, Elsewhere])
def test_an_estimator_that_must_take_layers_apart_is_right_or_refused(make, estimator):
    task = NetTask(make=make, dtype=torch.float64)
    try:
        plan, _ = plan_of(task, ("wide", "head"), estimator=estimator, rtol=0.05)
        estimate = estimate_traces(task, task.model(), plan)
    except ValueError:
        return
    deviation = np.abs(estimate.trace - exact_traces(task))
    assert (deviation < 4.5 * estimate.probe_error + 1e-9).all()


# --- operators without a second derivative --------------------------------------------------------


class OnceDoubled(torch.autograd.Function):
    """2x, from a kernel that says it has no second derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


class Once(nn.Module):
    """An operator that must not be differentiated twice, between two layers."""

    def __init__(self, operator=OnceDoubled.apply):
        super().__init__()
        self.wide, self.head, self.operator = nn.Conv2d(2, 3, 3), nn.Linear(27, 4), operator

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operator(self.wide(x)).flatten(1))


@pytest.mark.parametrize("factored", [True, False])
def test_an_operator_without_second_derivative_has_its_traces_all_the_same(factored):
    task = NetTask(make=Once, dtype=torch.float64, factored=factored)
    plan, reason = plan_of(task, ("wide", "head"), rtol=0.05)
    assert plan.estimator == ("exact_gauss_newton" if factored else "finite_difference")
    assert "once_differentiable" in reason
    doubled = NetTask(make=lambda: Once(lambda x: 2 * x), dtype=torch.float64)
    estimate = estimate_traces(task, task.model(), plan)
    deviation = np.abs(estimate.trace - exact_traces(doubled))
    assert (deviation < 4.5 * estimate.probe_error + 1e-6).all()


def test_activations_behind_such_an_operator_need_factors():
    task = NetTask(make=Once, dtype=torch.float64)
    plan, _ = plan_of(task, ("wide", "head"), subject="activations")
    assert plan.estimator == "exact_gauss_newton"
    doubled = NetTask(make=lambda: Once(lambda x: 2 * x), dtype=torch.float64)
    other, _ = plan_of(doubled, ("wide", "head"), subject="activations")
    np.testing.assert_allclose(
        estimate_traces(task, task.model(), plan).trace,
        estimate_traces(doubled, doubled.model(), other).trace,
    )
    unfactored = NetTask(make=Once, dtype=torch.float64, factored=False)
    with pytest.raises(ValueError, match="second derivative"):
        plan_of(unfactored, ("wide", "head"), subject="activations")


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("estimator", ["hutchinson", "corrected_gauss_newton"])
def test_a_hessian_vector_product_of_such_an_operator_is_refused(estimator, subject):
    task = NetTask(make=Once)
    with pytest.raises(ValueError, match=r"needs second derivatives, got none: .*OnceDoubled"):
        plan_of(task, ("wide", "head"), estimator=estimator, subject=subject)


# --- estimators by name ---------------------------------------------------------------------------


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("estimator", get_args(EstimatorName))
def test_an_estimator_that_is_named_is_taken(estimator, subject):
    if estimator == "finite_difference" and subject == "activations":
        with pytest.raises(ValueError, match="finite_difference is for weights"):
            plan_of(TinyTask(), estimator=estimator, subject=subject)
        return
    plan, reason = plan_of(TinyTask("silu"), estimator=estimator, subject=subject)
    # Plain Gauss–Newton goes the cheapest way.
    expected = "exact_gauss_newton" if estimator == "gauss_newton" else estimator
    assert plan.estimator == expected
    assert reason.startswith("asked for")
    estimate = estimate_traces(TinyTask("silu"), TinyTask("silu").model(), plan)
    assert np.isfinite(estimate.trace).all()


@pytest.mark.parametrize("estimator", [e for e in get_args(EstimatorName) if "newton" in e])
def test_gauss_newton_needs_factors(estimator):
    with pytest.raises(ValueError, match=f"{estimator} needs a task that gives the factors"):
        plan_of(TinyTask(factored=False), estimator=estimator)


@pytest.mark.parametrize("estimator", ["auto", "hutchinson", "finite_difference", "fisher"])
def test_others_need_none(estimator):
    task = TinyTask(factored=False)
    plan, _ = plan_of(task, estimator=estimator)
    assert plan.estimator == ("hutchinson" if estimator == "auto" else estimator)
    # Nobody can tell which examples matter: all count alike.
    assert set(plan.weights) == {1.0}
    assert plan.population == Population(12, 12)


def test_a_probe_s_number_is_the_caller_s_where_the_estimator_is():
    plan, _ = plan_of(
        ManyClasses(), ("1",), estimator="mixed_gauss_newton", probes_per_unit=7, max_probes=3
    )
    assert (plan.probes_per_unit, plan.max_probes) == (7, 7)


def test_settings_arrive_in_the_plan():
    asked = {"rtol": 0.3, "atol": 0.1, "stop": "shares", "seed": 5, "granularity": "channel"}
    plan, _ = plan_of(TinyTask(), split="search", **asked)
    assert {name: getattr(plan, name) for name in asked} == asked
    assert (plan.split, plan.layers) == ("search", LAYERS)
    assert [site.name for site in plan.sites] == list(LAYERS)
    activations, _ = plan_of(TinyTask(), subject="activations")
    assert [site.name for site in activations.sites] == ["conv1#0", "conv2#0", "linear#0"]


def test_layers_that_read_nothing_have_no_activations():
    with pytest.raises(ValueError, match="unused"):
        plan_of(TinyTask("lazy"), ("unused",), subject="activations")


# --- examples -------------------------------------------------------------------------------------


def test_examples_are_drawn_from_the_pool_and_know_where_they_come_from():
    task = TinyTask(num_examples=60)
    plan, _ = plan_of(task, pool=40, num_examples=10)
    assert len(plan.examples) == len(set(plan.examples)) == 10
    assert plan.population.pool == 40
    assert plan.population.size == 60
    assert plan.population.spread > 0
    everyone, _ = plan_of(task, num_examples=10)
    assert everyone.population.pool == 60
    again, _ = plan_of(task, pool=40, num_examples=10)
    assert again == plan
    other, _ = plan_of(task, pool=40, num_examples=10, seed=1)
    assert set(other.examples) != set(plan.examples)


def test_without_a_pool_examples_are_uniform_and_count_alike():
    task = TinyTask(num_examples=60)
    plan, _ = plan_of(task, pool=None, num_examples=10)
    assert set(plan.weights) == {1.0}
    assert (plan.population.pool, plan.population.size) == (10, 60)


def test_a_split_that_has_no_more_is_taken_whole():
    plan, _ = plan_of(TinyTask(num_examples=12), num_examples=500, pool=1000)
    assert sorted(plan.examples) == list(range(12))
    assert set(plan.weights) == {1.0}
    assert (plan.population.pool, plan.population.size) == (12, 12)


def test_a_plan_has_two_batches_where_it_has_two_examples():
    for estimator, num in (("hutchinson", 2), ("exact_gauss_newton", 3), ("fisher", 12)):
        plan, _ = plan_of(TinyTask(), estimator=estimator, num_examples=num, batch_size=100)
        assert plan.num_batches >= 2


def own_look(task: TinyTask, values: Tensor):
    """A look that remembers whom it was asked about."""
    asked: list[int] = []

    def look(examples):
        asked.extend(examples)
        return values[list(examples)].double()

    return look, asked


@pytest.mark.parametrize("estimator", get_args(EstimatorName))
def test_examples_are_sorted_by_curvature_only_for_estimators_that_see_them(estimator):
    task = TinyTask(num_examples=60)
    values = torch.rand(60, generator=torch.Generator().manual_seed(0))
    look, asked = own_look(task, values)
    plan, _ = plan_of(task, estimator=estimator, look=look, pool=50, num_examples=20)
    if estimator == "fisher":  # is not of the outputs' Hessian
        assert asked == []
        return
    assert len(asked) == len(set(asked)) == 50
    assert set(plan.examples) <= set(asked)
    own = values[list(plan.examples)].tolist()
    falling = own == sorted(own, reverse=True)
    assert falling == (plan.estimator in SEES_OUTPUTS)
    if not falling:  # in the order of the pool, which is random
        places = [asked.index(example) for example in plan.examples]
        assert places == sorted(places)
    # Weights go with their examples: the more curvature, the less a draw counts.
    order = np.argsort(own)
    assert (np.diff(np.array(plan.weights)[order]) <= 1e-12).all()
    assert max(plan.weights) > 2 * min(plan.weights)


def test_looking_here_is_the_outputs_curvature_in_eval_mode():
    task = TinyTask(num_examples=60)
    model = task.model().train()
    found = look_here(task, model, "train", 16)(list(range(60)))
    assert model.training
    expected = output_curvature(task, model.eval(), task.batch("train", torch.arange(60)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_planning_leaves_the_network_alone():
    for subject in SUBJECTS:
        for network in ("relu", "silu"):
            task = TinyTask(network)
            model = task.model().train()
            model.conv1.weight.requires_grad_(False)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            state = torch.get_rng_state()
            plan_traces(task, model, LAYERS, num_examples=12, batch_size=4, subject=subject)
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            assert all(module.training for module in model.modules())
            assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 6
            assert all(p.grad is None for p in model.parameters())
            assert torch.equal(torch.get_rng_state(), state)


# --- the floor ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False])
def test_the_floor_leaves_out_a_ten_thousandth_of_the_outputs_curvature_at_most(weighted):
    task = ManyClasses(scale=20.0, num_examples=60)
    plan, _ = plan_of(
        task, ("1",), num_examples=30, pool=60 if weighted else None, estimator="exact_gauss_newton"
    )
    model = task.model()
    batch = task.batch("train", torch.tensor(plan.examples))
    outputs, (factor,) = task.curvature(model, batch)
    weights = torch.tensor(plan.weights, dtype=torch.float64)[:, None]
    energy = weights * directions(outputs.detach(), factor).energy
    left_out = energy[energy <= plan.floor].sum()
    assert (energy > plan.floor).sum(1).double().mean() < 150  # most of 300 directions are
    assert 0 < left_out <= 1e-4 * energy.sum()
    # Whatever the spectrum: even if all of them were just below it.
    assert plan.floor * energy.numel() <= 1.001e-4 * energy.sum()
    full, _ = plan_of(task, ("1",), num_examples=30, pool=60 if weighted else None)
    estimate = estimate_traces(task, model, plan)
    x = batch[0].flatten(1)
    p = outputs.detach().softmax(1)
    exact = float((weights[:, 0] * (1 - p.square().sum(1)) * x.square().sum(1)).mean())
    # Of this network the trace is linear in the energies: x's norms differ by a factor of four.
    missing = 1 - estimate.trace[0] / exact
    assert 0 <= missing < 4e-4
    assert full.floor > 0


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", SUBJECTS)
def test_more_memory_fits_more_examples_and_double_backward_fewer(subject):
    task = TinyTask()
    model = task.model().eval()
    few = task.batch("train", torch.arange(4))

    def fitting(budget: float, estimator: EstimatorName = "exact_gauss_newton") -> int:
        return fitting_examples(
            task,
            model,
            list(LAYERS),
            few,
            4,
            estimator=estimator,
            subject=subject,
            budget_bytes=budget,
        )

    assert fitting(0) == 1
    many = fitting(1e8)
    assert many > 1000
    assert fitting(2e8) == pytest.approx(2 * many, rel=0.01)
    assert fitting(1e8, "hutchinson") == pytest.approx(many / 2, rel=0.01)
