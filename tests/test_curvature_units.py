"""Units of work, their reduction, and the errors that an estimate reports."""

import gc
import weakref
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import LAYERS, TinyTask, block_traces, mean_loss_hessian

from hawq.curvature import (
    NonFiniteTraceError,
    Reducer,
    TracePlan,
    UnitSums,
    estimate_traces,
    run_unit,
)
from hawq.curvature.estimate import summarize
from hawq.curvature.network import weights_of

TASK = TinyTask(dtype=torch.float64, num_examples=10)
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


def run_all(task, plan):
    model = task.model()
    return [run_unit(task, model, plan, i) for i in range(plan.num_units)]


def assert_same(a, b):
    """Bit for bit."""
    for name in ("trace", "probe_error", "data_error"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    assert (a.num_probes, a.num_examples) == (b.num_probes, b.num_examples)


@pytest.fixture(scope="module")
def finished():
    return run_all(TASK, PLAN)


@pytest.mark.parametrize("estimator", ["gauss_newton", "hutchinson"])
def test_an_estimate_lies_within_its_errors_of_the_exact_traces(estimator):
    # Ten examples in batches of four, four and two: the last one weighs half as much.
    plan = replace(PLAN, estimator=estimator, rtol=1e-9, max_probes=500)
    estimate = estimate_traces(TASK, TASK.model(), plan)
    model, (x, y) = TASK.model(), TASK.batch("train", torch.arange(10))
    exact = block_traces(mean_loss_hessian(model, LAYERS, x, y), weights_of(model, LAYERS)).numpy()
    assert (np.abs(estimate.trace - exact) < 4.5 * estimate.probe_error).all()
    assert (estimate.probe_error < 0.15 * exact).all()
    assert estimate.num_probes == 500
    assert estimate.num_examples == 10


def test_examples_weigh_the_same_in_a_smaller_last_batch():
    sums = [UnitSums.of(j, n, np.full((2, 1), n * 3.0)) for j, n in enumerate((4, 4, 2))]
    estimate = summarize(sums, ["w"])
    assert estimate.trace.tolist() == [3]
    assert estimate.data_error.tolist() == [0]
    sums[2] = UnitSums.of(2, 2, np.full((2, 1), 2 * 13.0))
    assert summarize(sums, ["w"]).trace.tolist() == [5]


def test_a_unit_depends_on_its_index_alone(finished):
    model = TASK.model()
    for index in (7, 2, 2):
        again = run_unit(TASK, model, PLAN, index)
        np.testing.assert_array_equal(again.total, finished[index].total)
        np.testing.assert_array_equal(again.square, finished[index].square)


def test_a_fresh_probe_is_drawn_for_every_batch():
    # The same example in both batches: with one probe for both, their sums would be equal.
    plan = replace(PLAN, examples=(0, 0), batch_size=1)
    first, second = (run_unit(TASK, TASK.model(), plan, i) for i in range(2))
    assert not np.isclose(first.total, second.total).any()


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


def test_the_plan_stops_at_its_error_and_not_before():
    estimate = estimate_traces(TASK, TASK.model(), PLAN)
    assert (estimate.probe_error <= PLAN.rtol * estimate.trace).all()
    shorter = replace(PLAN, max_probes=estimate.num_probes - PLAN.probes_per_unit)
    before = estimate_traces(TASK, TASK.model(), shorter)
    assert not before.converged(PLAN.rtol).all()


def test_the_plan_stops_at_its_last_probe():
    plan = replace(PLAN, rtol=0.0, max_probes=11)
    assert plan.num_units == 6
    assert estimate_traces(TASK, TASK.model(), plan).num_probes == 8


def test_a_small_error_from_two_probes_is_not_believed():
    # Equal samples by luck, in two batches: one degree of freedom each.
    plan = replace(PLAN, layers=("conv1",), batch_size=5, probes_per_unit=2)
    reducer = Reducer(plan)
    for index in range(2):
        reducer.add(index, UnitSums.of(index, 5, np.ones((2, 1))))
    assert reducer.estimate.probe_error.tolist() == [0]
    assert not reducer.finished
    for index in range(2, 12):
        reducer.add(index, UnitSums.of(index % 2, 5, np.ones((2, 1))))
    assert reducer.finished


def test_nothing_is_missing_once_it_is_finished(finished):
    reducer = Reducer(PLAN)
    assert len(reducer.missing) == PLAN.num_units
    for index, unit in enumerate(finished):
        reducer.add(index, unit)
    assert list(reducer.missing) == []


def test_convergence_may_be_relative_to_all_traces_together():
    sums = [UnitSums.of(j, 1, np.array([[10.0, 1.0], [10.0, 0.0]])) for j in range(2)]
    estimate = summarize(sums, ["large", "small"])
    assert estimate.converged(0.1).tolist() == [True, False]
    assert estimate.converged(0.1, atol=0.1).tolist() == [True, True]


# --- errors, by Monte Carlo ---------------------------------------------------------------------


def synthetic(generator, sizes, batch_means, num_probes, noise):
    """Units of batches whose mean traces are given, with normal probe noise."""
    units = []
    for j, (n, mean) in enumerate(zip(sizes, batch_means, strict=True)):
        samples = n * (mean + noise * generator.standard_normal((num_probes, 1)))
        units.append(UnitSums.of(j, n, samples))
    return summarize(units, ["w"])


def test_the_probe_error_is_calibrated():
    generator = np.random.default_rng(0)
    sizes, means = [8, 8, 8, 8, 3], np.array([1.0, 2, 5, 3, 4])
    exact = np.average(means, weights=sizes)
    estimates = [synthetic(generator, sizes, means, 6, 2.0) for _ in range(800)]
    deviations = np.array([e.trace[0] - exact for e in estimates])
    reported = np.mean([e.probe_error[0] ** 2 for e in estimates])
    assert abs(deviations.mean()) < 4.5 * deviations.std() / 800**0.5
    assert deviations.var() == pytest.approx(reported, rel=0.2)


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_data_error_is_calibrated_whatever_the_probes_add(noise):
    # Examples with traces of mean 3 and deviation 2; each run draws its own.
    generator = np.random.default_rng(1)
    sizes = [8] * 15 + [4]
    estimates = []
    for _ in range(800):
        means = np.array([generator.normal(3, 2, n).mean() for n in sizes])
        estimates.append(synthetic(generator, sizes, means, 8, noise))
    exact = 2.0**2 / sum(sizes)
    reported = np.mean([e.data_error[0] ** 2 for e in estimates])
    assert reported == pytest.approx(exact, rel=0.15)
    total = np.var([e.trace[0] for e in estimates])
    both = reported + np.mean([e.probe_error[0] ** 2 for e in estimates])
    assert total == pytest.approx(both, rel=0.2)


def test_without_spread_between_examples_the_data_error_is_no_larger_than_the_probes():
    generator = np.random.default_rng(2)
    estimate = synthetic(generator, [8] * 10, np.full(10, 3.0), 50, 1.0)
    assert estimate.data_error[0] <= 2 * estimate.probe_error[0]


# --- what must be as before ---------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["gauss_newton", "hutchinson"])
@pytest.mark.parametrize("network", ["relu", "dropout"])
def test_a_unit_leaves_modes_flags_gradients_and_generators_as_they_were(estimator, network):
    task = TinyTask(network)
    model = task.model().train()
    layers = LAYERS if network == "relu" else ("2",)
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    run_unit(task, model, replace(PLAN, layers=layers, estimator=estimator), 0)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [
        p is not frozen for p in model.parameters()
    ]
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


def test_training_mode_and_frozen_weights_change_no_trace():
    expected = run_unit(TASK, TASK.model().eval(), PLAN, 0)
    model = TASK.model().train()
    model.conv2.weight.requires_grad_(False)  # frozen in training, quantized all the same
    np.testing.assert_array_equal(run_unit(TASK, model, PLAN, 0).total, expected.total)


def test_flags_come_back_after_an_error():
    model = TASK.model().train()
    with pytest.raises(RuntimeError):
        run_unit(TinyTask(), model, PLAN, 0)  # float32 images, float64 weights
    assert all(p.requires_grad for p in model.parameters())
    assert model.training


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


@pytest.mark.parametrize("estimator", ["gauss_newton", "hutchinson"])
def test_no_graph_outlives_its_unit(estimator):
    task = Watched()
    model = task.model()
    task.seen.clear()
    gc.disable()  # a graph that needs the collector is a leak until it runs
    try:
        for index in range(3):
            run_unit(task, model, replace(PLAN, estimator=estimator), index)
        assert len(task.seen) == 3
        assert all(reference() is None for reference in task.seen)
    finally:
        gc.enable()


# --- refusals -----------------------------------------------------------------------------------


def test_an_unused_layer_has_trace_zero_and_no_error():
    task = TinyTask("lazy")
    plan = replace(PLAN, layers=("unused", "used"))
    for estimator in ("gauss_newton", "hutchinson"):
        estimate = estimate_traces(task, task.model(), replace(plan, estimator=estimator))
        assert estimate.trace[0] == estimate.probe_error[0] == estimate.data_error[0] == 0
        assert estimate.trace[1] > 0


@pytest.mark.parametrize(
    ("estimator", "what"), [("gauss_newton", "network's output"), ("hutchinson", "loss")]
)
def test_a_network_that_returns_nan_is_refused(estimator, what):
    model = TASK.model()
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    with pytest.raises(NonFiniteTraceError, match=f"the {what} must be finite, got NaN .* batch 1"):
        run_unit(TASK, model, replace(PLAN, estimator=estimator), 1)


def test_a_trace_that_is_not_finite_is_refused_by_name():
    good = UnitSums.of(0, 4, np.ones((2, 3)))
    bad = UnitSums.of(1, 4, np.array([[1, np.nan, 1], [1, 1, 1]]))
    with pytest.raises(NonFiniteTraceError, match="the trace of conv2 must be finite"):
        summarize([good, bad], LAYERS)


def test_gauss_newton_needs_the_task_s_factors():
    task = replace(TASK, factored=False)
    with pytest.raises(ValueError, match=r"needs the task's curvature\(\), got None"):
        run_unit(task, task.model(), PLAN, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"probes_per_unit": 1},
            "probes_per_unit must be at least 2 .* got 1",
        ),
        ({"max_probes": 3}, "got 4 and 3"),
        ({"batch_size": 10}, "at least 2 batches, got 10 examples and batches of 10"),
    ],
)
def test_a_plan_whose_errors_could_not_be_known_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)


def test_an_estimate_of_one_batch_or_of_uneven_probes_is_refused():
    one = UnitSums.of(0, 4, np.ones((2, 1)))
    with pytest.raises(ValueError, match="got 1 batches"):
        summarize([one], ["w"])
    with pytest.raises(ValueError, match=r"2 batches with \[2, 3\] probes"):
        summarize([one, UnitSums.of(1, 4, np.ones((3, 1)))], ["w"])
