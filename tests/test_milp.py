import os
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import brute_force, every_choice, free_space
from test_allocate import problems

from hawq.allocate import (
    Budget,
    FrontTooLargeError,
    InfeasibleBudgetError,
    InfeasibleBudgetsError,
    constrained_front,
    milp_solution,
    monotone_front,
    pareto_front,
)
from hawq.allocate.constrained import undominated_in_three
from hawq.allocation import Allocation
from hawq.cost import (
    Operation,
    activation_bits,
    bit_operations,
    latency,
    peak_activation_bits,
    separable,
    weight_bits,
)
from hawq.space import Group, Space

MENU = (2, 4, 8)


@st.composite
def networks(draw, max_layers=3, max_tensors=2):
    """Weights and activations to choose together, with all kinds of costs.

    Tensors have several readers, layers have pins and ties, and latency is not monotone.
    """
    small = st.integers(1, 9)
    num_layers, num_tensors = draw(st.integers(1, max_layers)), draw(st.integers(1, max_tensors))
    menus = st.sampled_from([(4,), (2, 4), (2, 4, 8)])
    tie = draw(st.sampled_from([None, None, "t"]))
    tied_to = draw(st.integers(0, num_tensors - 1))
    groups = [
        Group(f"w:{i}", draw(small), 0, draw(menus), tie if i == 0 else None)
        for i in range(num_layers)
    ]
    groups += [
        Group(f"a:{i}", draw(small), 0, draw(menus), tie if i == tied_to else None)
        for i in range(num_tensors)
    ]
    space = Space(tuple(groups))
    tensors = st.sampled_from([f"a:{i}" for i in range(num_tensors)])
    operations = [
        Operation(f"w:{i}", draw(st.one_of(tensors, st.just(8))), draw(small))
        for i in range(num_layers)
    ]
    times = {
        str(i): {(w, a): draw(small) for w in space.widths for a in (*MENU,)}
        for i in range(num_layers)
    }
    schedule = draw(st.lists(st.sets(tensors, max_size=num_tensors), min_size=1, max_size=3))
    costs = [
        separable("weight_bits", weight_bits(space)),
        separable("activation_bits", activation_bits(space)),
        bit_operations(space, operations),
        peak_activation_bits(space, schedule),
        latency(space, operations, times),
    ]
    shape = (len(space), len(space.widths))
    numbers = st.lists(
        st.integers(0, 50), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
    )
    sensitivity = np.array(draw(numbers), np.float64).reshape(shape)
    kept = draw(st.lists(st.sampled_from(range(5)), min_size=1, max_size=3, unique=True))
    return space, sensitivity, [costs[i] for i in kept]


def all_totals(space, sensitivity, costs):
    """Ω of every allocation, shape (N,), and its costs, shape (N, C)."""
    omegas, totals = [], []
    for choice in every_choice(space):
        allocation = Allocation.of(space, [space.widths[c] for c in choice])
        omegas.append(sensitivity[np.arange(len(space)), choice].sum())
        totals.append([cost.of(space, allocation) for cost in costs])
    return np.array(omegas), np.array(totals)


@given(networks(), st.data())
def test_all_budgets_together_agree_with_brute_force(network, data):
    space, sensitivity, costs = network
    omegas, totals = all_totals(*network)
    limits = [
        data.draw(st.integers(low.item() - 2, high.item() + 2))
        for low, high in zip(totals.min(0), totals.max(0), strict=True)
    ]
    fits = totals <= limits
    budgets = [Budget(cost, limit) for cost, limit in zip(costs, limits, strict=True)]
    if fits.all(1).any():
        found = milp_solution(space, sensitivity, budgets)
        assert found.sensitivity == omegas[fits.all(1)].min()
        assert found.gap < 1e-8
        for budget in budgets:
            assert budget.cost.of(space, found.allocation) == found.costs[budget.cost.name]
            assert found.costs[budget.cost.name] <= budget.limit
    else:
        with pytest.raises(InfeasibleBudgetsError) as caught:
            milp_solution(space, sensitivity, budgets)
        for i, verdict in enumerate(caught.value.verdicts):
            others = np.delete(fits, i, 1).all(1)
            assert verdict.least == totals[:, i].min()
            assert verdict.nearest == (totals[others, i].min() if others.any() else None)
            assert verdict.is_feasible_alone == fits[:, i].any()


@given(problems(), st.integers(0, 200))
def test_one_budget_agrees_with_the_exact_front(problem, budget):
    space, sensitivity, cost = problem
    expected = brute_force(space, sensitivity, cost, budget)
    if expected < inf:
        found = milp_solution(space, sensitivity, [Budget(separable("bits", cost), budget)])
        assert found.sensitivity == expected


@pytest.mark.parametrize("num_layers", [6, 8])
def test_eight_layers_agree_with_the_exact_front(num_layers):
    generator = np.random.default_rng(num_layers)
    space = free_space(generator.integers(1, 999, num_layers).tolist(), (2, 3, 4, 8))
    sensitivity = generator.random((num_layers, 1)) * 4.0 ** -np.array(space.widths) * 1e-6
    cost = weight_bits(space)
    front = pareto_front(space, sensitivity, cost)
    for budget in generator.integers(cost[:, 0].sum(), cost[:, -1].sum(), 8).tolist():
        found = milp_solution(space, sensitivity, [Budget(separable("weight_bits", cost), budget)])
        assert found.sensitivity == pytest.approx(front.sensitivity[front.within(budget)], rel=1e-9)
        assert found.gap < 1e-9


@given(networks(), st.sampled_from([2.0**-30, 1024.0]))
@settings(max_examples=30)
def test_scaling_the_loss_scales_the_optimum(network, factor):
    space, sensitivity, costs = network
    _, totals = all_totals(*network)
    budgets = [Budget(c, int(t)) for c, t in zip(costs, np.median(totals, 0), strict=True)]
    try:
        found = milp_solution(space, sensitivity, budgets)
    except InfeasibleBudgetsError:
        return
    scaled = milp_solution(space, factor * sensitivity, budgets)
    assert scaled.sensitivity == factor * found.sensitivity


@given(networks(), st.randoms(use_true_random=False), st.integers(0, 30))
@settings(max_examples=30)
def test_permuting_the_layers_and_more_budget_do_no_harm(network, random, more):
    space, sensitivity, _ = network
    order = random.sample(range(len(space)), len(space))
    permuted = Space(tuple(space.groups[i] for i in order))
    cost = weight_bits(space) + activation_bits(space)
    least = np.where(space.allowed(), cost, 10**6).min(1).sum().item() + 5

    def best(groups, table, costs, limit):
        try:
            return milp_solution(
                groups, table, [Budget(separable("bits", costs), limit)]
            ).sensitivity
        except InfeasibleBudgetsError:  # a tie may need more than each group's least
            return inf

    optimum = best(space, sensitivity, cost, least)
    assert best(permuted, sensitivity[order], cost[order], least) == optimum
    assert best(space, sensitivity, cost, least + more) <= optimum


def test_it_is_no_worse_than_the_monotone_front_and_that_no_worse_than_uniform():
    generator = np.random.default_rng(0)
    space = free_space(generator.integers(1, 999, 12).tolist(), MENU)
    sensitivity = np.sort(generator.random((12, 3)))[:, ::-1]
    cost = weight_bits(space)
    monotone = monotone_front(space, sensitivity, cost, generator.random(12))
    budget = int(cost[:, 1].sum())
    found = milp_solution(space, sensitivity, [Budget(separable("weight_bits", cost), budget)])
    at = monotone.sensitivity[monotone.within(budget)]
    assert found.sensitivity <= at * (1 + 1e-12) <= sensitivity[:, 1].sum() * (1 + 1e-12)


def test_costs_of_very_different_size_are_met_to_the_last_unit():
    # Every limit is the exact cost of some allocation: one unit less must not be let through.
    generator = np.random.default_rng(3)
    space = free_space(generator.integers(10**6, 10**9, 10).tolist(), MENU)
    sensitivity = generator.random((10, 1)) * 4.0 ** -np.array(MENU)
    cost = weight_bits(space)
    front = pareto_front(space, sensitivity, cost)
    for point in np.linspace(1, len(front) - 1, 7).astype(int):
        for short in (0, 1):
            budget = Budget(separable("weight_bits", cost), int(front.cost[point]) - short)
            found = milp_solution(space, sensitivity, [budget])
            assert found.costs["weight_bits"] <= budget.limit
            assert found.sensitivity == pytest.approx(front.sensitivity[point - short], rel=1e-9)


SPACE = Space((Group("w:l", 10, 0, MENU), Group("w:m", 10, 0, MENU), Group("a:l#0", 4, 0, (4, 8))))
READS = [Operation("w:l", "a:l#0", 5), Operation("w:m", "a:l#0", 5)]
OMEGA = np.array([[9.0, 4, 0], [9, 3, 0], [0, 6, 0]])
SIZE, BOPS = separable("weight_bits", weight_bits(SPACE)), bit_operations(SPACE, READS)


def test_a_shared_tensor_has_one_width_for_all_its_readers():
    # 8-bit weights and 4-bit activations cost as much as the reverse, for both layers at once.
    found = milp_solution(SPACE, OMEGA, [Budget(BOPS, 5 * 2 * 32)])
    assert found.allocation.bits == (8, 8, 4)
    assert found.costs == {"bops": 320}


def test_budgets_that_cannot_be_met_are_explained():
    with pytest.raises(InfeasibleBudgetsError) as caught:
        milp_solution(SPACE, OMEGA, [Budget(SIZE, 39), Budget(BOPS, 100)])
    size, operations = caught.value.verdicts
    assert size.least == 40
    assert not size.is_feasible_alone
    assert operations.least == 80
    assert operations.nearest is None
    assert str(caught.value) == (
        "no allocation is within all budgets: weight_bits ≤ 39 is too small even alone: "
        "at least 40; bops ≤ 100 can be met alone (least 80)"
    )


def test_budgets_that_exclude_each_other_say_what_would_do():
    # The more weight bits the faster, as on hardware without an instruction for few bits.
    times = {"l": {2: 30, 4: 20, 8: 10}, "m": {2: 30, 4: 20, 8: 10}}
    slow = latency(SPACE, READS, times)
    with pytest.raises(InfeasibleBudgetsError) as caught:
        milp_solution(SPACE, OMEGA, [Budget(SIZE, 80), Budget(slow, 30)])
    assert [(v.least, v.nearest) for v in caught.value.verdicts] == [(40, 120), (20, 40)]
    assert "latency_ns ≤ 30 can be met alone (least 20), with the others 40" in str(caught.value)


def hard():
    """A programme that takes longer than a moment."""
    generator = np.random.default_rng(0)
    space = free_space(generator.integers(10**6, 10**7, 25).tolist(), range(1, 9))
    costs = [
        Budget(separable(f"cost{i}_bits", generator.integers(1, 10**6, (25, 8))), 9 * 10**6)
        for i in range(4)
    ]
    return space, generator.random((25, 8)), costs


def test_a_gap_that_is_allowed_is_stated():
    exact, loose = (milp_solution(*hard(), max_gap=gap) for gap in (0.0, 0.5))
    assert loose.bound <= exact.sensitivity <= loose.sensitivity
    assert loose.gap <= 0.5
    assert exact.gap < 1e-8


def test_too_little_time_for_any_allocation_is_an_error():
    with pytest.raises(TimeoutError, match="no allocation within the budgets was found in 1e-06 s"):
        milp_solution(*hard(), max_seconds=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": []}, r"at least one, of different costs, got \[\]"),
        ({"budgets": [Budget(SIZE, 99)] * 2}, "of different costs"),
        ({"budgets": [Budget(separable("x_bits", weight_bits(SPACE)[:2]), 9)]}, r"got \(2, 3\)"),
        ({"sensitivity": np.full((3, 3), np.nan)}, "must not hold NaN"),
        ({"max_gap": -1}, "max_gap must not be negative"),
        ({"max_gap": np.nan}, "max_gap must not be negative"),
        ({"max_seconds": 0}, "max_seconds positive"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    arguments = {"space": SPACE, "sensitivity": OMEGA, "budgets": [Budget(SIZE, 99)]} | change
    with pytest.raises(ValueError, match=message):
        milp_solution(**arguments)


def test_tied_groups_choose_from_what_their_menus_share():
    groups = (Group("w:l", 1, 0, (2, 4), "t"), Group("a:l#0", 1, 0, (4, 8), "t"))
    space = Space(groups)
    cost = bit_operations(space, [Operation("w:l", "a:l#0", 3)])
    found = milp_solution(space, np.ones((2, 3)), [Budget(cost, 48)])
    assert found.allocation.bits == (4, 4)
    with pytest.raises(ValueError, match="must have a bit-width in common, got w:l, a:l#0"):
        Space((groups[0], Group("a:l#0", 1, 0, (8,), "t")))


# The exact front over one cost while another is limited.


@given(problems(), st.integers(0, 150), st.data())
def test_the_constrained_front_is_that_of_all_allocations_within_the_limit(problem, limit, data):
    space, sensitivity, cost = problem
    cells = st.lists(st.integers(0, 40), min_size=cost.size, max_size=cost.size)
    limited = np.array(data.draw(cells)).reshape(cost.shape)
    limited[data.draw(st.integers(0, len(space))) :] = 3  # these do not touch the limit
    omegas, totals = all_totals(space, sensitivity, [separable("x", cost), separable("y", limited)])
    inside = totals[:, 1] <= limit
    if not inside.any():
        with pytest.raises(InfeasibleBudgetError) as caught:
            constrained_front(space, sensitivity, cost, limited, limit)
        assert caught.value.minimum == totals[:, 1].min()
        return
    front = constrained_front(space, sensitivity, cost, limited, limit)
    assert front.cost[0] == totals[inside, 0].min()
    for budget in np.unique(totals[inside, 0]).tolist():
        expected = omegas[inside & (totals[:, 0] <= budget)].min()
        assert front.sensitivity[front.within(budget)] == expected
    assert (np.diff(front.sensitivity) < 0).all()
    for point in range(len(front)):
        choice = front.allocation(point).choice(space)
        assert limited[np.arange(len(space)), choice].sum() <= limit


@pytest.mark.parametrize("num_points", [1, 7, 48, 49, 500])
@pytest.mark.parametrize("largest", [3, 40, 10**6])  # with many points alike, and with none
def test_exactly_the_undominated_points_are_kept(num_points, largest):
    generator = np.random.default_rng(num_points)
    first, second, loss = points = generator.integers(0, largest, (3, num_points))
    kept = undominated_in_three(first, second, loss.astype(float)).tolist()
    expected = {
        tuple(point)
        for point in points.T.tolist()
        if not any((other <= point).all() and (other < point).any() for other in points.T)
    }
    assert len(kept) == len(expected)  # one of those alike
    assert {tuple(points[:, i].tolist()) for i in kept} == expected


def joint_space(num_layers, menu=MENU):
    generator = np.random.default_rng(5)
    groups = [
        Group(f"{kind}:l{i}{end}", int(generator.integers(1, 99)), 0, menu)
        for i in range(num_layers)
        for kind, end in (("w", ""), ("a", "#0"))
    ]
    space = Space(tuple(groups))
    table = generator.random((len(space), 1)) * 4.0 ** -np.array(menu)
    return space, table


def test_the_front_over_weights_and_activations_agrees_with_the_integer_programme():
    space, sensitivity = joint_space(8)
    size, memory = weight_bits(space), activation_bits(space)
    limit = int(memory[:, 1].sum())
    front = constrained_front(space, sensitivity, size, memory, limit)
    for budget in np.linspace(front.cost[0], front.cost[-1], 5).astype(int).tolist():
        found = milp_solution(
            space,
            sensitivity,
            [
                Budget(separable("weight_bits", size), budget),
                Budget(separable("activation_bits", memory), limit),
            ],
        )
        assert found.sensitivity == pytest.approx(front.sensitivity[front.within(budget)], rel=1e-9)


def test_many_undominated_allocations_in_three_quantities_are_found():
    # Both costs in every row, so that dominance in three quantities is not a matter of two.
    generator = np.random.default_rng(6)
    space = free_space([1] * 7, MENU)
    cost, limited = np.sort(generator.integers(0, 99, (2, 7, 3)))
    sensitivity = -np.sort(-generator.random((7, 3)))
    omegas, totals = all_totals(space, sensitivity, [separable("x", cost), separable("y", limited)])
    limit = int(np.median(totals[:, 1]))
    front = constrained_front(space, sensitivity, cost, limited, limit)
    inside = totals[:, 1] <= limit
    for budget in front.cost.tolist():
        expected = omegas[inside & (totals[:, 0] <= budget)].min()
        assert front.sensitivity[front.within(budget)] == pytest.approx(expected, rel=1e-12)


def test_a_front_that_would_be_too_large_is_refused():
    generator = np.random.default_rng(7)
    space = free_space([1] * 8, MENU)
    cost, limited = np.sort(generator.integers(0, 10**6, (2, 8, 3)))
    with pytest.raises(FrontTooLargeError, match="must stay within 100 points, got") as caught:
        constrained_front(
            space, -np.sort(-generator.random((8, 3))), cost, limited, 8 * 10**6, max_points=100
        )
    assert caught.value.num_points > caught.value.max_points == 100


def test_the_solver_prints_nothing(capfd):
    # On this one HiGHS mends a solution that rounding left infeasible, and prints a line on it.
    generator = np.random.default_rng(10)
    space = free_space(generator.integers(10**6, 10**7, 40).tolist(), range(1, 9))
    tables = [generator.integers(1, 10**6, (40, 8)) for _ in range(2)]
    budgets = [
        Budget(separable(f"cost{i}_bits", table), 12 * 10**6) for i, table in enumerate(tables)
    ]
    milp_solution(space, generator.random((40, 8)), budgets)
    assert capfd.readouterr() == ("", "")
    os.write(1, b"still here\n")
    assert capfd.readouterr().out == "still here\n"
