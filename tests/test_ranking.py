"""The ranking of rows: what may change it, and what may not."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hawq.ranking import ranking
from hawq.space import Group, Space

WIDTHS = (2, 4, 8)


def make_space(sizes, menus=None, ties=None):
    menus, ties = menus or [WIDTHS] * len(sizes), ties or [None] * len(sizes)
    named = enumerate(zip(sizes, menus, ties, strict=True))
    return Space(tuple(Group(f"w:l{i}", n, 1, tuple(m), t) for i, (n, m, t) in named))


def omega(space, traces, squared_errors):
    """Ω = Tr/n · ‖Q(W) − W‖²."""
    sizes = np.array([group.num_elements for group in space.groups])
    table = (traces / sizes * squared_errors)[:, None] * 4.0 ** -np.array(space.widths)
    return np.where(space.allowed(), table, np.inf)


def test_rescaling_two_layers_moves_the_traces_but_not_the_gains():
    space = make_space([10, 10, 10])
    traces, errors = np.array([3.0, 2.0, 1.0]), np.array([1.0, 2.0, 2.5])
    before = {"traces": traces, "sensitivity": omega(space, traces, errors)}
    # W₁ → W₁/4 and W₂ → 4·W₂: traces go with the inverse square, squared errors with the square.
    scale = np.array([1 / 4, 4, 1])
    after = {
        "traces": traces / scale**2,
        "sensitivity": omega(space, traces / scale**2, errors * scale**2),
    }
    assert ranking(space, **before).tolist() == ranking(space, **after).tolist() == [1, 0, 2]
    assert ranking(space, "trace", **before).tolist() == [0, 1, 2]
    assert ranking(space, "trace", **after).tolist() == [0, 2, 1]


@pytest.mark.parametrize("key", ["omega_gain", "trace"])
@given(seed=st.integers(0, 999), num=st.integers(1, 12))
def test_permuting_the_groups_permutes_the_ranking(key, seed, num):
    rng = np.random.default_rng(seed)
    sizes, traces, errors = rng.integers(1, 99, num), rng.normal(size=num), rng.random(num) + 0.1
    permutation = rng.permutation(num)
    orders = []
    for places in (np.arange(num), permutation):
        space = make_space(sizes[places].tolist())
        table = omega(space, traces[places], errors[places])
        orders.append(ranking(space, key, traces=traces[places], sensitivity=table))
    assert permutation[orders[1]].tolist() == orders[0].tolist()


def test_a_gain_is_counted_for_each_bit_that_is_spent():
    # The first falls by 6 over 2 bits of one element, the second by 8 over 6 bits of one, the third
    # by 20 over 6 bits of two.
    space = make_space([1, 1, 2], [(2, 4), (2, 8), (2, 8)])
    table = np.array([[7.0, 1.0, np.inf], [9.0, np.inf, 1.0], [21.0, np.inf, 1.0]])
    order = ranking(space, traces=np.zeros(3), sensitivity=table)
    assert order.tolist() == [0, 2, 1]


def test_equal_rows_stand_as_they_stood_and_rows_of_one_width_come_last():
    space = make_space([5, 5, 5, 5], [(8,), WIDTHS, WIDTHS, (4,)])
    # The third is noise: its Ω rises with the width.
    table = np.array([[0.0, 0, 9], [3, 2, 1], [1, 2, 3], [9, 9, 9]])
    traces = np.array([4.0, 1.0, 1.0, 4.0])
    assert ranking(space, traces=traces, sensitivity=table).tolist() == [1, 2, 0, 3]
    assert ranking(space, "trace", traces=traces, sensitivity=table).tolist() == [0, 3, 1, 2]


@pytest.mark.parametrize("key", ["omega_gain", "trace"])
def test_many_equal_rows_stand_as_they_stood(key):
    space, traces = make_space([5] * 300), np.tile([1.0, 2.0], 150)
    order = ranking(space, key, traces=traces, sensitivity=omega(space, traces, 1))
    assert order.tolist() == [*range(1, 300, 2), *range(0, 300, 2)]


def test_tied_groups_are_ranked_as_one_by_their_average():
    space = make_space([10, 1, 30], ties=["t", None, "t"])
    traces = np.array([80.0, 3.0, 0.0])  # 80 over 40 elements, and 3 over one
    table = np.array([[9.0, 5, 1], [1, 1, 0], [9, 1, 1]])  # falls by 16 over 40, and by 1 over one
    assert ranking(space, "trace", traces=traces, sensitivity=table).tolist() == [1, 0]
    assert ranking(space, traces=traces, sensitivity=table).tolist() == [1, 0]
    table[2] = [99.0, 5, 1]  # now by 106
    assert ranking(space, traces=traces, sensitivity=table).tolist() == [0, 1]


def test_what_cannot_be_ranked_is_refused():
    space, table = make_space([1, 1]), np.ones((2, 3))
    with pytest.raises(ValueError, match="key must be one of omega_gain, trace, got 'range'"):
        ranking(space, "range", traces=np.ones(2), sensitivity=table)
    with pytest.raises(ValueError, match=r"traces must be 2 finite numbers, got shape \(3,\)"):
        ranking(space, traces=np.ones(3), sensitivity=table)
    with pytest.raises(ValueError, match="traces must be 2 finite numbers"):
        ranking(space, traces=np.array([1, np.nan]), sensitivity=table)
