"""What errors of the traces do to an allocation: brute force, no errors, and huge ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import evaluate, every_choice, free_space

from hawq.allocate.stability import stability
from hawq.allocation import Allocation
from hawq.sensitivity import omega

SIZES, MENU = [4, 6, 10], (1, 2, 4)
SPACE = free_space(SIZES, MENU)
COST = np.outer(SIZES, MENU)
SQUARED = np.array([[8.0, 3.0, 0.2], [6.0, 2.5, 0.1], [9.0, 4.0, 0.3]])
TRACES = np.array([5.0, 40.0, 7.0])


def solve(sensitivity, traces, budget=45):
    """The best of all choices within the budget, the first of equals."""
    fits = [c for c in every_choice(SPACE) if evaluate(COST, c) <= budget]
    best = min(fits, key=lambda c: evaluate(sensitivity, c))
    return Allocation.of(SPACE, [MENU[column] for column in best])


def found(errors, **options):
    return stability(SPACE, TRACES, np.array(errors), SQUARED, solve, **options)


def test_without_errors_nothing_moves():
    still = found([0.0, 0.0, 0.0], draws=5)
    assert still.chosen == solve(omega(SPACE, TRACES, SQUARED), TRACES)
    assert (still.kept, still.kept_error) == (1, 0)
    assert (still.regret, still.regret_error, still.regret_95) == (0, 0, 0)
    for bits in (still.least, still.median, still.most):
        assert tuple(bits) == still.chosen.bits


def test_huge_errors_move_it_and_cost_something():
    moved = found([500.0, 500.0, 500.0])
    assert moved.kept < 0.9
    assert moved.regret > 0.05
    assert moved.regret_95 > moved.regret
    assert (moved.least < moved.most).any()


def test_agrees_with_drawing_by_hand():
    errors, draws = np.array([3.0, 30.0, 3.0]), 40
    normal = np.random.default_rng(9).standard_normal((draws, 3))
    table = np.maximum(TRACES, 0)[:, None] / np.array(SIZES)[:, None] * SQUARED
    chosen = solve(table, TRACES)
    bits, regrets = [], []
    for z in normal:
        drawn = np.maximum(TRACES + errors * z, 0)
        again = solve(drawn[:, None] / np.array(SIZES)[:, None] * SQUARED, drawn)
        bits.append(again.bits)
        ratio = evaluate(table, again.choice(SPACE)) / evaluate(table, chosen.choice(SPACE))
        regrets.append(ratio - 1)
    result = found(errors, draws=draws, seed=9)
    same = (np.array(bits) == chosen.bits).mean(1)
    assert result.kept == pytest.approx(same.mean())
    assert result.kept_error == pytest.approx(same.std(ddof=1) / draws**0.5)
    assert result.regret == pytest.approx(np.mean(regrets))
    assert result.regret_95 == pytest.approx(np.quantile(regrets, 0.95))
    assert result.least.tolist() == np.min(bits, 0).tolist()
    assert result.most.tolist() == np.max(bits, 0).tolist()
    assert result.median.tolist() == np.sort(bits, 0)[draws // 2 - 1].tolist()


@given(
    st.lists(st.floats(0, 100), min_size=3, max_size=3),
    st.integers(0, 5),
)
def test_the_best_choice_is_never_regretted(errors, seed):
    again = found(errors, draws=4, seed=seed)
    assert again.regret >= -1e-12
    assert 0 <= again.kept <= 1
    assert all(set(bits) <= set(MENU) for bits in (again.least, again.median, again.most))


def test_a_seed_draws_the_same_and_another_one_does_not():
    errors = [20.0, 20.0, 20.0]
    first, same, other = (found(errors, draws=30, seed=seed) for seed in (1, 1, 2))
    assert (first.kept, first.regret) == (same.kept, same.regret)
    assert (first.kept, first.regret) != (other.kept, other.regret)


def test_the_solver_is_given_the_traces_that_were_drawn():
    seen = []

    def watch(sensitivity, traces):
        seen.append((sensitivity, traces))
        return solve(sensitivity, traces)

    stability(SPACE, TRACES, np.full(3, 4.0), SQUARED, watch, draws=3)
    assert len({tuple(traces) for _, traces in seen}) == 4
    for sensitivity, traces in seen:
        np.testing.assert_array_equal(sensitivity, omega(SPACE, traces, SQUARED))


def test_nothing_can_be_compared_with_an_omega_of_zero():
    flat = stability(SPACE, np.full(3, -1.0), np.full(3, 9.0), SQUARED, solve, draws=9)
    assert (flat.regret, flat.regret_error, flat.regret_95) == (None, None, None)


@pytest.mark.parametrize(
    ("errors", "options", "message"),
    [
        ([1.0, 1.0, 1.0], {"draws": 1}, "draws must be at least 2, got 1"),
        ([1.0, 1.0], {}, r"trace_errors must have shape \(3,\), got shape \(2,\)"),
        ([1.0, -1.0, 1.0], {}, "trace_errors must be finite and at least 0, got -1.0"),
        ([1.0, np.nan, 1.0], {}, "trace_errors must be finite and at least 0, got nan"),
    ],
)
def test_a_mistake_is_refused(errors, options, message):
    with pytest.raises(ValueError, match=message):
        found(errors, **options)
