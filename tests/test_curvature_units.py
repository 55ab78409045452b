"""Units of work, any order and size of them, their estimates against dense matrices, the stops."""

import gc
import weakref
from dataclasses import replace
from functools import cache
from typing import ClassVar, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import LAYERS, TinyTask, mean_loss_gauss_newton, mean_loss_hessian

from hawq.curvature import (
    EstimatorName,
    NonFiniteTraceError,
    Population,
    Reducer,
    Site,
    TracePlan,
    UnitSums,
    draw_examples,
    estimate_traces,
    run_unit,
)
from hawq.curvature.sites import activation_sites, weight_sites

TASK = TinyTask(dtype=torch.float64, num_examples=10)
SMOOTH = TinyTask("silu", dtype=torch.float64, num_examples=10)
PLAN = TracePlan(
    layers=LAYERS,
    estimator="gauss_newton",
    split="train",
    examples=tuple(range(10)),
    batch_size=4,
    probes_per_unit=4,
    rtol=0.1,
    max_probes=400,
    seed=0,
)
ESTIMATORS = get_args(EstimatorName)
EXACT = ("exact_gauss_newton", "fisher")
SAMPLED = tuple(name for name in ESTIMATORS if name not in EXACT)
# Ten examples in batches of four, four and two: the last one weighs half as much. Two of them, with
# large traces, count for most.
WEIGHTS = tuple(4.2 if n in {4, 8} else 0.2 for n in range(10))


def run_all(task, plan):
    model = task.model()
    return [run_unit(task, model, plan, i) for i in range(plan.num_units)]


def assert_same(a, b):
    """Bit for bit."""
    for name in ("trace", "probe_error", "data_error", "share_probe_error", "share_data_error"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.num_probes, a.num_examples) == (b.num_probes, b.num_examples)


def by_channel(plan: TracePlan, task: TinyTask = TASK) -> TracePlan:
    return replace(plan, sites=weight_sites(task.model(), LAYERS), granularity="channel")


def of_activations(plan: TracePlan, task: TinyTask = TASK) -> TracePlan:
    model = task.model()
    batch = task.batch("train", torch.arange(1))
    sites = activation_sites(model, LAYERS, lambda: task.losses(model, batch))
    return replace(plan, sites=sites, subject="activations", granularity="channel")


@pytest.fixture(scope="module")
def finished():
    return run_all(TASK, PLAN)


# --- against dense matrices -----------------------------------------------------------------------


@cache
def dense(network: str, matrix: str) -> np.ndarray:
    """Each example's traces of layers and channels, shape (10, G)."""
    task = TinyTask(network, dtype=torch.float64)
    model, rows = task.model(), []
    for n in range(10):
        x, y = task.batch("train", torch.tensor([n]))
        groups = []
        for name in LAYERS:
            weight = model.get_submodule(name).weight
            if matrix == "fisher":
                loss = task.losses(model.eval(), (x, y)).sum()
                diagonal = torch.autograd.grad(loss, weight)[0].square().flatten()
            elif matrix == "hessian":
                diagonal = mean_loss_hessian(model, [name], x, y).diagonal()
            else:
                diagonal = mean_loss_gauss_newton(model, [name], x).diagonal()
            groups.append(diagonal.view(len(weight), -1).sum(1))
        rows.append(torch.cat([torch.stack([g.sum() for g in groups]), *groups]))
    return torch.stack(rows).numpy()


def matrix_of(estimator: str) -> str:
    """What an estimator is of, on a network that is smooth."""
    if estimator == "fisher":
        return "fisher"
    smooth = ("hutchinson", "finite_difference", "corrected_gauss_newton")
    return "hessian" if estimator in smooth else "gauss_newton"


def weighted(plan: TracePlan) -> TracePlan:
    return replace(plan, weights=WEIGHTS, population=Population(40, 100))


@pytest.mark.parametrize("weighting", [lambda plan: plan, weighted], ids=["alike", "weighted"])
@pytest.mark.parametrize("network", ["relu", "silu"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_traces_of_layers_and_channels_are_those_of_the_dense_matrix(estimator, network, weighting):
    task = TinyTask(network, dtype=torch.float64)
    plan = weighting(by_channel(replace(PLAN, estimator=estimator, stop="count", leading=1)))
    plan = replace(plan, probes_per_unit=60, max_probes=120)
    estimate = estimate_traces(task, task.model(), plan)
    expected = np.average(
        dense(network, matrix_of(estimator)), axis=0, weights=plan.weights or None
    )
    if estimator in EXACT:
        np.testing.assert_allclose(estimate.trace, expected, rtol=1e-9, atol=1e-12)
        assert not estimate.probe_error.any()
        assert estimate.num_probes == 0
    else:
        # Differences of gradients cross a kink now and then, which is no error of the probes.
        kinks = 0.02 if (estimator, network) == ("finite_difference", "relu") else 1e-9
        deviation = np.abs(estimate.trace - expected)
        assert (deviation < 4.5 * estimate.probe_error + kinks * np.abs(expected).max()).all()
        assert (estimate.probe_error[:3] < 0.35 * np.abs(expected[:3])).all()
        assert estimate.num_probes == 120
    assert estimate.num_examples == 10


@pytest.mark.parametrize("estimator", EXACT)
def test_the_data_error_of_an_exact_estimate_is_that_of_a_mean(estimator):
    values = dense("relu", matrix_of(estimator))
    plan = by_channel(replace(PLAN, estimator=estimator))
    estimate = estimate_traces(TASK, TASK.model(), plan)
    np.testing.assert_allclose(estimate.data_error, values.std(0, ddof=1) / 10**0.5, rtol=1e-8)
    total = values[:, :3].sum(1, keepdims=True)
    share = values.mean(0) / total.mean()
    residual = (values - share * total).std(0, ddof=1) / 10**0.5 / total.mean()
    np.testing.assert_allclose(estimate.share_error, residual, rtol=1e-6, atol=1e-9)


def test_a_unit_knows_the_inclusion_probabilities_of_its_draw():
    task = TinyTask(dtype=torch.float64, num_examples=40)
    everyone = tuple(range(40))
    draw = draw_examples(torch.linspace(0, 3, 40).exp(), 10, 0)
    assert max(draw.weights) > 2
    plan = replace(
        by_channel(PLAN, task),
        estimator="exact_gauss_newton",
        examples=draw.examples,
        weights=draw.weights,
        population=Population(40, 100),
        batch_size=5,
    )
    one_by_one = replace(plan, examples=everyone, weights=(), population=None, batch_size=1)
    weights = np.array(draw.weights)
    own = np.stack([run_unit(task, task.model(), one_by_one, n).total for n in draw.examples])
    for index in (0, 1):
        part = slice(5 * index, 5 * index + 5)
        expected = UnitSums.of_examples(
            index,
            own[None, part],
            3,
            weights=weights[part],
            excluded=1 - 10 / (40 * weights[part]),
            num_probes=0,
        )
        unit = run_unit(task, task.model(), plan, index)
        np.testing.assert_allclose(unit.sums, expected.sums, rtol=1e-9, atol=1e-12)
        assert unit.drawn == pytest.approx(expected.drawn)


def test_a_plan_that_draws_everyone_has_no_data_error():
    for estimator in EXACT:
        plan = replace(PLAN, estimator=estimator, population=Population(10, 10))
        estimate = estimate_traces(TASK, TASK.model(), plan)
        assert (estimate.data_error < 1e-7 * estimate.trace).all()


@pytest.mark.parametrize("estimator", ["exact_gauss_newton", "mixed_gauss_newton"])
def test_a_floor_leaves_out_less_than_it_says(estimator):
    plan = replace(PLAN, estimator=estimator, stop="count", max_probes=4, leading=3)
    full = estimate_traces(TASK, TASK.model(), plan).trace
    floored = estimate_traces(TASK, TASK.model(), replace(plan, floor=0.1)).trace
    assert (floored < full).all()
    assert (floored > 0.5 * full).all()


# --- units --------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_unit_depends_on_its_index_alone(estimator):
    plan = by_channel(replace(PLAN, estimator=estimator, max_probes=12))
    units = run_all(TASK, plan)
    model = TASK.model()
    for index in (2, 1, 1, len(units) - 1):
        again = run_unit(TASK, model, plan, index)
        np.testing.assert_array_equal(again.sums, units[index].sums)
        for name in ("batch", "num_examples", "num_probes", "drawn"):
            np.testing.assert_equal(getattr(again, name), getattr(units[index], name))


def test_an_exact_plan_has_one_unit_a_batch_and_others_one_a_round_more():
    assert replace(PLAN, estimator="fisher").num_units == 3
    assert replace(PLAN, estimator="exact_gauss_newton", max_probes=1000).num_units == 3
    assert replace(PLAN, max_probes=11).num_units == 3 * 2


@pytest.mark.parametrize("estimator", SAMPLED)
def test_a_fresh_probe_is_drawn_for_every_batch_and_every_visit(estimator):
    # The same example in both batches: with one probe for both, their sums would be equal.
    plan = replace(PLAN, examples=(0, 0), batch_size=1, estimator=estimator)
    found = [run_unit(SMOOTH, SMOOTH.model(), plan, i).total for i in range(4)]
    for i in range(4):
        for j in range(i):
            assert not np.isclose(found[i], found[j], rtol=1e-6, atol=0).any()


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_order_of_units_gives_the_same_bits_and_the_same_stop(finished, random):
    expected = estimate_traces(TASK, TASK.model(), PLAN)
    order = list(range(len(finished)))
    random.shuffle(order)
    reducer = Reducer(PLAN)
    for index in order:
        reducer.add(index, finished[index])
    assert reducer.finished
    assert_same(reducer.estimate, expected)
    assert expected.num_probes < PLAN.max_probes


def test_a_unit_that_was_done_twice_counts_once(finished):
    reducer = Reducer(PLAN)
    for index, unit in enumerate(finished):
        reducer.add(index, unit)
        reducer.add(index, unit)
    assert_same(reducer.estimate, estimate_traces(TASK, TASK.model(), PLAN))


def test_only_complete_rounds_are_looked_at(finished):
    reducer = Reducer(PLAN)
    for index in (0, 1, 3, 4, 5):
        reducer.add(index, finished[index])
        assert reducer.estimate is None
    assert reducer.missing[0] == 2
    reducer.add(2, finished[2])
    assert reducer.estimate.num_probes == 8


# --- parts of a unit ------------------------------------------------------------------------------


@pytest.mark.parametrize("subject", [by_channel, of_activations])
@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_without_probes_the_parts_of_a_unit_add_up_to_it(estimator, subject, micro_batch):
    plan = weighted(subject(replace(PLAN, estimator=estimator)))
    model = TASK.model()
    for index in range(plan.num_units):
        whole = run_unit(TASK, model, plan, index)
        parts = run_unit(TASK, model, plan, index, micro_batch=micro_batch)
        np.testing.assert_allclose(parts.sums, whole.sums, rtol=1e-9, atol=1e-12)
        assert parts.drawn == pytest.approx(whole.drawn)


@pytest.mark.parametrize("estimator", SAMPLED)
def test_parts_of_a_unit_draw_probes_of_their_own_and_are_unbiased(estimator):
    # The same example twice: parts with the same probe would be equal, and their sum as noisy as
    # twice one of them.
    plan = replace(PLAN, examples=(1, 1, 1, 1), batch_size=2, estimator=estimator, leading=1)
    plan = replace(plan, probes_per_unit=300, max_probes=300, stop="count")
    model = SMOOTH.model()
    parts = [run_unit(SMOOTH, model, plan, i, micro_batch=1) for i in range(2)]
    reducer = Reducer(plan)
    for i, unit in enumerate(parts):
        reducer.add(i, unit)
    expected = dense("silu", matrix_of(estimator))[1, :3]
    estimate = reducer.estimate
    assert (np.abs(estimate.trace - expected) < 4.5 * estimate.probe_error + 1e-5).all()
    single = replace(plan, batch_size=1, examples=(1, 1))
    alone = estimate_traces(SMOOTH, model, single)
    # Four examples with probes of their own, against two.
    np.testing.assert_allclose(estimate.probe_error, alone.probe_error / 2**0.5, rtol=0.35)


def test_a_part_as_large_as_the_unit_is_the_unit():
    whole = run_unit(TASK, TASK.model(), PLAN, 0)
    for micro_batch in (4, 100):
        part = run_unit(TASK, TASK.model(), PLAN, 0, micro_batch=micro_batch)
        np.testing.assert_array_equal(part.sums, whole.sums)


# --- stops ----------------------------------------------------------------------------------------


def stopped(task=TASK, **changes):
    """The estimate where a plan stops, and the one of a round before."""
    plan = replace(by_channel(PLAN), granularity="layer", **changes)
    estimate = estimate_traces(task, task.model(), plan)
    before = replace(plan, stop="count", max_probes=estimate.num_probes - plan.probes_per_unit)
    return plan, estimate, estimate_traces(task, task.model(), before)


def test_the_plan_stops_at_its_error_and_not_before():
    plan, estimate, before = stopped()
    assert (estimate.probe_error <= plan.rtol * estimate.trace).all()
    assert not before.converged(plan.rtol).all()


def test_a_share_of_all_traces_may_be_added_to_the_tolerance():
    plan, estimate, before = stopped(atol=0.01)
    allowed = plan.rtol * estimate.trace + 0.01 * estimate.trace.sum()
    assert (estimate.probe_error <= allowed).all()
    assert not before.converged(plan.rtol, 0.01).all()
    assert estimate.num_probes < stopped()[1].num_probes


def test_it_may_stop_at_the_error_of_the_shares():
    plan, estimate, before = stopped(stop="shares", rtol=0.02)
    assert (estimate.share_probe_error <= plan.rtol).all()
    assert not (before.share_probe_error <= plan.rtol).all()
    assert not estimate.converged(plan.rtol).all()


def test_it_may_stop_where_the_order_of_average_traces_is_beyond_doubt():
    task = TinyTask("relu", dtype=torch.float64, num_examples=10)
    plan, estimate, before = stopped(task, stop="order", rtol=1e-9, probes_per_unit=2)
    elements = np.array(plan.elements)
    assert plan.elements == (54, 81, 48)
    assert estimate.ordered(elements)
    assert not before.ordered(elements) or before.num_probes * 3 < 10
    exact = dense("relu", "hessian").mean(0)[:3]
    np.testing.assert_array_equal(
        np.argsort(estimate.trace / elements), np.argsort(exact / elements)
    )


def test_it_may_go_on_to_its_last_probe():
    plan = replace(PLAN, stop="count", rtol=100.0, max_probes=11)
    assert plan.num_units == 6
    assert estimate_traces(TASK, TASK.model(), plan).num_probes == 8


def test_the_plan_stops_at_its_last_probe():
    plan = replace(PLAN, rtol=0.0, max_probes=11)
    assert plan.num_units == 6
    assert estimate_traces(TASK, TASK.model(), plan).num_probes == 8


@pytest.mark.parametrize("stop", ["error", "shares", "order", "count"])
def test_an_exact_plan_is_finished_with_its_last_batch(stop):
    plan = replace(by_channel(PLAN), estimator="exact_gauss_newton", stop=stop, rtol=1e-9)
    reducer = Reducer(plan)
    for index, unit in enumerate(run_all(TASK, plan)):
        assert not reducer.finished
        reducer.add(index, unit)
    assert reducer.finished


def test_a_small_error_from_two_probes_is_not_believed():
    # Equal samples by luck, in two batches: one degree of freedom each.
    plan = replace(PLAN, layers=("conv1",), batch_size=5, probes_per_unit=2)
    reducer = Reducer(plan)
    for index in range(2):
        reducer.add(index, UnitSums.of(index, 5, np.ones((2, 1)), 1))
    assert reducer.estimate.probe_error.tolist() == [0]
    assert not reducer.finished
    for index in range(2, 12):
        reducer.add(index, UnitSums.of(index % 2, 5, np.ones((2, 1)), 1))
    assert reducer.finished


def test_examples_that_are_seen_have_a_freedom_each():
    # Four examples with two probes: four degrees of freedom a visit.
    plan = replace(PLAN, estimator="mixed_gauss_newton", layers=("conv1",), probes_per_unit=2)
    plan = replace(plan, examples=(0, 1, 2, 3))
    reducer = Reducer(plan)
    about = {"weights": np.ones(4), "excluded": np.zeros(4), "num_probes": 2}
    for visit in range(3):
        assert not reducer.finished
        reducer.add(visit, UnitSums.of_examples(0, np.ones((2, 4, 1)), 1, **about))
    assert reducer.finished


def test_nothing_is_missing_once_it_is_finished(finished):
    reducer = Reducer(PLAN)
    assert len(reducer.missing) == PLAN.num_units
    for index, unit in enumerate(finished):
        reducer.add(index, unit)
    assert list(reducer.missing) == []


# --- names ----------------------------------------------------------------------------------------


def test_groups_have_names_and_elements():
    plan = by_channel(PLAN)
    assert plan.names[:4] == (*LAYERS, "conv1[0]")
    assert plan.names[-1] == "linear[3]"
    assert plan.num_sites == 3
    assert plan.elements == (54, 81, 48, 18, 18, 18, 27, 27, 27, 12, 12, 12, 12)
    assert PLAN.names == LAYERS
    assert of_activations(PLAN).elements[:4] == (50, 75, 12, 25)


# --- what must be as before -----------------------------------------------------------------------


@pytest.mark.parametrize("subject", [by_channel, of_activations])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_unit_leaves_modes_flags_gradients_and_generators_as_they_were(estimator, subject):
    if estimator == "finite_difference" and subject is of_activations:
        return  # is for weights
    task = TinyTask()
    model = task.model().train()
    frozen = model.conv1.weight
    frozen.requires_grad_(False)
    before = {name: b.clone() for name, b in model.state_dict().items()}
    state = torch.get_rng_state()
    run_unit(task, model, subject(replace(PLAN, estimator=estimator), task), 0)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [
        p is not frozen for p in model.parameters()
    ]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(b, before[name]) for name, b in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_mode_and_frozen_weights_change_no_trace(estimator):
    plan = replace(PLAN, estimator=estimator)
    expected = run_unit(TASK, TASK.model().eval(), plan, 0)
    model = TASK.model().train()
    model.conv2.weight.requires_grad_(False)  # frozen in training, quantized all the same
    np.testing.assert_array_equal(run_unit(TASK, model, plan, 0).sums, expected.sums)


def test_dropout_in_train_mode_is_switched_off():
    task = TinyTask("dropout", dtype=torch.float64)
    model = task.model().train()
    plan = replace(PLAN, layers=("2",), estimator="exact_gauss_newton")
    first, second = (run_unit(task, model, plan, 0) for _ in range(2))
    np.testing.assert_array_equal(first.sums, second.sums)


def test_flags_come_back_after_an_error():
    model = TASK.model().train()
    for estimator in ESTIMATORS:
        with pytest.raises(RuntimeError):  # float32 images, float64 weights
            run_unit(TinyTask(), model, replace(PLAN, estimator=estimator), 0)
        assert all(p.requires_grad for p in model.parameters())
        assert model.training
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Watched(TinyTask):
    """Remembers its losses and outputs weakly."""

    seen: ClassVar[list] = []

    def losses(self, model, batch):
        losses = super().losses(model, batch)
        self.seen.append(weakref.ref(losses))
        return losses

    def curvature(self, model, batch):
        outputs, factors = super().curvature(model, batch)
        self.seen.append(weakref.ref(outputs))
        return outputs, factors


@pytest.mark.parametrize("subject", [by_channel, of_activations])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_graph_outlives_its_unit(estimator, subject):
    if estimator == "finite_difference" and subject is of_activations:
        return  # is for weights
    task = Watched()
    model = task.model()
    plan = subject(replace(PLAN, estimator=estimator), task)
    task.seen.clear()
    gc.disable()  # a graph that needs the collector is a leak until it runs
    try:
        for index in range(3):
            run_unit(task, model, plan, index)
        assert len(task.seen) >= 3
        assert all(reference() is None for reference in task.seen)
    finally:
        gc.enable()


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_unused_layer_has_trace_zero_and_no_error(estimator):
    task = TinyTask("lazy")
    plan = replace(PLAN, layers=("unused", "used"), estimator=estimator, max_probes=8)
    estimate = estimate_traces(task, task.model(), plan)
    assert estimate.trace[0] == estimate.probe_error[0] == estimate.data_error[0] == 0
    assert estimate.trace[1] > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_network_that_returns_nan_is_refused(estimator):
    model = TASK.model()
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    what = "network's output" if matrix_of(estimator) == "gauss_newton" else "loss"
    with pytest.raises(NonFiniteTraceError, match=f"the {what} must be finite, got NaN .* batch 1"):
        run_unit(TASK, model, replace(PLAN, estimator=estimator), 1)


def test_a_channel_whose_trace_is_not_finite_is_refused_by_name():
    plan = by_channel(replace(PLAN, estimator="exact_gauss_newton"))
    reducer, units = Reducer(plan), run_all(TASK, plan)
    units[1].sums[:, plan.names.index("conv2[1]")] = np.nan
    for index in (0, 1):
        reducer.add(index, units[index])
    with pytest.raises(NonFiniteTraceError, match=r"the trace of conv2\[1\] must be finite"):
        reducer.add(2, units[2])


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e.endswith("gauss_newton")])
def test_gauss_newton_needs_the_task_s_factors(estimator):
    task = replace(TASK, factored=False)
    with pytest.raises(ValueError, match=r"needs the task's curvature\(\), got None"):
        run_unit(task, task.model(), replace(PLAN, estimator=estimator), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes_per_unit": 1}, r"probes_per_unit must be at least 2 .* got 1"),
        ({"max_probes": 3}, "got 4 and 3"),
        ({"batch_size": 10}, "at least 2 batches, .* got 10 examples and batches of 10"),
        ({"estimator": "fisher", "examples": (1,)}, "be 2 at least, got 1 examples"),
        ({"weights": (1.0,)}, "weights must be one an example, got 1 for 10 examples"),
        ({"weights": WEIGHTS}, "weights must come with the population"),
        ({"subject": "activations"}, "sites must be given for activations, and for channels"),
        ({"granularity": "channel"}, "sites must be given for activations, and for channels"),
    ],
)
def test_a_plan_whose_errors_could_not_be_known_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)


def test_an_estimator_that_sees_examples_needs_one_batch_only():
    plan = replace(PLAN, estimator="exact_gauss_newton", batch_size=10)
    assert plan.num_units == 1
    estimate = estimate_traces(TASK, TASK.model(), plan)
    assert (estimate.data_error > 0).all()


def test_a_plan_may_name_its_sites_differently_from_its_layers():
    plan = replace(PLAN, sites=(Site("a", 54, 3), Site("b", 81, 3), Site("c", 48, 4)))
    np.testing.assert_allclose(
        run_unit(TASK, TASK.model(), plan, 0).total, run_unit(TASK, TASK.model(), PLAN, 0).total
    )
    assert plan.names == ("a", "b", "c")
