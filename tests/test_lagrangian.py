from collections import Counter
from itertools import product
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import brute_force, evaluate, every_choice, free_space
from test_allocate import problems

from hawq.allocate import (
    InfeasibleBudgetError,
    lagrangian_solution,
    lower_hull,
    monotone_front,
    pareto_front,
)
from hawq.allocate.few_widths import spend_on_few_widths
from hawq.allocate.remainder import spend
from hawq.cost import weight_bits
from hawq.space import Group, Space

MENU = (2, 4, 8)


def channel_space(counts, sizes, menu=MENU):
    """Layers of channels, all of one size in a layer."""
    groups = [
        Group(f"w:l{i}[{c}]", size, 0, tuple(menu))
        for i, (count, size) in enumerate(zip(counts, sizes, strict=True))
        for c in range(count)
    ]
    return Space(tuple(groups))


def channel_tables(space, seed, spread=0.8):
    """Ω that falls fourfold with each bit, with layers and channels of different curvature."""
    generator = np.random.default_rng(seed)
    sizes = np.array([group.num_elements for group in space.groups])
    layers = {name.partition("[")[0]: generator.normal() for name in space.names}
    levels = np.array([layers[name.partition("[")[0]] for name in space.names])
    traces = np.exp(levels + spread * generator.normal(size=len(space)))
    return (traces * sizes)[:, None] * 4.0 ** -np.array(space.widths), weight_bits(space)


def widths_by_layer(space, allocation):
    counts = {}
    for name, bits in zip(space.names, allocation.bits, strict=True):
        counts.setdefault(name.partition("[")[0], Counter())[bits] += 1
    return counts


@given(problems(), st.integers(0, 200))
def test_it_agrees_with_brute_force_and_proves_it(problem, budget):
    space, sensitivity, cost = problem
    expected = brute_force(space, sensitivity, cost, budget)
    if expected == inf:
        with pytest.raises(InfeasibleBudgetError):
            lagrangian_solution(*problem, budget)
    else:
        found = lagrangian_solution(*problem, budget)
        choice = found.allocation.choice(space).tolist()
        assert evaluate(cost, choice) == found.costs["cost"] <= budget
        assert evaluate(sensitivity, choice) == found.sensitivity == expected
        assert found.gap < 1e-12


@given(problems(), st.integers(0, 200), st.integers(1, 3), st.integers(0, 2))
def test_the_bound_holds_however_little_may_be_tried(problem, budget, max_states, max_rows):
    space, sensitivity, cost = problem
    expected = brute_force(space, sensitivity, cost, budget)
    if space.rows() == [(i,) for i in range(len(space))] and expected < inf:
        found = lower_hull(np.where(space.allowed(), sensitivity, inf), cost)
        choice = spend(found, budget, max_states=max_states, max_rows=max_rows)
        assert choice.bound <= expected * (1 + 1e-12)
        assert choice.cost <= budget
        assert expected <= choice.sensitivity <= found.total[found.within(budget)] + 1e-9


@pytest.mark.parametrize("max_states", [1, 3])
def test_the_bound_knows_what_was_dropped(max_states):
    space, missed = free_space([5, 7, 11, 13, 17, 19], (2, 3, 4, 8)), 0
    cost = weight_bits(space)
    for seed in range(40):
        generator = np.random.default_rng(seed)
        sensitivity = generator.random((6, 1)) * 4.0 ** -np.array(space.widths)
        budget = int(generator.integers(cost[:, 0].sum(), cost[:, -1].sum()))
        front = pareto_front(space, sensitivity, cost)
        optimum = front.sensitivity[front.within(budget)]
        choice = spend(lower_hull(sensitivity, cost), budget, max_states=max_states)
        assert choice.bound <= optimum * (1 + 1e-12)
        missed += choice.sensitivity > optimum * (1 + 1e-12)
    assert missed  # or this test would not have tried what it is for


@given(problems(tied=False), st.data())
def test_every_point_of_the_hull_is_undominated_and_bounds_the_front(problem, data):
    space, sensitivity, cost = problem
    hull = lower_hull(sensitivity, cost)
    rows = np.arange(len(space))
    assert (np.diff(hull.total_cost) > 0).all()
    assert (np.diff(hull.total) < 0).all()
    assert (np.diff(hull.slope) <= 0).all()
    for point in range(len(hull)):
        choice = hull.choice(point)
        assert cost[rows, choice].sum() == hull.total_cost[point]
        assert sensitivity[rows, choice].sum() == pytest.approx(hull.total[point], abs=1e-9)
        best = brute_force(space, sensitivity, cost, hull.total_cost[point].item())
        assert hull.total[point] == pytest.approx(best, abs=1e-9)
    budget = data.draw(st.integers(hull.total_cost[0].item(), hull.total_cost[-1].item() + 9))
    best = brute_force(space, sensitivity, cost, budget)
    assert hull.bound(budget) <= best + 1e-9
    point = hull.within(budget)
    if point < len(hull) - 1:  # the bound is the straight line between two points
        line = np.interp(budget, hull.total_cost, hull.total)
        assert hull.bound(budget) == pytest.approx(line, abs=1e-9)
    else:
        assert hull.bound(budget) == pytest.approx(best, abs=1e-9)


@given(problems(), st.integers(0, 200), st.integers(0, 50))
def test_more_budget_is_never_worse(problem, budget, more):
    if budget >= pareto_front(*problem).cost[0]:
        better = lagrangian_solution(*problem, budget + more)
        assert better.sensitivity <= lagrangian_solution(*problem, budget).sensitivity


@given(st.integers(0, 99), st.randoms(use_true_random=False))
def test_permuting_the_channels_permutes_the_answer(seed, random):
    space = channel_space([5, 4], [3, 7])
    sensitivity, cost = channel_tables(space, seed)  # reals: no two allocations are equally good
    order = random.sample(range(len(space)), len(space))
    permuted = Space(tuple(space.groups[i] for i in order))
    budget = int(3.3 * cost[:, 0].sum() / 2)
    bits = lagrangian_solution(space, sensitivity, cost, budget).allocation.bits
    other = lagrangian_solution(permuted, sensitivity[order], cost[order], budget).allocation.bits
    assert other == tuple(bits[i] for i in order)


@given(problems(), st.integers(0, 200), st.sampled_from([2.0**-40, 0.25, 1024]))
def test_scaling_the_loss_leaves_the_allocation(problem, budget, factor):
    space, sensitivity, cost = problem
    if budget >= pareto_front(*problem).cost[0]:
        found = lagrangian_solution(space, sensitivity, cost, budget)
        scaled = lagrangian_solution(space, factor * sensitivity, cost, budget)
        assert scaled.allocation == found.allocation
        assert scaled.bound == factor * found.bound


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
@settings(max_examples=50)
def test_it_is_no_worse_than_the_monotone_front(seed, num_layers):
    generator = np.random.default_rng(seed)
    space = free_space(generator.integers(1, 999, num_layers).tolist(), MENU)
    sensitivity = np.sort(generator.random((num_layers, 3)))[:, ::-1]
    cost = weight_bits(space)
    monotone = monotone_front(space, sensitivity, cost, generator.random(num_layers))
    budget = int(generator.integers(cost[:, 0].sum(), cost[:, -1].sum()))
    found = lagrangian_solution(space, sensitivity, cost, budget)
    assert found.sensitivity <= monotone.sensitivity[monotone.within(budget)] * (1 + 1e-12)


def test_the_hull_of_many_channels_is_kept_as_steps():
    space = channel_space([1000, 1000, 500], [27, 288, 576], range(1, 9))
    hull = lower_hull(*channel_tables(space, 0))
    assert len(hull) > 2500 * 6
    size = sum(getattr(hull, name).nbytes for name in hull.__slots__)
    assert size < 100 * len(hull)


@pytest.mark.parametrize("average_bits", [1.1, 2.44, 4, 7.5])
def test_many_channels_have_a_gap_of_a_hundredth_of_a_percent_at_most(average_bits):
    space = channel_space([200, 300, 400, 100], [27, 576, 1152, 64], range(1, 9))
    sensitivity, cost = channel_tables(space, 1)
    hull = lower_hull(sensitivity, cost)
    budget = int(average_bits * cost[:, 0].sum()) + 1
    choice = spend(hull, budget)
    assert choice.cost <= budget
    assert choice.sensitivity <= hull.total[hull.within(budget)]
    assert 0 <= choice.sensitivity - choice.bound <= 1e-4 * choice.sensitivity


def test_zero_bits_prune_where_the_tables_have_them():
    # Columns 0, 2 and 8 bits: the first channel is not worth its two bits.
    sensitivity = np.array([[0.1, 0.05, 0.04], [9, 2, 1], [9, 1, 0.5]])
    cost = np.outer([10, 10, 10], [0, 2, 8])
    hull = lower_hull(sensitivity, cost)
    assert hull.total_cost[0] == 0
    assert spend(hull, 40).options.tolist() == [0, 1, 1]


def test_of_options_of_equal_cost_the_least_sensitive_is_taken():
    hull = lower_hull(np.array([[3.0, 1, 2], [0, 0, 0]]), np.array([[5, 5, 5], [2, 1, 1]]))
    assert len(hull) == 1
    assert hull.choice(0).tolist() == [1, 1]


def test_a_hull_says_the_least_that_would_do():
    hull = lower_hull(np.zeros((2, 1)), np.array([[3], [4]]))
    with pytest.raises(InfeasibleBudgetError, match="at least 7, got 6"):
        hull.within(6)


def test_tied_groups_receive_the_same_bits():
    groups = [
        Group("w:a", 1, 0, MENU, "t"),
        Group("w:b", 9, 0, MENU, "t"),
        Group("w:c", 3, 0, MENU),
    ]
    space = Space(tuple(groups))
    found = lagrangian_solution(space, np.array([[9.0, 3, 0]] * 3), weight_bits(space), 60)
    assert found.allocation.bits[0] == found.allocation.bits[1]
    assert found.sensitivity == brute_force(
        space, np.array([[9.0, 3, 0]] * 3), weight_bits(space), 60
    )


# Rules for the channels of a layer.


def few_widths_by_brute_force(space, sensitivity, cost, budget, max_widths):
    layers = [name.partition("[")[0] for name in space.names]
    best = inf
    for choice in every_choice(space):
        used = set(zip(layers, choice, strict=True))
        few = max(Counter(layer for layer, _ in used).values()) <= max_widths
        if few and evaluate(cost, choice) <= budget:
            best = min(best, evaluate(sensitivity, choice))
    return best


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(2, 8))
@settings(max_examples=60)
def test_few_widths_are_kept_to_and_the_gap_holds(seed, max_widths, average_bits):
    space = channel_space([3, 3], [2, 5])
    sensitivity, cost = channel_tables(space, seed)
    budget = int(average_bits * cost[:, 0].sum() / 2)
    found = lagrangian_solution(space, sensitivity, cost, budget, max_widths=max_widths)
    assert max(map(len, widths_by_layer(space, found.allocation).values())) <= max_widths
    assert found.costs["cost"] <= budget
    best = few_widths_by_brute_force(space, sensitivity, cost, budget, max_widths)
    assert found.bound <= best * (1 + 1e-12)
    assert best * (1 - 1e-12) <= found.sensitivity
    assert found.gap < 1
    if max_widths != 2:  # whole layers, or no rule: these are exact
        assert found.sensitivity == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("max_widths", [1, 2, 3])
def test_few_widths_for_many_channels_have_a_small_gap(max_widths):
    space = channel_space([200, 300, 400, 100], [27, 576, 1152, 64], range(1, 9))
    sensitivity, cost = channel_tables(space, 1)
    budget = int(2.44 * cost[:, 0].sum())
    found = lagrangian_solution(space, sensitivity, cost, budget, max_widths=max_widths)
    free = lagrangian_solution(space, sensitivity, cost, budget)
    assert max(map(len, widths_by_layer(space, found.allocation).values())) == max_widths
    assert found.loss_of_rules == found.sensitivity - free.sensitivity > 0
    assert found.gap < 0.01


def test_other_sets_of_widths_are_tried_where_they_may_be_better():
    space = channel_space([40, 60, 80], [27, 576, 64], (2, 3, 4, 8))
    sensitivity, cost = channel_tables(space, 2)
    layers = np.repeat([0, 1, 2], [40, 60, 80])
    rule = {"layers": layers, "max_widths": 2}
    budget = int(3.1 * cost[:, 0].sum() / 2)
    first = spend_on_few_widths(sensitivity, cost, budget, **rule, max_tries=0)
    better = spend_on_few_widths(sensitivity, cost, budget, **rule)
    assert better.cost <= budget
    assert better.bound == first.bound <= better.sensitivity < 0.97 * first.sensitivity


@pytest.mark.parametrize("multiple", [8, 16, 32])
@pytest.mark.parametrize("max_widths", [None, 2])
def test_counts_of_channels_are_multiples_but_for_one_width(multiple, max_widths):
    space = channel_space([64, 100, 96, 5], [27, 576, 288, 64], (2, 3, 4, 8))
    sensitivity, cost = channel_tables(space, 2)
    budget = int(3.1 * cost[:, 0].sum() / 2)
    found = lagrangian_solution(
        space, sensitivity, cost, budget, multiple=multiple, max_widths=max_widths
    )
    free = lagrangian_solution(space, sensitivity, cost, budget)
    assert found.costs["cost"] <= budget
    assert found.loss_of_rules == pytest.approx(found.sensitivity - free.sensitivity)
    assert found.bound <= free.sensitivity
    for counts in widths_by_layer(space, found.allocation).values():
        odd = [n for n in counts.values() if n % multiple]
        assert len(odd) == (sum(counts.values()) % multiple > 0)
        assert max_widths is None or len(counts) <= max_widths


@pytest.mark.parametrize("num_channels", [8, 6])  # in the second a block is left over
def test_rounding_to_multiples_is_the_best_there_is_for_channels_that_differ_by_a_factor(
    num_channels,
):
    space = channel_space([num_channels], [3], (2, 4))
    sensitivity, cost = channel_tables(space, 3)
    budget = 3 * (4 * 5 + 2 * (num_channels - 5))  # for five, one of which must give way
    found = lagrangian_solution(space, sensitivity, cost, budget, multiple=4)
    choices = product(range(2), repeat=num_channels)
    best = min(evaluate(sensitivity, choice) for choice in choices if sum(choice) == 4)
    assert found.sensitivity == pytest.approx(best, rel=1e-12)


def test_multiples_are_not_for_channels_with_other_menus_or_ties():
    mixed = Space((Group("w:l[0]", 1, 0, (2, 4)), Group("w:l[1]", 1, 0, (4,))))
    tied = Space(tuple(Group(f"w:l[{c}]", 1, 0, (2, 4), "t") for c in range(2)))
    for space in (mixed, tied):
        with pytest.raises(ValueError, match=r"untied and share one menu .* got others in w:l"):
            lagrangian_solution(space, np.ones((2, 2)), weight_bits(space), 8, multiple=2)


def test_channels_tied_across_layers_follow_no_layer_s_rule():
    space = Space((Group("w:a[0]", 1, 0, (2, 4), "t"), Group("w:b[0]", 1, 0, (2, 4), "t")))
    with pytest.raises(ValueError, match=r"tied across layers .* \['w:a', 'w:b'\]"):
        lagrangian_solution(space, np.ones((2, 2)), weight_bits(space), 8, max_widths=1)


@pytest.mark.parametrize("max_widths", [1, 2])
def test_too_few_widths_for_pinned_channels_are_refused(max_widths):
    sensitivity = np.where(np.eye(3, dtype=bool), 1.0, inf)
    with pytest.raises(ValueError, match=f"got {max_widths} for layer 0"):
        spend_on_few_widths(
            sensitivity,
            np.ones((3, 3), int),
            9,
            layers=np.zeros(3, int),
            max_widths=max_widths,
        )


def test_few_widths_that_cannot_meet_the_budget_name_the_least_that_would_do():
    # One row needs its second column, so that a set of one column costs 8 where two would cost 5.
    sensitivity = np.array([[inf, 1.0, 1], [3, 2, 1]])
    cost = np.array([[9, 4, 9], [1, 4, 9]])
    for max_widths, least in ((1, 8), (2, 5)):
        with pytest.raises(InfeasibleBudgetError, match=f"at least {least}, got 4"):
            spend_on_few_widths(
                sensitivity, cost, 4, layers=np.zeros(2, int), max_widths=max_widths
            )


@pytest.mark.parametrize("rule", [{"multiple": 0}, {"max_widths": 0}])
def test_rules_are_at_least_one(rule):
    with pytest.raises(ValueError, match="multiple and max_widths must be at least 1"):
        lagrangian_solution(free_space([1], (2,)), np.ones((1, 1)), np.ones((1, 1), int), 8, **rule)


@pytest.mark.parametrize(
    ("sensitivity", "cost", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 2), int), r"one shape, R × B, got \(2, 3\)"),
        (np.zeros((0, 2)), np.zeros((0, 2), int), r"got \(0, 2\)"),
        (np.full((1, 2), np.nan), np.zeros((1, 2), int), "must not hold NaN"),
        (np.full((1, 2), -inf), np.zeros((1, 2), int), "must not hold NaN nor −∞"),
        (np.zeros((1, 2)), np.full((1, 2), -1), "cost must hold integers that are not negative"),
        (np.zeros((1, 2)), np.zeros((1, 2)), "cost must hold integers"),
        (np.array([[1, 0], [inf, inf]]), np.zeros((2, 2), int), "got none for row 1"),
    ],
)
def test_tables_that_make_no_sense_are_refused(sensitivity, cost, message):
    with pytest.raises(ValueError, match=message):
        lower_hull(sensitivity, cost)
