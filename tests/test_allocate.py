import json
from itertools import combinations_with_replacement
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import brute_force, evaluate, every_choice, free_space
from scipy.optimize import Bounds, LinearConstraint, milp

from hawq.allocate import InfeasibleBudgetError, monotone_front, pareto_front
from hawq.allocate.monotone import monotone_count
from hawq.cost import weight_bits
from hawq.space import Group, Space

MENU = (2, 4, 8)


@st.composite
def problems(draw, max_layers=5, tied=True):
    """A space with ties and pins, and tables of small integers, whose sums are exact."""
    num_layers = draw(st.integers(1, max_layers))
    menus = st.sampled_from([(2,), (8,), (2, 4), (2, 4, 8), (2, 4, 8)]) if tied else st.just(MENU)
    ties = st.sampled_from([None, None, "t"]) if tied else st.none()
    groups = []
    for i in range(num_layers):
        tie = draw(ties)
        menu = MENU if tie else draw(menus)
        groups.append(Group(f"w:l{i}", draw(st.integers(1, 9)), 0, menu, tie))
    space = Space(tuple(groups))
    shape = (num_layers, len(space.widths))
    integers = st.lists(
        st.integers(0, 50), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
    )
    sensitivity = np.array(draw(integers), np.float64).reshape(shape)
    cost = np.array(draw(integers), np.int64).reshape(shape)
    return space, sensitivity, cost


@given(problems(), st.integers(0, 200))
def test_the_exact_front_agrees_with_brute_force(problem, budget):
    space, sensitivity, cost = problem
    front = pareto_front(*problem)
    expected = brute_force(space, sensitivity, cost, budget)
    if expected == inf:
        with pytest.raises(InfeasibleBudgetError):
            front.within(budget)
    else:
        point = front.within(budget)
        assert front.cost[point] <= budget
        assert front.sensitivity[point] == expected


@pytest.mark.parametrize("menu", [(4, 8), (2, 4, 8), (1, 2, 4, 8)])
def test_six_layers_agree_with_brute_force_at_every_budget(menu):
    generator = np.random.default_rng(0)
    space = free_space(generator.integers(1, 99, 6).tolist(), menu)
    sensitivity = generator.random((6, len(menu)))
    cost = weight_bits(space)
    choices = list(every_choice(space))
    totals = np.array([evaluate(cost, c) for c in choices])
    losses = np.array([evaluate(sensitivity, c) for c in choices])
    front = pareto_front(space, sensitivity, cost)
    for budget in np.unique(totals).tolist():
        expected = losses[totals <= budget].min()
        assert front.sensitivity[front.within(budget)] == pytest.approx(expected, rel=1e-12)


@given(problems())
def test_fronts_trade_cost_for_sensitivity_strictly(problem):
    front = pareto_front(*problem)
    assert (np.diff(front.cost) > 0).all()
    assert (np.diff(front.sensitivity) < 0).all()


@given(problems(), st.integers(0, 200), st.integers(0, 50))
def test_more_budget_is_never_worse(problem, budget, more):
    front = pareto_front(*problem)
    if budget >= front.cost[0]:
        better = front.sensitivity[front.within(budget + more)]
        assert better <= front.sensitivity[front.within(budget)]


@given(problems())
def test_every_point_is_an_allocation_with_the_costs_it_claims(problem):
    space, sensitivity, cost = problem
    front = pareto_front(*problem)
    for point in range(len(front)):
        choice = front.allocation(point).choice(space).tolist()  # refuses broken ties and menus
        assert evaluate(cost, choice) == front.cost[point]
        assert evaluate(sensitivity, choice) == front.sensitivity[point]


@given(problems(tied=False), st.randoms(use_true_random=False))
def test_permuting_the_layers_permutes_the_answer(problem, random):
    space, sensitivity, cost = problem
    # Distinct subset sums leave one optimum, so that the allocations can be compared.
    sensitivity = sensitivity + np.exp2(np.arange(sensitivity.size).reshape(cost.shape) - 20)
    order = random.sample(range(len(space)), len(space))
    permuted = Space(tuple(space.groups[i] for i in order))
    front = pareto_front(space, sensitivity, cost)
    other = pareto_front(permuted, sensitivity[order], cost[order])
    np.testing.assert_array_equal(other.cost, front.cost)
    np.testing.assert_array_equal(other.choice, front.choice[:, order])


@given(problems(), st.sampled_from([0.25, 2, 1024]))
def test_scaling_the_loss_leaves_the_allocations(problem, factor):
    space, sensitivity, cost = problem
    scaled = pareto_front(space, factor * sensitivity, cost)
    np.testing.assert_array_equal(scaled.choice, pareto_front(*problem).choice)


@given(problems(tied=False), st.lists(st.integers(1, 99), min_size=5, max_size=5))
def test_monotone_fronts_equal_the_enumeration_of_all_staircases(problem, averages):
    space, sensitivity, cost = problem
    sizes = np.array([group.num_elements for group in space.groups])
    traces = np.array(averages[: len(space)]) * sizes.astype(float)
    order = np.argsort(-traces / sizes, kind="stable")
    staircases = []
    for descending in combinations_with_replacement(range(len(MENU))[::-1], len(space)):
        choice = np.empty(len(space), int)
        choice[order] = descending
        staircases.append((evaluate(cost, choice), evaluate(sensitivity, choice)))
    expected, best = [], inf
    for total, loss in sorted(staircases):
        if loss < best:
            expected.append((total, loss))
            best = loss
    front = monotone_front(space, sensitivity, cost, traces)
    assert list(zip(front.cost.tolist(), front.sensitivity.tolist(), strict=True)) == expected


@pytest.mark.parametrize(
    ("layers", "widths", "count"), [(50, 4, 23426), (20, 4, 1771), (54, 4, 29260)]
)
def test_the_number_of_staircases_is_the_paper_s(layers, widths, count):
    assert monotone_count(layers, widths) == count


def test_the_number_of_staircases_is_that_of_the_enumeration():
    assert monotone_count(5, 3) == len(list(combinations_with_replacement(range(3), 5)))


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
@settings(max_examples=50)
def test_exact_is_no_worse_than_monotone_and_monotone_no_worse_than_uniform(seed, num_layers):
    generator = np.random.default_rng(seed)
    space = free_space(generator.integers(1, 999, num_layers).tolist(), MENU)
    sensitivity = np.sort(generator.random((num_layers, 3)))[:, ::-1]
    traces, cost = generator.random(num_layers), weight_bits(space)
    exact = pareto_front(space, sensitivity, cost)
    monotone = monotone_front(space, sensitivity, cost, traces)
    for column in range(3):
        budget = int(cost[:, column].sum())
        uniform = sensitivity[:, column].sum()
        at = monotone.sensitivity[monotone.within(budget)]
        assert exact.sensitivity[exact.within(budget)] <= at * (1 + 1e-12)
        assert at <= uniform * (1 + 1e-12)


def test_in_a_monotone_front_a_larger_average_trace_never_gets_fewer_bits():
    generator = np.random.default_rng(1)
    space = free_space(generator.integers(1, 999, 12).tolist(), MENU)
    traces, sensitivity = generator.random(12), generator.random((12, 3))
    sizes = np.array([group.num_elements for group in space.groups])
    front = monotone_front(space, sensitivity, weight_bits(space), traces)
    assert len(front) > 1
    ordered = front.choice[:, np.argsort(-traces / sizes)]
    assert (np.diff(ordered.astype(int)) <= 0).all()


def test_a_pinned_layer_stands_outside_the_monotone_order():
    space = free_space([1, 1, 1], (2, 8)).pinned({"l0": 2})
    sensitivity = np.array([[9.0, np.inf], [9, 0], [9, 0]])
    # l0 has the largest trace and two bits; the others may still receive eight.
    front = monotone_front(space, sensitivity, weight_bits(space), np.array([3.0, 2, 1]))
    assert front.allocation(len(front) - 1).bits == (2, 8, 8)


def test_tied_layers_are_ordered_by_their_average_together():
    groups = [
        Group("w:a", 1, 0, (2, 8), "t"),
        Group("w:b", 9, 0, (2, 8), "t"),
        Group("w:c", 1, 0, (2, 8)),
    ]
    space = Space(tuple(groups))
    sensitivity = np.array([[1.0, 0], [1, 0], [5, 0]])
    # Averages: a 10 alone, but (10 + 0) / (1 + 9) = 1 with b, less than c's 5.
    front = monotone_front(space, sensitivity, weight_bits(space), np.array([10.0, 0, 5]))
    assert [front.allocation(i).bits for i in range(len(front))] == [
        (2, 2, 2),
        (2, 2, 8),
        (8, 8, 8),
    ]


def test_a_layer_with_a_menu_of_its_own_stands_outside_the_monotone_order():
    # The last group, of the least trace, may not go below 8 bits; the others may all the same.
    space = Space(
        tuple(
            Group(f"w:l{i}", 10, 0, menu) for i, menu in enumerate([(2, 4)] * 2 + [(8,)] + [(4, 8)])
        )
    )
    traces = np.array([3.0, 2.0, 1.0, 0.5])
    sensitivity = np.where(space.allowed(), traces[:, None] * [4.0, 1.0, 0.1], np.inf)
    front = monotone_front(space, sensitivity, weight_bits(space), traces)
    allowed = [(a, b, 8, d) for a in (2, 4) for b in (2, 4) for d in (4, 8) if a >= b]
    brute = {
        bits: sum(sensitivity[i, space.widths.index(b)] for i, b in enumerate(bits))
        for bits in allowed
    }
    kept = {
        bits
        for bits, omega in brute.items()
        if not any(
            sum(other) <= sum(bits)
            and brute[other] <= omega
            and other != bits
            and (sum(other), brute[other]) != (sum(bits), omega)
            for other in allowed
        )
    }
    assert {front.allocation(i).bits for i in range(len(front))} == kept


def test_monotone_fronts_need_finite_traces():
    space = free_space([1, 1], (2, 4))
    with pytest.raises(ValueError, match="traces must be 2 finite numbers"):
        monotone_front(space, np.zeros((2, 2)), np.zeros((2, 2), int), np.array([1, np.nan]))


@pytest.mark.parametrize("algorithm", ["pareto", "monotone"])
def test_a_space_of_pins_alone_has_one_point(algorithm):
    space = free_space([3, 5], (2, 8)).pinned({"l0": 8, "l1": 2})
    tables = np.ones((2, 2)), weight_bits(space)
    front = (
        pareto_front(space, *tables)
        if algorithm == "pareto"
        else monotone_front(space, *tables, np.ones(2))
    )
    assert front.cost.tolist() == [34]
    assert front.allocation(0).bits == (8, 2)


def test_the_ends_of_a_front_are_the_smallest_and_the_least_sensitive():
    space = free_space([3, 5, 7], MENU)
    front = pareto_front(space, np.array([[9.0, 3, 1]] * 3), weight_bits(space))
    assert front.allocation(0).bits == (2, 2, 2)
    assert front.allocation(len(front) - 1).bits == (8, 8, 8)


def test_a_budget_that_nothing_fits_names_the_least_that_would_do():
    space = free_space([3, 4], (2, 4))
    front = pareto_front(space, np.zeros((2, 2)), weight_bits(space))
    with pytest.raises(InfeasibleBudgetError, match="budget must be at least 14, got 13") as caught:
        front.within(13)
    assert (caught.value.budget, caught.value.minimum) == (13, 14)
    assert front.within(14) == 0


@pytest.mark.parametrize(
    ("sensitivity", "cost", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 2), int), r"must have shape \(2, 2\), got \(2, 3\)"),
        (np.full((2, 2), np.nan), np.zeros((2, 2), int), "must not hold NaN"),
        (np.zeros((2, 2)), np.full((2, 2), -1), "nor cost negative numbers"),
        (np.array([[1, 0], [inf, inf]]), np.zeros((2, 2), int), "got none for w:l1"),
    ],
)
def test_tables_that_make_no_sense_are_refused(sensitivity, cost, message):
    with pytest.raises(ValueError, match=message):
        pareto_front(free_space([1, 1], (2, 4)), sensitivity, cost)


def test_fifty_four_layers_and_eight_widths_are_solved_for_all_budgets():
    generator = np.random.default_rng(0)
    space = free_space((64 * generator.integers(1, 500, 54)).tolist(), range(1, 9))
    sensitivity = generator.random((54, 1)) * 4.0 ** -np.arange(8)
    traces = generator.random(54)
    front = monotone_front(space, sensitivity, weight_bits(space), traces)
    assert monotone_count(54, 8) > 400_000_000
    assert len(front) > 1000


# The optimal bits of HAWQ-V3's integer programmes (Yao et al., 2021), solved with no gap from the
# arrays that its authors published. A limit lies between all-4 and all-8 bits.
GOLDEN = [
    ("r18", "size", 0.25, 0.118300, "8888888888888844444"),
    ("r18", "size", 0.50, 0.074506, "8888888888888884844"),
    ("r18", "size", 0.75, 0.033441, "8888888888888488884"),
    ("r18", "bops", 0.25, 0.460424, "8884848444444444444"),
    ("r18", "bops", 0.50, 0.215689, "8884888848884444444"),
    ("r18", "bops", 0.75, 0.079965, "8888888848888484884"),
    ("r18", "latency", 0.50, 0.202674, "8888848848884484844"),
    ("r50", "size", 0.50, 0.031024, "8888888888888888888888884888888448888488488488844844"),
    ("r50", "bops", 0.50, 0.056440, "8888888848848884884484884888448448448448488488848848"),
    ("r50", "latency", 0.50, 0.054861, "8888888844848888884884884884448448448448448488848848"),
]
TIES = {
    "r18": [(4, 6), (9, 11), (14, 16)],
    "r50": [(0, 3), (10, 13), (23, 26), (42, 45)],
}


@pytest.fixture(scope="session")
def published(data_root):
    path = data_root / "hawqv3_ilp.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the folder of the real data sets")
    return json.loads(path.read_text())


def integer_programme(arrays, ties, kind):
    """The space, its sensitivities and its costs, shape (L, 2), columns 4 and 8 bits."""
    traces = np.array(arrays["Hutchinson_trace"])  # already divided by the number of weights
    errors = [arrays["delta_weights_4bit_square"], arrays["delta_weights_8bit_square"]]
    tie = {layer: f"t{i}" for i, pair in enumerate(ties) for layer in pair}
    groups = [Group(f"w:{i}", 1, 0, (4, 8), tie.get(i)) for i in range(len(traces))]
    if kind == "latency":
        cost = np.array([arrays["latency_int4"], arrays["latency_int8"]]).T
    else:
        factors = [4, 8] if kind == "size" else [16, 64]  # weights and activations share bits
        cost = np.outer(arrays["parameters" if kind == "size" else "bops"], factors)
    return (
        Space(tuple(groups)),
        traces[:, None] * np.array(errors).T,
        np.rint(cost * 1e8).astype(int),
    )


@pytest.mark.data
@pytest.mark.parametrize(("network", "kind", "fraction", "omega", "bits"), GOLDEN)
def test_published_integer_programmes_have_their_known_optima(
    published, network, kind, fraction, omega, bits
):
    space, sensitivity, cost = integer_programme(published[network], TIES[network], kind)
    low, high = cost.sum(0).tolist()
    front = pareto_front(space, sensitivity, cost)
    point = front.within(round(low + fraction * (high - low)))
    assert front.sensitivity[point] == pytest.approx(omega, abs=5e-7)
    assert "".join(map(str, front.allocation(point).bits)) == bits


@pytest.mark.data
@pytest.mark.parametrize(("network", "kind", "fraction"), [golden[:3] for golden in GOLDEN])
def test_a_solver_of_integer_programmes_finds_nothing_better(published, network, kind, fraction):
    space, sensitivity, cost = integer_programme(published[network], TIES[network], kind)
    low, high = cost.sum(0).tolist()
    budget = round(low + fraction * (high - low))
    # One variable a layer, 1 where it has eight bits; tied variables are equal.
    tied = np.zeros((len(TIES[network]), len(space)))
    for row, (a, b) in enumerate(TIES[network]):
        tied[row, [a, b]] = 1, -1
    solution = milp(
        sensitivity[:, 1] - sensitivity[:, 0],
        integrality=np.ones(len(space)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint((cost[:, 1] - cost[:, 0]) / high, ub=(budget - low) / high),
            LinearConstraint(tied, 0, 0),
        ],
        options={"mip_rel_gap": 0},
    )
    assert solution.success
    front = pareto_front(space, sensitivity, cost)
    expected = solution.fun + sensitivity[:, 0].sum()
    assert front.sensitivity[front.within(budget)] == pytest.approx(expected, rel=1e-6)


@pytest.mark.data
@pytest.mark.parametrize(
    ("network", "all4", "all8"), [("r18", 1.307713, 0.004258), ("r50", 0.906337, 0.003050)]
)
def test_published_fronts_end_at_all_four_and_all_eight_bits(published, network, all4, all8):
    front = pareto_front(*integer_programme(published[network], TIES[network], "size"))
    assert front.sensitivity[0] == pytest.approx(all4, abs=5e-7)
    assert front.sensitivity[-1] == pytest.approx(all8, abs=5e-7)


@pytest.mark.data
@pytest.mark.parametrize(
    ("network", "fraction", "omega"),
    [("r18", 0.75, 0.04527), ("r50", 0.25, 0.07949), ("r50", 0.5, 0.03344)],
)
def test_the_monotone_restriction_costs_what_it_is_known_to_cost(
    published, network, fraction, omega
):
    space, sensitivity, cost = integer_programme(published[network], [], "size")
    traces = np.array(published[network]["Hutchinson_trace"])
    low, high = cost.sum(0).tolist()
    front = monotone_front(space, sensitivity, cost, traces)
    point = front.within(round(low + fraction * (high - low)))
    assert front.sensitivity[point] == pytest.approx(omega, abs=5e-6)
