"""The statistics of a comparison: closed forms, brute force, and what noise must not decide."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from scipy.stats import mannwhitneyu, spearmanr

from search.comparison.hypervolume import covered_share, hypervolume
from search.comparison.progress import band, best_at, best_so_far, evaluations_to_reach
from search.comparison.statistics import (
    MIN_SEEDS,
    Interval,
    finalist_difference,
    holm,
    median_lead,
    rank_agreement,
    search_differences,
)

SCORES = st.lists(st.floats(-1, 1), min_size=1, max_size=12)
POINTS = npst.arrays(
    np.float64, st.tuples(st.integers(1, 8), st.just(2)), elements=st.integers(0, 10)
)


@given(SCORES, st.integers(0, 5))
def test_the_best_so_far_is_the_largest_of_each_beginning_and_is_kept(scores, missing):
    curve = best_so_far(scores, len(scores) + missing)
    expected = [max(scores[: t + 1]) for t in range(len(scores) + missing)]
    assert curve.tolist() == expected


@pytest.mark.parametrize("scores", [[], [0.1, 0.2, 0.3]])
def test_a_curve_has_a_score_and_no_more_than_its_length(scores):
    with pytest.raises(ValueError, match=rf"scores must number 1 to 2, got {len(scores)}"):
        best_so_far(scores, 2)


@given(SCORES, st.data())
def test_a_cost_buys_the_best_of_what_was_scored_by_then(scores, data):
    steps = data.draw(
        st.lists(st.integers(0, 4), min_size=len(scores), max_size=len(scores)), label="steps"
    )
    costs = np.cumsum(steps).tolist()
    grid = costs[0] + np.arange(0, 20, 0.5)
    expected = [
        max(s for s, c in zip(scores, costs, strict=True) if c <= at) for at in grid.tolist()
    ]
    assert best_at(costs, scores, grid).tolist() == expected


def test_a_grid_that_begins_before_the_first_score_is_refused():
    with pytest.raises(ValueError, match="grid must begin at the first score or later, got 1"):
        best_at([2.0, 3.0], [0.1, 0.2], np.array([1.0, 2.0]))


def test_costs_that_fall_are_refused():
    with pytest.raises(ValueError, match="costs must be one a score and never fall, got 2 for 2"):
        best_at([3.0, 2.0], [0.1, 0.2], np.array([3.0]))


def test_a_band_holds_the_quartiles_of_the_seeds():
    found = band(np.arange(5.0)[:, None] * np.array([1.0, 10.0]))
    assert found.low.tolist() == [1, 10]
    assert found.median.tolist() == [2, 20]
    assert found.high.tolist() == [3, 30]


@pytest.mark.parametrize(
    ("searches", "expected"),
    [
        ([[0.1, 0.5, 0.2]], 2),
        ([[0.5], [0.1, 0.5], [0.1, 0.1, 0.5]], 2),
        ([[0.5], [0.1, 0.1, 0.5]], 2),
        ([[0.5], [0.1, 0.5], [0.1]], 2),
        ([[0.5], [0.1]], None),
        ([[0.1], [0.2]], None),
    ],
)
def test_the_evaluations_to_reach_a_score_are_the_median_over_seeds(searches, expected):
    assert evaluations_to_reach(searches, 0.5) == expected


def test_one_point_dominates_a_rectangle_and_two_their_union():
    assert hypervolume(np.array([[1.0, 0.5]]), (3, 0)) == 1
    assert hypervolume(np.array([[1.0, 0.5], [2.0, 1.0]]), (3, 0)) == 1.5


@given(POINTS)
def test_the_hypervolume_is_the_area_of_the_dominated_unit_squares(points):
    squares = [
        any(x <= i and y >= j + 1 for x, y in points.tolist()) for i in range(10) for j in range(10)
    ]
    assert hypervolume(points, (10, 0)) == sum(squares)


@given(POINTS, POINTS)
def test_more_points_never_dominate_less(points, more):
    assert hypervolume(np.vstack([points, more]), (10, 0)) >= hypervolume(points, (10, 0))


@given(POINTS)
def test_the_covered_share_is_a_share_whatever_lies_outside(points):
    share = covered_share(points, ideal=(2, 8), reference=(7, 3))
    assert 0 <= share <= 1
    assert covered_share(np.vstack([points, [2, 8]]), ideal=(2, 8), reference=(7, 3)) == 1


def test_an_ideal_that_is_not_better_is_refused():
    with pytest.raises(ValueError, match=r"ideal must be better than the reference in both"):
        covered_share(np.zeros((1, 2)), ideal=(2, 3), reference=(2, 1))


def test_holm_corrects_as_in_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_rejects_what_its_step_down_procedure_rejects(p):
    corrected = holm(p)
    for level in (0.01, 0.05, 0.3):
        rejected = set()
        for step, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[i] * (len(p) - step) >= level:
                break
            rejected.add(i)
        assert {i for i, value in enumerate(corrected) if value < level} == rejected


def test_few_seeds_make_no_claim_and_are_not_counted_in_the_correction():
    draw = np.random.default_rng(0)
    few, many, better = draw.normal(size=MIN_SEEDS - 1), draw.normal(size=12), np.arange(5.0, 17)
    alone = search_differences([(many, better)], 0)[0]
    found = search_differences([(few, better), (many, better), (many, few)], 0)
    assert [difference.p for difference in found] == [None, alone.p, None]
    assert not found[0].is_told
    assert found[1].is_told


def test_ten_searches_a_side_are_tested_by_mann_and_whitney():
    first, second = np.arange(10.0), np.arange(10.0) + 4.5
    expected = mannwhitneyu(first, second, alternative="two-sided").pvalue
    found = search_differences([(first, second)] * 2, 0)
    assert [difference.p for difference in found] == pytest.approx([2 * expected] * 2)


def test_searches_that_all_end_alike_are_not_told_apart():
    found = search_differences([(np.ones(12), np.ones(12))], 0)[0]
    assert found.p == 1
    assert found.medians == Interval(0, 0, 0)


@given(st.permutations(range(12)))
def test_the_order_of_the_seeds_does_not_move_a_difference(order):
    scores, other = np.linspace(0, 1, 12), np.linspace(0.3, 0.8, 12)
    found = search_differences([(scores[list(order)], other)], 0)[0]
    assert found.p == search_differences([(scores, other)], 0)[0].p
    assert found.medians.value == pytest.approx(np.median(scores) - np.median(other))


def test_the_interval_of_a_median_covers_what_it_should():
    """Of 60 intervals of 95 % three miss on average; ten would be a wrong error."""
    draw = np.random.default_rng(1)
    misses = 0
    for seed in range(60):
        found = search_differences([(draw.normal(2, 1, 25), draw.normal(0, 1, 25))], seed)[0]
        misses += not found.medians.low <= 2 <= found.medians.high
    assert misses < 10


def test_a_lead_over_one_score_needs_ten_searches():
    scores = np.linspace(0.80, 0.90, 12)
    found = median_lead(scores, 0.5, 0)
    assert found is not None
    assert found.value == pytest.approx(0.35)
    assert found.sign == 1
    assert median_lead(scores[:9], 0.5, 0) is None


def test_a_difference_of_finalists_has_the_error_of_images_and_seeds():
    """The interval's half is 1.96 √(σ²_images/N + σ²_seeds/R) for a sum of the two effects."""
    draw = np.random.default_rng(2)
    images, seeds = draw.normal(0, 1, 400), draw.normal(0, 0.1, 8)
    gained = 0.5 + seeds[:, None] + images
    error = np.hypot(images.std() / 20, seeds.std(ddof=1) / 8**0.5)
    found = finalist_difference(gained, np.zeros_like(gained), 0)
    assert found.value == gained.mean()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)


def test_three_seeds_do_not_look_surer_than_they_are():
    gained = np.array([0.1, 0.2, 0.3])[:, None] + np.zeros((3, 50))
    many = [finalist_difference(np.tile(gained, (1, 1)), 0 * gained, seed) for seed in range(5)]
    # The extreme draws take one seed thrice: probability 1/27 each, more than the 2.5 % left out.
    spread = 0.1 * 1.5**0.5
    assert [found.high for found in many] == pytest.approx([0.2 + spread] * 5)


def test_one_seed_leaves_the_error_of_the_images():
    gained = np.array([[0.0, 1.0] * 200])
    found = finalist_difference(gained, np.zeros_like(gained), 0)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 0.5 / 20, rel=0.1)


def test_swapping_the_finalists_turns_the_difference_round():
    draw = np.random.default_rng(3)
    first, second = draw.random((2, 3, 60))
    there, back = finalist_difference(first, second, 5), finalist_difference(second, first, 5)
    assert (there.value, there.low, there.high) == pytest.approx(
        (-back.value, -back.high, -back.low)
    )


def test_finalists_must_be_scored_on_the_same_images_and_seeds():
    with pytest.raises(ValueError, match=r"one shape \(R, N\).* got \(2, 9\) and \(3, 9\)"):
        finalist_difference(np.zeros((2, 9)), np.zeros((3, 9)), 0)


@settings(max_examples=20)
@given(
    npst.arrays(np.float64, 9, elements=st.integers(0, 6)),
    npst.arrays(np.float64, 9, elements=st.integers(0, 6)),
)
def test_agreement_in_one_group_is_spearmans(first, second):
    found = rank_agreement(first, second, [""] * 9, 0)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        assert found is None
    else:
        assert found is not None
        assert found.value == pytest.approx(spearmanr(first, second).statistic)
        assert -1 <= found.low <= found.high <= 1


def test_what_groups_differ_in_earns_no_agreement():
    """Within each group all orders of the second measurement agree with the first by zero."""
    orders = np.array(list(permutations(range(4))), float)
    first = np.tile(np.arange(4.0), len(orders))
    groups = ["small" if i < len(first) / 2 else "large" for i in range(len(first))]
    lift = np.array([100.0 * (group == "large") for group in groups])
    found = rank_agreement(first + lift, orders.ravel() + lift, groups, 0)
    whole = spearmanr(first + lift, orders.ravel() + lift).statistic
    within = [spearmanr(np.arange(4), order).statistic for order in orders]
    assert whole > 0.7
    assert found is not None
    assert found.value == pytest.approx(np.mean(within), abs=1e-12)


def test_an_interval_has_a_sign_only_where_it_excludes_zero():
    assert [Interval(0.1, *ends).sign for ends in ((-0.1, 0.3), (0.05, 0.2), (-0.3, -0.1))] == [
        0,
        1,
        -1,
    ]
