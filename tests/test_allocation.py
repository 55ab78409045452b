import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import free_space

from hawq.allocation import Allocation
from hawq.space import Group, Space

SPACE = Space(
    (
        Group("w:a", 10, 0, (2, 4, 8)),
        Group("w:b", 20, 0, (4, 8), "t"),
        Group("w:c", 30, 0, (2, 4, 8), "t"),
    )
)


@given(st.sampled_from([2, 4, 8]), st.sampled_from([4, 8]))
def test_an_allocation_survives_json(a, tied):
    allocation = Allocation.of(SPACE, [a, tied, tied])
    again = Allocation.from_json(SPACE, json.loads(json.dumps(allocation.to_json())))
    assert again == allocation
    assert again.digest == allocation.digest


def test_bits_may_be_given_by_name_or_in_order():
    by_name = Allocation.of(SPACE, {"w:c": 8, "w:a": 2, "w:b": 8})
    assert by_name == Allocation.of(SPACE, [2, 8, 8])
    assert by_name["w:a"] == 2


def test_bits_from_numpy_become_plain_integers():
    allocation = Allocation.of(SPACE, np.array([2, 8, 8]))
    assert json.dumps(allocation.to_json())
    assert allocation.digest == Allocation.of(SPACE, [2, 8, 8]).digest


def test_columns_point_into_the_tables():
    assert Allocation.of(SPACE, [4, 8, 8]).choice(SPACE).tolist() == [1, 2, 2]


def test_equal_choices_have_equal_digests_and_others_differ():
    pinned = SPACE.pinned({"a": 2})
    digest = Allocation.of(SPACE, [2, 8, 8]).digest
    assert Allocation.of(pinned, [2, 8, 8]).digest == digest
    assert Allocation.of(SPACE, [4, 8, 8]).digest != digest


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ([2, 4], "bits must have 3 entries, got 2"),
        ([3, 4, 4], r"w:a: bits must be one of \(2, 4, 8\), got 3"),
        ([2.5, 4, 4], r"w:a: bits must be one of \(2, 4, 8\), got 2.5"),
        ([2, 2, 2], r"w:b: bits must be one of \(4, 8\), got 2"),
        ([2, 4, 8], "tied groups must receive the same bits, got w:b=4, w:c=8"),
        ({"w:a": 2, "w:b": 4}, r"each group of the space once, got \['w:c'\]"),
        ({"w:a": 2, "w:b": 4, "w:c": 4, "w:d": 4}, r"got \['w:d'\]"),
    ],
)
def test_bits_that_the_space_forbids_are_refused(bits, message):
    with pytest.raises(ValueError, match=message):
        Allocation.of(SPACE, bits)


def test_a_foreign_space_is_refused():
    allocation = Allocation.of(SPACE, [2, 8, 8])
    foreign = free_space([10, 20, 31], (2, 4, 8))
    message = f"must belong to space {foreign.fingerprint}, got one of {SPACE.fingerprint}"
    with pytest.raises(ValueError, match=message):
        allocation.choice(foreign)
    with pytest.raises(ValueError, match=message):
        Allocation.from_json(foreign, allocation.to_json())
