"""The contract of every searcher: within the budget, distinct, and the same for the same seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hawq.cost import total, weight_bits
from hawq.space import Group, Space
from search.evaluate import Evaluation, evaluation_key
from search.searchers import SEARCHERS, Problem, Tables


def make_tables(sizes, menu, seed, pinned=None):
    groups = tuple(Group(f"w:l{i}", n, 1, tuple(menu)) for i, n in enumerate(sizes))
    space = Space(groups).pinned(pinned or {})
    rng = np.random.default_rng(seed)
    traces = rng.lognormal(size=len(sizes))
    errors = 4.0 ** -np.array(space.widths)
    table = (traces / np.array(sizes))[:, None] * errors * np.array(sizes)[:, None]
    sensitivity = np.where(space.allowed(), table, np.inf)
    return Tables(space, sensitivity, weight_bits(space), traces)


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


def with_budget(tables, share):
    least, most = tables.weight_bits[:, 0].sum(), tables.weight_bits[:, -1].sum()
    return Problem(tables, int(least + share * (most - least)), tables.proxy)


@pytest.mark.parametrize("method", SEARCHERS)
@given(drawn=problems)
def test_proposes_distinct_allocations_within_the_budget(method, drawn):
    problem = with_budget(*drawn)
    found = list(SEARCHERS[method].search(problem, evaluations=8, seed=0))
    assert 1 <= len(found) <= 8
    assert len({evaluation.allocation.digest for evaluation in found}) == len(found)
    for evaluation in found:
        used = total(problem.tables.weight_bits, problem.tables.space, evaluation.allocation)
        assert used <= problem.limit_bits


@pytest.mark.parametrize("method", SEARCHERS)
@given(drawn=problems, seed=st.integers(0, 9))
def test_finds_the_same_for_the_same_seed(method, drawn, seed):
    problem = with_budget(*drawn)
    assert best(method, problem, seed) == best(method, problem, seed)


@given(drawn=problems)
def test_exact_is_never_worse_than_monotone_nor_uniform(drawn):
    problem = with_budget(*drawn)
    omegas = {method: -best(method, problem).score for method in SEARCHERS}
    assert omegas["exact"] <= omegas["hawq-v2"] * (1 + 1e-12)
    assert omegas["exact"] <= omegas["uniform"] * (1 + 1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_uniform_is_plain_uniform_at_a_whole_number_of_bits(bits):
    tables = make_tables([100, 30, 7], (2, 3, 4), seed=0)
    found = best("uniform", Problem(tables, bits * 137, tables.proxy))
    assert set(found.allocation.bits) == {bits}


def test_uniform_spends_the_rest_of_a_fractional_budget_on_the_next_width():
    tables = make_tables([100] * 10, (2, 3, 4), seed=0)
    problem = Problem(tables, 2500, tables.proxy)
    first, second = best("uniform", problem, seed=0), best("uniform", problem, seed=1)
    assert sorted(first.allocation.bits) == [2] * 5 + [3] * 5
    assert first.allocation != second.allocation


def test_uniform_leaves_a_pinned_layer_alone():
    tables = make_tables([10, 100, 100], (2, 3, 4, 8), seed=0, pinned={"l0": 8})
    found = best("uniform", Problem(tables, 10 * 8 + 200 * 3, tables.proxy))
    assert found.allocation.bits == (8, 3, 3)


def test_an_evaluation_by_proxy_says_so():
    tables = make_tables([10, 20], (2, 4), seed=0)
    found = best("exact", Problem(tables, 80, tables.proxy))
    assert isinstance(found, Evaluation)
    assert (found.fidelity, found.status, found.reason) == ("proxy", "scored", "")
    assert found.score == -tables.omega(found.allocation)


def test_a_key_changes_with_everything_that_a_score_depends_on():
    tables = make_tables([10, 20], (2, 4), seed=0)
    small, large = (best("exact", Problem(tables, b, tables.proxy)).allocation for b in (60, 120))
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
