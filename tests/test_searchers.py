"""The contract of every searcher: within the budget, distinct, and the same for the same seed."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hawq.allocate import InfeasibleBudgetError, InfeasibleBudgetsError
from hawq.allocation import Allocation
from hawq.cost import (
    Operation,
    activation_bits,
    bit_operations,
    peak_activation_bits,
    separable,
    weight_bits,
)
from hawq.space import Group, Space
from search.artefacts import BlockEigenvalue
from search.evaluate import Evaluation, evaluation_key
from search.searchers import SEARCHERS, Problem
from search.tables import Tables

# Those that score what they try: test_searches.py.
UNSCORED = [name for name, searcher in SEARCHERS.items() if not searcher.needs_scores]


def make_tables(sizes, menu, seed, pinned=None, tensors=()):
    groups = [Group(f"w:l{i}", n, 1, tuple(menu)) for i, n in enumerate(sizes)]
    groups += [Group(f"a:l{i}#0", n, 1, tuple(menu)) for i, n in enumerate(tensors)]
    space = Space(tuple(groups)).pinned(pinned or {})
    rng = np.random.default_rng(seed)
    traces = rng.lognormal(size=len(space))
    table = traces[:, None] * 4.0 ** -np.array(space.widths)
    sensitivity = np.where(space.allowed(), table, np.inf)
    costs = [separable("weight_bits", weight_bits(space))]
    if tensors:
        operations = [
            Operation(f"w:l{i}", f"a:l{i % len(tensors)}#0", 7 * n) for i, n in enumerate(sizes)
        ]
        names = [name for name in space.names if name.startswith("a:")]
        costs += [
            separable("activation_bits", activation_bits(space)),
            peak_activation_bits(space, [names[i : i + 2] for i in range(len(names))]),
            bit_operations(space, operations),
        ]
    by_name = {cost.name: cost for cost in costs}
    elements = np.array([group.num_elements for group in space.groups])
    squared = (elements * rng.lognormal(size=len(space)))[:, None] * 4.0 ** -np.array(space.widths)
    blocks = () if tensors else tuple(make_blocks(sizes, rng))
    return Tables(space, sensitivity, by_name, traces, 0.1 * traces, squared, blocks)


def make_blocks(sizes, rng):
    """Make up the eigenvalues of blocks of two layers each, and one of the rest."""
    for first in range(0, len(sizes), 2):
        yield BlockEigenvalue(
            block=f"b{first}",
            layers=[f"l{i}" for i in range(first, min(first + 2, len(sizes)))],
            n=sum(sizes[first : first + 2]),
            eigenvalue=float(rng.lognormal()),
            residual=0.0,
            data_error=0.0,
            iterations=1,
            converged=True,
        )


def make_problem(tables, **limits):
    return Problem(tables, tables.budgets(limits), tables.proxy)


def best(method, problem, seed=0):
    found = list(SEARCHERS[method].search(problem, evaluations=8, seed=seed))
    return max(found, key=lambda evaluation: evaluation.score)


problems = st.builds(
    lambda sizes, menu, share, seed: (make_tables(sizes, sorted(menu), seed), share),
    st.lists(st.integers(1, 500), min_size=1, max_size=7),
    st.sets(st.integers(1, 8), min_size=1, max_size=5),
    st.floats(0, 1),
    st.integers(0, 99),
)


def with_budget(tables, share, names=("weight_bits",)):
    """Limit costs at a share of the way from the least to the most."""
    space = tables.space
    ends = [Allocation.of(space, [g.menu[end] for g in space.groups]) for end in (0, -1)]
    limits = {}
    for name in names:
        least, most = (tables.costs[name].of(space, end) for end in ends)
        limits[name] = int(least + share * (most - least))
    return make_problem(tables, **limits)


@pytest.mark.parametrize("method", UNSCORED)
@given(drawn=problems)
def test_proposes_distinct_allocations_within_the_budget(method, drawn):
    problem = with_budget(*drawn)
    found = list(SEARCHERS[method].search(problem, evaluations=8, seed=0))
    assert 1 <= len(found) <= 8
    assert len({evaluation.allocation.digest for evaluation in found}) == len(found)
    (budget,) = problem.budgets
    for evaluation in found:
        assert budget.cost.of(problem.tables.space, evaluation.allocation) <= budget.limit


@pytest.mark.parametrize("method", UNSCORED)
@given(drawn=problems, seed=st.integers(0, 9))
def test_finds_the_same_for_the_same_seed(method, drawn, seed):
    problem = with_budget(*drawn)
    assert best(method, problem, seed) == best(method, problem, seed)


@given(drawn=problems)
def test_exact_is_never_worse_than_the_others_and_says_so(drawn):
    problem = with_budget(*drawn)
    found = {method: best(method, problem) for method in UNSCORED}
    for method, evaluation in found.items():
        assert -found["exact"].score <= -evaluation.score * (1 + 1e-12), method
    assert found["exact"].bound == pytest.approx(-found["exact"].score)
    assert found["channel"].bound <= -found["exact"].score * (1 + 1e-9)
    assert found["hawq-v2"].bound is None


# --- weights and activations together ----------------------------------------------------------

BOTH = ("weight_bits", "activation_bits")
JOINED = [BOTH, ("bops",), (*BOTH, "bops"), ("weight_bits", "peak_activation_bits")]


def brute(problem):
    """The least Ω of all allocations within the budgets."""
    tables, least = problem.tables, np.inf
    for bits in product(*(group.menu for group in tables.space.groups)):
        allocation = Allocation.of(tables.space, bits)
        if problem.fits(allocation):
            least = min(least, tables.omega(allocation))
    return least


@pytest.mark.parametrize("names", JOINED)
@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_with_activations_exact_agrees_with_brute_force(names, seed, share):
    tables = make_tables([30, 200, 90], (2, 4, 8), seed, tensors=[50, 10, 70])
    problem = with_budget(tables, share, names)
    found = {method: best(method, problem) for method in ("exact", "hawq-v2", "uniform")}
    expected = brute(problem)
    assert -found["exact"].score == pytest.approx(expected, rel=1e-9)
    assert found["exact"].bound == pytest.approx(expected, rel=1e-6)
    for evaluation in found.values():
        assert problem.fits(evaluation.allocation)
        assert -evaluation.score >= expected * (1 - 1e-9)


@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_monotone_bits_do_not_rise_along_the_traces_of_either_kind(seed, share):
    tables = make_tables([30, 200, 90], (2, 4, 8), seed, tensors=[50, 10, 70])
    average = tables.traces / [group.num_elements for group in tables.space.groups]
    for names in JOINED:
        bits = best("hawq-v2", with_budget(tables, share, names)).allocation.bits
        for part in (slice(0, 3), slice(3, 6)):
            order = np.argsort(-average[part])
            assert (np.diff(np.array(bits[part])[order]) <= 0).all()


@given(seed=st.integers(0, 99), share=st.floats(0, 1))
def test_uniform_spends_each_budget_on_its_own_kind(seed, share):
    tables = make_tables([100] * 3, (2, 4, 8), seed, tensors=[50] * 3)
    bits = best("uniform", with_budget(tables, share, BOTH)).allocation.bits
    for part in (bits[:3], bits[3:]):
        assert set(part) in ({2}, {4}, {8}, {2, 4}, {4, 8})


def test_budgets_that_nothing_is_within_say_what_would_do():
    tables = make_tables([30, 200], (2, 4, 8), 0, tensors=[50, 10])
    with pytest.raises(InfeasibleBudgetError, match="budget must be at least 460, got 459"):
        best("exact", make_problem(tables, weight_bits=459))
    with pytest.raises(InfeasibleBudgetsError, match="bops ≤ 10 is too small even alone"):
        best("exact", make_problem(tables, weight_bits=1000, bops=10))
    with pytest.raises(InfeasibleBudgetsError, match="bops ≤ 10 is too small even alone"):
        best("hawq-v2", make_problem(tables, weight_bits=1000, bops=10))


def test_a_budget_that_joins_weights_and_activations_leaves_no_halves():
    tables = make_tables([30], (2, 4), 0, tensors=[5])
    assert make_problem(tables, bops=10**6).halves() is None
    weights, activations = make_problem(tables, weight_bits=100).halves()
    assert (weights.limit, activations.budget) == (100, None)
    assert activations.limit == 20  # five activations at their most


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform_is_plain_uniform_at_a_whole_number_of_bits(bits):
    tables = make_tables([100, 30, 7], (2, 3, 4), seed=0)
    found = best("uniform", make_problem(tables, weight_bits=bits * 137))
    assert set(found.allocation.bits) == {bits}


def test_uniform_spends_the_rest_of_a_fractional_budget_on_the_next_width():
    tables = make_tables([100] * 10, (2, 3, 4), seed=0)
    problem = make_problem(tables, weight_bits=2500)
    first, second = best("uniform", problem, seed=0), best("uniform", problem, seed=1)
    assert sorted(first.allocation.bits) == [2] * 5 + [3] * 5
    assert first.allocation != second.allocation


def test_uniform_leaves_a_pinned_layer_alone():
    tables = make_tables([10, 100, 100], (2, 3, 4, 8), seed=0, pinned={"l0": 8})
    found = best("uniform", make_problem(tables, weight_bits=10 * 8 + 200 * 3))
    assert found.allocation.bits == (8, 3, 3)


def test_an_evaluation_by_proxy_says_so():
    tables = make_tables([10, 20], (2, 4), seed=0)
    found = best("exact", make_problem(tables, weight_bits=80))
    assert isinstance(found, Evaluation)
    assert (found.fidelity, found.status, found.reason) == ("proxy", "scored", "")
    assert found.score == -tables.omega(found.allocation)


def test_a_key_changes_with_everything_that_a_score_depends_on():
    tables = make_tables([10, 20], (2, 4), seed=0)
    small, large = (
        best("exact", make_problem(tables, weight_bits=b)).allocation for b in (60, 120)
    )
    given = {
        "weights_sha256": "w",
        "split": "search",
        "quantizer": {"bits": 4},
        "fidelity": {"epochs": 1},
        "seed": 0,
    }
    other = {
        "weights_sha256": "v",
        "split": "test",
        "quantizer": {"bits": 3},
        "fidelity": {"epochs": 2},
        "seed": 1,
    }
    keys = {evaluation_key(small, **given), evaluation_key(large, **given)}
    keys |= {evaluation_key(small, **{**given, name: value}) for name, value in other.items()}
    assert len(keys) == 2 + len(other)
    assert evaluation_key(small, **given) in keys
