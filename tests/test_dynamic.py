"""Estimates that move along with the weights: unbiased, cheap, with the error that they state."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import LAYERS, TinyTask, block_traces, mean_loss_gauss_newton
from torch import nn

from hawq.curvature import TracePlan, estimate_traces
from hawq.curvature.dynamic import reestimate_traces, shifted
from hawq.curvature.estimate import TraceEstimate
from hawq.curvature.gauss_newton import gauss_newton_samples
from hawq.curvature.network import differentiable, weights_of
from hawq.curvature.probes import probe_seed


def estimate(trace, probe_error, share_probe_error=0.0) -> TraceEstimate:
    trace, probe_error = np.asarray(trace, float), np.asarray(probe_error, float)
    zero = np.zeros_like(trace)
    return TraceEstimate(trace, probe_error, zero, 1, 1, zero + share_probe_error, zero)


# --- quadratic forms that drift -----------------------------------------------------------------


class Drifting:
    """Random symmetric matrices of J batches, that change a little with every step.

    Groups are repetitions of one experiment, each with its own probes.
    """

    def __init__(self, batches: int, steps: int, drift: float, size: int = 12) -> None:
        self.generator = np.random.default_rng(0)
        shape = (batches, size, size)

        def symmetric():
            half = self.generator.standard_normal(shape)
            return (half + half.transpose(0, 2, 1)) / 2

        self.matrices = [symmetric() + 2 * np.eye(size)]
        for _ in range(steps):
            self.matrices.append((1 + drift) * self.matrices[-1] + drift * symmetric())
        self.traces = [a.trace(axis1=1, axis2=2).sum() for a in self.matrices]
        self.products = 0

    def probes(self, num: int, repetitions: int):
        shape = (*self.matrices[0].shape[:2], num, repetitions)
        return self.generator.choice([-1.0, 1.0], shape)

    def samples(self, step: int, z):
        """zᵀAz, shape (J, K, G)."""
        self.products += z.shape[2]
        return np.einsum("jakg,jab,jbkg->jkg", z, self.matrices[step], z, optimize=True)

    def from_scratch(self, step: int, num: int, repetitions: int) -> TraceEstimate:
        samples = self.samples(step, self.probes(num, repetitions))
        error = np.sqrt((samples.var(1, ddof=1) / num).sum(0))
        return estimate(samples.sum(0).mean(0), error)

    def follow(self, previous: TraceEstimate, step: int, num: int) -> TraceEstimate:
        z = self.probes(num, len(previous.trace))
        return shifted(previous, self.samples(step - 1, z), self.samples(step, z))


@pytest.mark.parametrize(
    ("batches", "num", "drift"), [(8, 3, 0.1), (2, 5, 0.1), (1, 8, 0.1), (4, 4, 0.5)]
)
def test_a_chain_of_estimates_is_unbiased_and_states_its_error(batches, num, drift):
    problem = Drifting(batches, steps=4, drift=drift)
    now = problem.from_scratch(0, 16, 1000)
    for step in range(1, 5):
        now = problem.follow(now, step, num)
        deviation = now.trace - problem.traces[step]
        assert abs(deviation.mean()) < 4.5 * deviation.std() / 1000**0.5
        stated = np.sqrt(np.square(now.probe_error).mean())
        assert deviation.std() == pytest.approx(stated, rel=0.1)
        assert 0.9 < (np.abs(deviation) < 2 * now.probe_error).mean() < 0.98


def test_following_takes_fewer_products_than_starting_again():
    num, needed = 4, 24
    problem = Drifting(8, steps=6, drift=0.05)
    now = problem.from_scratch(0, needed, 500)
    products, worse = [], []
    for step in range(1, 7):
        problem.products = 0
        now = problem.follow(now, step, num)
        products.append(problem.products)
        again = problem.from_scratch(step, needed, 500)
        error, other = (np.std(e.trace - problem.traces[step]) for e in (now, again))
        worse.append(error > other)
    assert products == [2 * num] * 6
    assert 3 * products[0] <= needed
    assert not any(worse)


def test_the_coefficient_of_a_probe_does_not_bias_it():
    # Few skewed samples, of which coefficient and mean would depend on each other.
    generator = np.random.default_rng(0)
    noise = generator.exponential(size=(2, 5, 40000))
    before = noise**2
    after = before + generator.normal(size=before.shape) * noise
    moved = shifted(estimate(np.full(40000, 4.0), np.zeros(40000)), before, after)
    assert abs(moved.trace.mean() - 4) < 4.5 * moved.trace.std() / 200


def test_the_errors_of_shares_are_calibrated_too():
    generator = np.random.default_rng(1)
    mean, mix = np.array([3.0, 5.0, 9.0]), generator.normal(size=(3, 3))
    drift = np.array([1.1, 1.2, 1.05])
    shares, stated = [], []
    for _ in range(600):
        old = mean / 6 + generator.normal(size=(6, 20, 3)) @ mix / 4
        everything = old.sum(0)
        trace, cov = everything.mean(0), np.cov(everything.T) / 20
        share = trace / trace.sum()
        to_share = (np.eye(3) - share[:, None]) / trace.sum()
        share_error = np.sqrt(np.diag(to_share @ cov @ to_share.T))
        previous = estimate(trace, np.sqrt(np.diag(cov)), share_error)
        before = mean / 6 + generator.normal(size=(6, 4, 3)) @ mix / 4
        after = drift * before + generator.normal(size=(6, 4, 3)) / 10
        moved = shifted(previous, before, after)
        shares.append(moved.trace / moved.trace.sum())
        stated.append(moved.share_probe_error)
    exact = drift * mean / (drift * mean).sum()
    assert (np.abs(np.mean(shares, 0) - exact) < 4.5 * np.std(shares, 0) / 600**0.5).all()
    np.testing.assert_allclose(np.std(shares, 0), np.sqrt(np.square(stated).mean(0)), rtol=0.15)


# --- closed forms -------------------------------------------------------------------------------


def test_weights_that_did_not_move_add_their_probes_to_those_before():
    # a = σ²/(σ² + K σ²/K₀) makes t′ the mean of all K₀ + K probes, up to the spread of a.
    generator = np.random.default_rng(0)
    old, new = generator.normal(7, 1, (400, 30, 1)), generator.normal(7, 1, (400, 10, 1))
    previous = estimate(old.sum(0).mean(0), np.sqrt([400 / 30]))
    moved = shifted(previous, new, new)
    pooled = np.concatenate([old, new], 1).sum(0).mean(0)
    assert abs(moved.trace - pooled)[0] < 0.05 * previous.probe_error[0]
    np.testing.assert_allclose(moved.probe_error, np.sqrt(400 / 40), rtol=0.02)


def test_a_hessian_that_is_scaled_scales_what_was_known():
    before = np.random.default_rng(0).normal(5, 1, (3, 4, 2))
    previous = estimate([15.0, 14.0], [0, 0])
    moved = shifted(previous, before, 1.5 * before)
    np.testing.assert_allclose(moved.trace, [22.5, 21.0])
    np.testing.assert_allclose(moved.probe_error, 0, atol=1e-12)
    # Five times as much is no small move: unbiased still, with an error.
    leap = shifted(previous, before, 5 * before)
    assert (leap.probe_error > 0.5).all()
    assert (np.abs(leap.trace - 5 * previous.trace) < 4.5 * leap.probe_error).all()


def test_probes_that_say_nothing_about_each_other_leave_the_new_ones_alone():
    generator = np.random.default_rng(0)
    before, after = generator.normal(5, 1, (2, 300, 20, 1))
    moved = shifted(estimate([1500.0], [0.0]), before, after)
    scratch = np.sqrt((after.var(1, ddof=1) / 20).sum(0))
    np.testing.assert_allclose(moved.probe_error, scratch, rtol=0.02)
    assert abs(moved.trace - after.sum(0).mean(0))[0] < 0.1 * scratch[0]


@pytest.mark.parametrize("error", [0.0, 1.0])
def test_probes_that_are_exact_are_believed(error):
    # A diagonal Hessian; an unused layer.
    before, after = np.full((3, 4, 2), [2.0, 0.0]), np.full((3, 4, 2), [3.0, 0.0])
    moved = shifted(estimate([6.5, 0.0], [error, 0.0]), before, after)
    assert moved.trace.tolist() == [9, 0]
    assert moved.probe_error.tolist() == [0, 0]
    assert moved.share_probe_error.tolist() == [0, 0]
    nothing = shifted(estimate([0.0], [0.0]), before[..., 1:], after[..., 1:])
    assert nothing.share_probe_error.tolist() == [0]


# --- a part of the examples, each known exactly -------------------------------------------------


def test_seeing_a_part_of_the_examples_again_states_its_error():
    # 480 examples of which a third is seen, in batches of 5; another draw for every group.
    generator = np.random.default_rng(0)
    old = generator.exponential(size=480)
    new = old * (1.2 + 0.1 * generator.exponential(size=480))
    draws = np.stack([generator.permutation(480)[:160] for _ in range(1500)], 1)
    before, after = (
        np.stack([part.mean(0) for part in values[draws].reshape(32, 5, -1)])[None]
        for values in (old, new)
    )
    previous = estimate(np.full(1500, old.mean()), np.zeros(1500))
    moved = shifted(previous, before, after, unseen=1 - 160 / 480)
    deviation = moved.trace - new.mean()
    stated = np.sqrt(np.square(moved.probe_error).mean())
    assert abs(deviation.mean()) < 4.5 * deviation.std() / 1500**0.5
    assert deviation.std() == pytest.approx(stated, rel=0.1)
    assert 0.9 < (np.abs(deviation) < 2 * moved.probe_error).mean() < 0.98
    assert deviation.std() < after[0].mean(0).std() / 5


# --- networks -----------------------------------------------------------------------------------

TASK = TinyTask(dtype=torch.float64, num_examples=24)
PLAN = TracePlan(
    layers=LAYERS,
    estimator="gauss_newton",
    split="train",
    examples=tuple(range(24)),
    batch_size=6,
    probes_per_unit=2,
    rtol=1e-9,
    max_probes=40,
    seed=0,
)


def moved_network(distance: float, seed: int = 1, start: nn.Module | None = None) -> nn.Module:
    """The task's network with every weight changed by a share of itself."""
    network = TASK.model()
    if start is not None:
        network.load_state_dict(start.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights_of(network, LAYERS):
            noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            weight.mul_(1 + distance * noise)
    return network


def exact_traces(network: nn.Module, examples=range(24)) -> np.ndarray:
    x, _ = TASK.batch("train", torch.tensor(examples))
    matrix = mean_loss_gauss_newton(network, LAYERS, x)
    return block_traces(matrix, weights_of(network, LAYERS)).numpy()


@pytest.mark.parametrize("estimator", ["gauss_newton", "mixed_gauss_newton", "hutchinson"])
def test_a_chain_of_networks_is_followed(estimator):
    plan = replace(PLAN, estimator=estimator, leading=int(estimator == "mixed_gauss_newton"))
    network = TASK.model()
    now = estimate_traces(TASK, network, plan)
    assert now.num_probes == 40
    for step in range(1, 5):
        after = moved_network(0.01, seed=step, start=network)
        now = reestimate_traces(TASK, network, after, plan, now, 8)
        assert now.num_probes == 40 + 8 * step
        network = after
        assert (np.abs(now.trace - exact_traces(network)) < 4.5 * now.probe_error).all()
    again = estimate_traces(TASK, network, replace(plan, max_probes=16))  # as many products
    assert (now.probe_error < 0.8 * again.probe_error).all()
    assert (now.share_probe_error < 0.8 * again.share_probe_error).all()
    assert (now.data_error > 0).all() or estimator == "hutchinson"


def test_the_probes_are_the_plan_s_next_ones_the_same_on_both_networks():
    plan = replace(PLAN, max_probes=5, probes_per_unit=3)
    before, after = TASK.model(), moved_network(0.05)
    previous = estimate_traces(TASK, before, plan)
    assert previous.num_probes == 3

    def samples(network: nn.Module) -> np.ndarray:
        weights, parts = weights_of(network, LAYERS), []
        with differentiable(network, weights):
            for j in range(4):
                batch = TASK.batch("train", torch.arange(6 * j, 6 * j + 6))
                seeds = [probe_seed(0, j, k) for k in range(3, 18)]
                found = gauss_newton_samples(*TASK.curvature(network, batch), weights, seeds)
                parts.append(found.reshape(5, 3, -1).mean(1) / 24)
        return np.stack(parts)

    expected = shifted(previous, samples(before), samples(after))
    # What does not fill a unit is not drawn.
    got = reestimate_traces(TASK, before, after, plan, previous, 17)
    assert got.num_probes == 18
    np.testing.assert_allclose(got.trace, expected.trace)
    np.testing.assert_allclose(got.probe_error, expected.probe_error)
    np.testing.assert_allclose(got.share_probe_error, expected.share_probe_error)
    nearby = reestimate_traces(TASK, before, before, plan, previous, 17)
    np.testing.assert_array_equal(nearby.data_error, previous.data_error)


EXACT = replace(PLAN, estimator="exact_gauss_newton", batch_size=2)


def test_all_examples_seen_again_are_an_exact_estimate():
    before, after = TASK.model(), moved_network(0.05)
    previous = estimate_traces(TASK, before, EXACT)
    got = reestimate_traces(TASK, before, after, EXACT, previous)
    np.testing.assert_allclose(got.trace, exact_traces(after))
    assert not got.probe_error.any()


def test_a_part_of_the_examples_moves_an_exact_estimate():
    networks = [TASK.model(), moved_network(0.05), moved_network(0.05, seed=2)]
    now = estimate_traces(TASK, networks[0], EXACT)
    for step, (before, after) in enumerate(pairwise(networks)):
        part = np.random.default_rng(step).permutation(24)[:16]
        means = [
            np.stack([exact_traces(network, pair) for pair in part.reshape(8, 2)])[None]
            for network in (before, after)
        ]
        expected = shifted(now, *means, unseen=1 / 3)
        plan = replace(EXACT, examples=tuple(part.tolist()))
        now = reestimate_traces(TASK, before, after, plan, now)
        np.testing.assert_allclose(now.trace, expected.trace)
        np.testing.assert_allclose(now.probe_error, expected.probe_error)
        assert (now.num_probes, now.num_examples) == (0, 24)
    everyone = estimate_traces(TASK, networks[2], EXACT)
    np.testing.assert_allclose(now.data_error, everyone.data_error, rtol=0.2)


# --- refusals -----------------------------------------------------------------------------------


def test_samples_that_give_no_estimate_are_refused():
    previous = estimate([1.0], [1.0])
    with pytest.raises(ValueError, match=r"one shape, got \(2, 6, 1\) and \(2, 5, 1\)"):
        shifted(previous, np.ones((2, 6, 1)), np.ones((2, 5, 1)))
    with pytest.raises(ValueError, match=r"− 2\) must be at least 6, got 2 and 4"):
        shifted(previous, np.ones((2, 4, 1)), np.ones((2, 4, 1)))
    with pytest.raises(ValueError, match="must be finite, got NaN"):
        shifted(previous, np.ones((2, 6, 1)), np.full((2, 6, 1), np.nan))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (replace(PLAN, examples=tuple(range(12))), "3 groups, 12 examples and batches of 6"),
        (replace(PLAN, layers=("conv1",)), "1 groups, 24 examples"),
        (replace(EXACT, examples=tuple(range(15))), "15 examples and batches of 2"),
        (replace(EXACT, examples=tuple(range(14))), "must be at least 6, got 1 and 7"),
    ],
)
def test_a_plan_that_cannot_be_that_of_the_estimate_is_refused(plan, message):
    network = TASK.model()
    own = EXACT if plan.estimator == EXACT.estimator else replace(PLAN, max_probes=4)
    previous = estimate_traces(TASK, network, own)
    with pytest.raises(ValueError, match=message):
        reestimate_traces(TASK, network, network, plan, previous, 20)


def test_too_few_probes_are_refused():
    network = TASK.model()
    previous = estimate_traces(TASK, network, replace(PLAN, max_probes=4))
    with pytest.raises(ValueError, match="must be at least 6, got 4 and 3"):
        reestimate_traces(TASK, network, network, PLAN, previous, 7)
