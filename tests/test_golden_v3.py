"""HAWQ-V3's integer programmes (Yao et al., 2021), from the arrays that its authors published.

Optima with no gap, to the digits known; ``test_allocate.py`` has them from the exact front. Here a
layer's weights and activations are two tied groups, and bit operations the product that they are.
"""

import json

import numpy as np
import pytest
from test_allocate import GOLDEN, TIES, integer_programme

from hawq.allocate import (
    Budget,
    InfeasibleBudgetsError,
    constrained_front,
    lagrangian_solution,
    milp_solution,
    pareto_front,
)
from hawq.cost import Operation, bit_operations, latency, separable
from hawq.space import Group, Space

pytestmark = pytest.mark.data

FRACTIONS = (0.25, 0.5, 0.75)
UNIT = 1e8  # the arrays are decimal numbers of Mi, G and ms: their digits as integers


@pytest.fixture(scope="module")
def published(data_root):
    path = data_root / "hawqv3_ilp.json"
    if not path.is_file():
        pytest.skip(f"no {path.name} in the folder of the real data sets")
    return json.loads(path.read_text())


def joint_programme(arrays, ties):
    """Weights and activations as tied groups: the space, Ω, and all three costs."""
    single, sensitivity, size = integer_programme(arrays, ties, "size")
    num_layers = len(single)
    groups = [Group(f"w:{i}", 1, 0, (4, 8), g.tie or f"l{i}") for i, g in enumerate(single.groups)]
    groups += [Group(f"a:{i}#0", 1, 0, (4, 8), g.tie) for i, g in enumerate(groups)]
    space = Space(tuple(groups))
    zeros = np.zeros((num_layers, 2), np.int64)
    macs = np.rint(np.array(arrays["bops"]) * UNIT).astype(int).tolist()
    reads = [Operation(f"w:{i}", f"a:{i}#0", macs[i]) for i in range(num_layers)]
    nanoseconds = {
        str(i): {(4, 4): round(int4 * UNIT), (8, 8): round(int8 * UNIT)}
        for i, (int4, int8) in enumerate(
            zip(arrays["latency_int4"], arrays["latency_int8"], strict=True)
        )
    }
    costs = {
        "size": separable("weight_bits", np.vstack([size, zeros])),
        "bops": bit_operations(space, reads),
        "latency": latency(space, reads, nanoseconds),
    }
    return space, np.vstack([sensitivity, zeros]), costs


def budget_at(space, cost, fraction):
    """The limit between all-4 and all-8 bits."""
    low, high = (_uniform_cost(space, cost, column) for column in (0, 1))
    return Budget(cost, round(low + fraction * (high - low)))


def _uniform_cost(space, cost, column):
    return int(cost.steps[0, :, column].sum()) + sum(
        int(pair.table[column, column]) for pair in cost.pairs
    )


@pytest.mark.parametrize(("network", "kind", "fraction", "omega", "bits"), GOLDEN)
def test_the_optima_of_products_of_tied_weights_and_activations(
    published,
    network,
    kind,
    fraction,
    omega,
    bits,
):
    space, sensitivity, costs = joint_programme(published[network], TIES[network])
    found = milp_solution(space, sensitivity, [budget_at(space, costs[kind], fraction)])
    assert found.sensitivity == pytest.approx(omega, abs=5e-7)
    assert found.gap < 1e-8
    assert "".join(map(str, found.allocation.bits)) == bits * 2


@pytest.mark.parametrize("network", ["r18", "r50"])
@pytest.mark.parametrize("kind", ["size", "bops", "latency"])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_three_algorithms_find_one_optimum(published, network, kind, fraction):
    space, sensitivity, cost = integer_programme(published[network], TIES[network], kind)
    low, high = cost.sum(0).tolist()
    budget = round(low + fraction * (high - low))
    front = pareto_front(space, sensitivity, cost)
    optimum = front.sensitivity[front.within(budget)]
    solved = milp_solution(space, sensitivity, [Budget(separable("cost", cost), budget)])
    swept = lagrangian_solution(space, sensitivity, cost, budget)
    assert solved.sensitivity == pytest.approx(optimum, rel=1e-12)
    assert swept.sensitivity == pytest.approx(optimum, rel=1e-12)
    assert swept.bound <= optimum * (1 + 1e-12)
    assert swept.gap < 1e-12


@pytest.mark.parametrize("network", ["r18", "r50"])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_all_three_budgets_together(published, network, fraction):
    space, sensitivity, costs = joint_programme(published[network], TIES[network])
    budgets = {kind: budget_at(space, cost, fraction) for kind, cost in costs.items()}
    found = milp_solution(space, sensitivity, list(budgets.values()))
    alone = [milp_solution(space, sensitivity, [b]).sensitivity for b in budgets.values()]
    assert found.sensitivity >= max(alone) * (1 - 1e-12)
    for budget in budgets.values():
        assert found.costs[budget.cost.name] <= budget.limit


def test_two_budgets_agree_with_the_front_under_the_other_one(published):
    ties = TIES["r18"]
    space, sensitivity, size = integer_programme(published["r18"], ties, "size")
    _, _, operations = integer_programme(published["r18"], ties, "bops")
    budgets = [
        budget_at(space, separable(name, table), 0.5)
        for name, table in (("weight_bits", size), ("bops", operations))
    ]
    front = constrained_front(space, sensitivity, size, operations, budgets[1].limit)
    found = milp_solution(space, sensitivity, budgets)
    expected = front.sensitivity[front.within(budgets[0].limit)]
    assert found.sensitivity == pytest.approx(expected, rel=1e-12)


def test_less_than_all_four_bits_is_said_to_be_too_small(published):
    space, sensitivity, costs = joint_programme(published["r18"], TIES["r18"])
    budgets = [budget_at(space, costs["size"], -0.1), budget_at(space, costs["bops"], 0.5)]
    with pytest.raises(InfeasibleBudgetsError) as caught:
        milp_solution(space, sensitivity, budgets)
    size, operations = caught.value.verdicts
    assert size.least == budget_at(space, costs["size"], 0).limit
    assert operations.is_feasible_alone
