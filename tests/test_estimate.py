"""Errors of traces and shares, by simulation: what is stated against what comes out."""

from functools import cache

import numpy as np
import pytest
import torch

from hawq.curvature import (
    NonFiniteTraceError,
    Population,
    TraceEstimate,
    UnitSums,
    draw_examples,
)
from hawq.curvature.estimate import summarize

NAMES = ["a", "b", "c"]
RUNS = 300
# Of a variance from so many normal values, relative; heavy tails take a little more.
ALLOWED = 4.5 * (2 / RUNS) ** 0.5


@cache
def population(num: int, tail: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Traces of three sites, shape (num, 3), most of them in few examples, and a guess of them."""
    rng = np.random.default_rng(seed)
    guess = rng.lognormal(sigma=tail, size=num)
    return guess[:, None] * rng.lognormal(sigma=0.6, size=(num, 3)) * [5.0, 2.0, 1.0], guess


def run(
    seed: int,
    traces: np.ndarray,
    guess: np.ndarray,
    *,
    pool: int,
    num: int,
    size: int | None,
    noise: float = 0.0,
    visits: int = 1,
    batches: int = 8,
    seen: bool = True,
) -> TraceEstimate:
    """Choose a pool, draw from it, and estimate; each probe sees its example's trace with noise."""
    rng = np.random.default_rng(seed)
    among = rng.permutation(len(traces))[:pool]
    draw = draw_examples(torch.from_numpy(guess[among]), num, seed)
    weights, own = np.array(draw.weights), traces[among][list(draw.examples)]
    excluded = np.maximum(1 - num / (pool * weights), 0)
    units = []
    for _ in range(visits):
        samples = own[None]
        if noise:  # some of it common to all sites
            shape = (2, num, 3)
            both = rng.standard_normal((2, num, 1)) + rng.standard_normal(shape) / 2
            samples = own * (1 + noise * both)
        for j, part in enumerate(np.array_split(np.arange(num), batches)):
            if seen:
                unit = UnitSums.of_examples(
                    j,
                    samples[:, part],
                    3,
                    weights=weights[part],
                    excluded=excluded[part],
                    num_probes=2 if noise else 0,
                )
            else:
                summed = (weights[part][:, None] * samples[:, part]).sum(1)
                unit = UnitSums.of(j, len(part), summed, 3)
            units.append(unit)
    spread = guess[among].var() / guess[among].mean() ** 2
    return summarize(units, NAMES, Population(pool, size, spread))


def mean_square(errors: list[np.ndarray]) -> np.ndarray:
    return np.mean(np.square(errors), 0)


# --- both errors together, against the spread of many repetitions ---------------------------------

EVERYONE = 2000
DRAWS = {
    "all of a pool from many": {"pool": 400, "num": 400, "size": EVERYONE},
    "some of everyone": {"pool": EVERYONE, "num": 150, "size": EVERYONE},
    "most of a pool from many": {"pool": 300, "num": 200, "size": EVERYONE},
    "few of a pool from many": {"pool": 600, "num": 60, "size": EVERYONE},
}
WAYS = {
    "exact": {},
    "probes": {"noise": 1.0},
    "probes in three visits": {"noise": 0.7, "visits": 3},
    "batches": {"noise": 0.7, "visits": 2, "batches": 20, "seen": False},
}


@cache
def repeated(draw: str, way: str, tail: float = 1.0) -> list[TraceEstimate]:
    """The same settings with other draws and probes, again and again."""
    traces, guess = population(EVERYONE, tail)
    return [run(seed, traces, guess, **DRAWS[draw], **WAYS[way]) for seed in range(RUNS)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("draw", DRAWS)
def test_errors_of_traces_and_shares_are_the_spread_of_repetitions(draw, way):
    found, expected = repeated(draw, way), population(EVERYONE)[0].mean(0)
    values = np.array([estimate.trace for estimate in found])
    shares = values / values.sum(1, keepdims=True)
    assert (np.abs(values.mean(0) - expected) < 4.5 * values.std(0) / RUNS**0.5).all()
    of_traces = values.var(0) / mean_square([estimate.error for estimate in found])
    of_shares = shares.var(0) / mean_square([estimate.share_error for estimate in found])
    # The spread of batches knows nothing of the draw's being without replacement: at most too much.
    least = 0.4 if way == "batches" else 1 - ALLOWED
    for ratio in (of_traces, of_shares):
        assert ((ratio > least) & (ratio < 1 + ALLOWED)).all(), ratio


@pytest.mark.parametrize("way", ["probes", "probes in three visits"])
@pytest.mark.parametrize(
    ("draw", "tail"), [*((draw, 1.0) for draw in DRAWS), ("some of everyone", 1.5)]
)
def test_what_the_probes_add_is_not_taken_for_the_choice_of_examples(draw, tail, way):
    # The same draws with and without noise: the data error is the same on average.
    exact, noisy = (
        mean_square([estimate.data_error for estimate in repeated(draw, name, tail)])
        for name in ("exact", way)
    )
    assert (np.abs(noisy / exact - 1) < 0.15).all(), noisy / exact


def test_examples_from_infinitely_many_have_the_error_of_a_mean():
    values = np.random.default_rng(0).lognormal(size=(60, 3))
    units = [
        UnitSums.of_examples(
            i, part[None], 3, weights=np.ones(len(part)), excluded=np.zeros(len(part)), num_probes=0
        )
        for i, part in enumerate(np.array_split(values, 7))
    ]
    estimate = summarize(units, NAMES)
    np.testing.assert_allclose(estimate.trace, values.mean(0))
    np.testing.assert_allclose(estimate.data_error, values.std(0, ddof=1) / 60**0.5)
    assert not estimate.probe_error.any()
    assert (estimate.num_probes, estimate.num_examples) == (0, 60)


def test_a_pool_that_is_fully_drawn_has_the_error_of_its_own_choice_alone():
    traces, guess = population(300)
    for size in (None, 1000, 301):
        found = run(0, traces, guess, pool=300, num=300, size=size)
        choice = 1 / 300 - (1 / size if size else 0)
        np.testing.assert_allclose(found.data_error**2, choice * traces.var(0, ddof=1), rtol=1e-9)


@pytest.mark.parametrize("seen", [True, False])
def test_the_whole_population_leaves_nothing_to_choose(seen):
    traces, guess = population(300)
    settings = {"pool": 300, "num": 300, "size": 300, "seen": seen}
    found = (
        run(0, traces, guess, **settings) if seen else run(0, traces, guess, noise=0.1, **settings)
    )
    assert (found.data_error <= 1e-9 * found.trace).all()
    assert (found.share_data_error <= 1e-9).all()
    assert (found.probe_error > 0).all() != seen


# --- the probes' error ----------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("visits", [1, 4])
def test_the_probe_error_is_the_spread_over_probes_on_the_same_examples(visits, seen):
    traces, guess = population(60)

    def again(seed: int) -> TraceEstimate:
        # The whole pool every time: only the probes differ.
        own = np.random.default_rng(seed).permutation(60)
        settings = {"pool": 60, "num": 60, "size": 60, "noise": 1.0, "visits": visits}
        return run(seed, traces[own], guess[own], seen=seen, **settings)

    found = [again(seed) for seed in range(RUNS)]
    values = np.array([estimate.trace for estimate in found])
    shares = values / values.sum(1, keepdims=True)
    stated = mean_square([estimate.probe_error for estimate in found])
    of_shares = mean_square([estimate.share_probe_error for estimate in found])
    assert (np.abs(values.mean(0) - traces.mean(0)) < 4.5 * values.std(0) / RUNS**0.5).all()
    assert (np.abs(values.var(0) / stated - 1) < ALLOWED).all()
    assert (np.abs(shares.var(0) / of_shares - 1) < 1.3 * ALLOWED).all()
    assert found[0].num_probes == 2 * visits


def test_visits_of_a_batch_count_as_one_visit_with_all_their_probes():
    rng = np.random.default_rng(0)
    samples = rng.normal(3, 1, size=(5, 8, 4))
    whole = [UnitSums.of(j, 4, s, 4) for j, s in enumerate(samples)]
    parts = [
        UnitSums.of(j, 4, samples[j, first : first + 2], 4)
        for first in range(0, 8, 2)
        for j in range(5)
    ]
    once, often = summarize(whole, list("abcd")), summarize(parts, list("abcd"))
    for name in ("trace", "probe_error", "data_error", "share_error"):
        np.testing.assert_allclose(getattr(once, name), getattr(often, name), rtol=1e-12)
    assert once.num_probes == often.num_probes == 8


def test_visits_of_examples_give_the_same_trace_and_their_errors_on_average():
    rng = np.random.default_rng(1)
    errors = {"once": [], "often": []}
    for _ in range(200):
        samples = rng.normal(3, 1, size=(8, 20, 2)) * rng.lognormal(sigma=0.3, size=(1, 20, 1))
        about = {"weights": np.ones(20), "excluded": np.full(20, 0.5)}
        once = [UnitSums.of_examples(0, samples, 2, num_probes=8, **about)]
        often = [
            UnitSums.of_examples(0, samples[first : first + 2], 2, num_probes=2, **about)
            for first in range(0, 8, 2)
        ]
        found = {
            "once": summarize(once, NAMES, Population(40, 100)),
            "often": summarize(often, NAMES, Population(40, 100)),
        }
        np.testing.assert_allclose(found["once"].trace, found["often"].trace, rtol=1e-12)
        for key, estimate in found.items():
            assert estimate.num_probes == 8
            errors[key].append(
                [estimate.probe_error**2, estimate.data_error**2, estimate.share_probe_error**2]
            )
    once, often = (np.mean(errors[key], 0) for key in ("once", "often"))
    np.testing.assert_allclose(often, once, rtol=0.15)


def test_the_order_of_batches_changes_nothing_beyond_rounding():
    traces, _ = population(40)
    parts = np.array_split(traces[None], 5, axis=1)

    def units(order):
        return [
            UnitSums.of_examples(
                j, parts[j], 3, weights=np.ones(8), excluded=np.zeros(8), num_probes=0
            )
            for j in order
        ]

    one, other = summarize(units(range(5)), NAMES), summarize(units([3, 1, 4, 0, 2]), NAMES)
    np.testing.assert_allclose(one.data_error, other.data_error, rtol=1e-12)


# --- batches, where examples are not seen ---------------------------------------------------------


def synthetic(generator, sizes, batch_means, num_probes, noise):
    """Units of batches whose mean traces are given, with normal probe noise."""
    units = []
    for j, (n, mean) in enumerate(zip(sizes, batch_means, strict=True)):
        samples = n * (mean + noise * generator.standard_normal((num_probes, 1)))
        units.append(UnitSums.of(j, n, samples, 1))
    return summarize(units, ["w"])


def test_a_smaller_last_batch_weighs_less_in_the_probe_error():
    generator = np.random.default_rng(0)
    sizes, means = [8, 8, 8, 8, 3], np.array([1.0, 2, 5, 3, 4])
    exact = np.average(means, weights=sizes)
    estimates = [synthetic(generator, sizes, means, 6, 2.0) for _ in range(RUNS)]
    deviations = np.array([e.trace[0] - exact for e in estimates])
    assert abs(deviations.mean()) < 4.5 * deviations.std() / RUNS**0.5
    stated = mean_square([e.probe_error for e in estimates])[0]
    assert abs(deviations.var() / stated - 1) < ALLOWED


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_the_data_error_of_batches_is_calibrated_whatever_the_probes_add(noise):
    # Examples with traces of mean 3 and deviation 2; each run draws its own.
    generator = np.random.default_rng(1)
    sizes = [8] * 15 + [4]
    estimates = []
    for _ in range(RUNS):
        means = np.array([generator.normal(3, 2, n).mean() for n in sizes])
        estimates.append(synthetic(generator, sizes, means, 8, noise))
    stated = mean_square([e.data_error for e in estimates])[0]
    assert stated == pytest.approx(2.0**2 / sum(sizes), rel=0.15)
    spread = np.var([e.trace[0] for e in estimates])
    assert abs(spread / mean_square([e.error for e in estimates])[0] - 1) < ALLOWED


def test_batches_of_a_draw_add_the_pool_s_own_choice_to_their_spread():
    # Examples that are not seen cannot tell how their traces vary: their outputs' curvature does.
    rng = np.random.default_rng(0)
    units = [UnitSums.of(j, 4, 4 * rng.lognormal(size=(3, 2)), 2) for j in range(10)]
    alone = summarize(units, NAMES, Population(1000, None, 0.0))
    with_pool = summarize(units, NAMES, Population(1000, 4000, 5.0))
    added = with_pool.data_error**2 - alone.data_error**2
    np.testing.assert_allclose(added, (1 / 1000 - 1 / 4000) * 5 * alone.trace**2)
    # A curvature that all traces follow changes no share.
    np.testing.assert_allclose(with_pool.share_error, alone.share_error)


def test_without_spread_between_examples_the_data_error_is_no_larger_than_the_probes():
    estimate = synthetic(np.random.default_rng(2), [8] * 10, np.full(10, 3.0), 50, 1.0)
    assert estimate.data_error[0] <= 2 * estimate.probe_error[0]


def test_examples_weigh_the_same_in_a_smaller_last_batch():
    sums = [UnitSums.of(j, n, np.full((2, 1), n * 3.0), 1) for j, n in enumerate((4, 4, 2))]
    estimate = summarize(sums, ["w"])
    assert estimate.trace.tolist() == [3]
    assert estimate.data_error[0] < 1e-12
    sums[2] = UnitSums.of(2, 2, np.full((2, 1), 2 * 13.0), 1)
    assert summarize(sums, ["w"]).trace.tolist() == [5]


def test_what_a_batch_knows_without_probes_is_added_once_and_without_error():
    rng = np.random.default_rng(0)
    samples, known = rng.normal(3, 1, size=(5, 4, 3)), rng.lognormal(size=(5, 3))

    def units(**more):
        for first in (0, 2):
            for j in range(5):
                parts = {k: v[j] for k, v in more.items()} if first == 0 else {}
                yield UnitSums.of(j, 4, samples[j, first : first + 2], 3, **parts)

    without, with_it = summarize(list(units()), NAMES), summarize(list(units(known=known)), NAMES)
    np.testing.assert_allclose(with_it.trace, without.trace + known.sum(0) / 20)
    np.testing.assert_allclose(with_it.probe_error, without.probe_error)
    # The choice of examples is that of both parts: as if the samples had held it.
    both = [
        UnitSums.of(j, 4, samples[j, first : first + 2] + known[j], 3)
        for first in (0, 2)
        for j in range(5)
    ]
    np.testing.assert_allclose(with_it.data_error, summarize(both, NAMES).data_error)
    np.testing.assert_allclose(with_it.share_error, summarize(both, NAMES).share_error)


# --- shares ---------------------------------------------------------------------------------------


def test_sites_that_grow_and_shrink_together_have_shares_without_error():
    factor = np.random.default_rng(0).lognormal(size=(30, 1))
    traces = factor * [1.0, 3.0, 6.0]
    unit = UnitSums.of_examples(
        0, traces[None], 3, weights=np.ones(30), excluded=np.zeros(30), num_probes=0
    )
    estimate = summarize([unit], NAMES)
    assert (estimate.data_error > 0.05 * estimate.trace).all()
    assert (estimate.share_error < 1e-7).all()


def test_channels_have_shares_of_the_sites_total():
    # One site with two channels: its share is 1 without error, theirs add up to it.
    channels = np.random.default_rng(0).lognormal(size=(30, 2))
    groups = np.concatenate([channels.sum(1, keepdims=True), channels], 1)
    about = {"weights": np.ones(30), "excluded": np.zeros(30), "num_probes": 0}
    estimate = summarize([UnitSums.of_examples(0, groups[None], 1, **about)], NAMES)
    site, first, second = estimate.share_error
    assert site == pytest.approx(0, abs=1e-7)
    assert first == pytest.approx(second, rel=1e-6)
    assert first > 0.01
    # The first-order error of a ratio of means.
    share = channels[:, 0].mean() / channels.sum(1).mean()
    residual = channels[:, 0] - share * channels.sum(1)
    expected = residual.std(ddof=1) / 30**0.5 / channels.sum(1).mean()
    assert first == pytest.approx(expected, rel=1e-6)


def test_all_traces_at_zero_have_no_shares_and_no_error():
    about = {"weights": np.ones(4), "excluded": np.zeros(4), "num_probes": 0}
    unit = UnitSums.of_examples(0, np.zeros((1, 4, 2)), 2, **about)
    assert not summarize([unit], NAMES).share_error.any()


# --- when to stop ---------------------------------------------------------------------------------


def estimate_of(trace, probe_error) -> TraceEstimate:
    zeros = np.zeros(len(trace))
    return TraceEstimate(np.array(trace), np.array(probe_error), zeros, 4, 8, zeros, zeros)


def test_convergence_is_relative_to_each_trace_and_to_all_of_them():
    estimate = estimate_of([10.0, -1.0], [0.9, 0.3])
    assert estimate.converged(0.1).tolist() == [True, False]
    assert estimate.converged(0.3).tolist() == [True, True]  # of its magnitude
    assert estimate.converged(0.1, atol=0.01).tolist() == [True, False]
    assert estimate.converged(0.1, atol=0.02).tolist() == [True, True]
    assert estimate.converged(0.0, atol=0.05).tolist() == [False, True]


def test_an_order_is_beyond_doubt_where_neighbours_are_apart():
    sizes = np.array([1.0, 10.0, 1.0])  # average traces 3, 1 and 2
    assert estimate_of([3.0, 10.0, 2.0], [0.1, 1.0, 0.1]).ordered(sizes)
    # Averages 1 ± 1 and 2 ± 0.1 are not apart; without averages, 10 and 3 would be.
    assert not estimate_of([3.0, 10.0, 2.0], [0.1, 10.0, 0.1]).ordered(sizes)
    assert estimate_of([3.0, 10.0, 2.0], [0.1, 2.0, 0.1]).ordered(np.ones(3))
    doubt = 1.645 * np.hypot(0.1, 0.1)
    assert estimate_of([2.0 + 1.01 * doubt, 2.0], [0.1, 0.1]).ordered(np.ones(2))
    assert not estimate_of([2.0 + 0.99 * doubt, 2.0], [0.1, 0.1]).ordered(np.ones(2))


def test_both_errors_add_up_in_squares():
    estimate = TraceEstimate(*np.array([[1.0], [3.0], [4.0]]), 4, 8, *np.array([[0.6], [0.8]]))
    assert estimate.error.tolist() == [5]
    assert estimate.share_error.tolist() == [1]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_trace_that_is_not_finite_is_refused_by_name(value):
    good = UnitSums.of(0, 4, np.ones((2, 3)), 3)
    with np.errstate(invalid="ignore"):
        bad = UnitSums.of(1, 4, np.array([[1, value, 1], [1, 1, 1]]), 3)
    with pytest.raises(NonFiniteTraceError, match="the trace of b must be finite"):
        summarize([good, bad], NAMES)


def test_an_estimate_of_one_batch_or_of_uneven_probes_is_refused():
    one = UnitSums.of(0, 4, np.ones((2, 1)), 1)
    with pytest.raises(ValueError, match="got 1 batches"):
        summarize([one], ["w"])
    with pytest.raises(ValueError, match=r"2 batches with \[2, 3\] probes"):
        summarize([one, UnitSums.of(1, 4, np.ones((3, 1)), 1)], ["w"])
    with pytest.raises(ValueError, match=r"2 batches with \[1\] probes"):
        summarize([UnitSums.of(j, 4, np.ones((1, 1)), 1) for j in range(2)], ["w"])


def test_examples_with_as_many_probes_from_uneven_visits_are_refused():
    about = {"weights": np.ones(4), "excluded": np.zeros(4)}
    one = UnitSums.of_examples(0, np.ones((4, 4, 1)), 1, num_probes=4, **about)
    two = [UnitSums.of_examples(1, np.ones((2, 4, 1)), 1, num_probes=2, **about) for _ in "ab"]
    with pytest.raises(ValueError, match="as many on each"):
        summarize([one, *two], ["w"])
