"""HAQ's process: within any budgets whatever is done, and every allocation within reach."""

from itertools import product

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import ResetNeeded
from hypothesis import given
from hypothesis import strategies as st
from test_channel_ratios import Omega, roll_out
from test_searchers import JOINED, make_tables, with_budget
from torch import nn

from envs.layer_bits import LayerBits, layer_features
from hawq.allocate import Budget, InfeasibleBudgetsError
from hawq.allocation import Allocation
from hawq.cost import Cost, Operation, latency, separable, weight_bits
from hawq.reads import network_space, read_network
from hawq.space import Group, Space

SMALL = ([30, 200, 90], (2, 4, 8))


def make_arguments(tables, budgets):
    num_rows = len(tables.space.rows())
    features = np.random.default_rng(0).random((num_rows, 9), np.float32)
    return {
        "space": tables.space,
        "features": features,
        "budgets": budgets,
        "evaluate": Omega(tables.space, tables.sensitivity),
    }


def make_instance(names=("weight_bits",), share=0.5, seed=0, pinned=None, tensors=(50, 10)):
    tables = make_tables(*SMALL, seed, pinned, tensors)
    return make_arguments(tables, with_budget(tables, share, names).budgets)


def within(space, budgets):
    """Every allocation within the budgets."""
    for bits in product(*(space.menu_of(row) for row in space.rows())):
        every = np.empty(len(space), np.int64)
        for row, b in zip(space.rows(), bits, strict=True):
            every[list(row)] = b
        allocation = Allocation.of(space, every.tolist())
        if all(budget.cost.of(space, allocation) <= budget.limit for budget in budgets):
            yield allocation


# --- within any budgets -------------------------------------------------------------------------


@pytest.mark.parametrize("names", JOINED)
@given(share=st.floats(0, 1), seed=st.integers(0, 99), always=st.sampled_from([None, 0.0, 1.0]))
def test_no_action_sequence_can_break_a_budget(names, share, seed, always):
    pinned = {"l1": 4} if seed % 2 else None
    arguments = make_instance(names, share, seed, pinned)
    env = LayerBits(**arguments)
    assert env.num_steps == 5 - bool(pinned)
    actions = np.random.default_rng(seed).random(env.num_steps).astype(np.float32)
    actions = actions if always is None else np.full(env.num_steps, always)
    seen, reward, info = roll_out(env, actions)
    allocation = info["allocation"]
    for budget in arguments["budgets"]:
        assert budget.cost.of(arguments["space"], allocation) <= budget.limit
    assert all(observation in env.observation_space for observation in seen)
    assert reward == -info["omega"] == arguments["evaluate"](allocation)[0]
    assert env.allocation_of(actions) == allocation


@pytest.mark.parametrize("names", JOINED)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_every_allocation_within_the_budgets_is_reached_and_no_other(names, share):
    arguments = make_instance(names, share)
    env = LayerBits(**arguments)
    expected = set(within(arguments["space"], arguments["budgets"]))
    grid = (1 / 6, 1 / 2, 5 / 6)
    assert {env.allocation_of(actions) for actions in product(grid, repeat=5)} == expected
    for allocation in expected:
        actions = env.actions_of(allocation)
        assert env.allocation_of(actions) == allocation
        assert roll_out(env, actions)[2]["allocation"] == allocation


def test_tied_layers_receive_their_bits_in_one_step():
    space = make_tables(*SMALL, 0).space.tied([["l0", "l2"]])
    env = LayerBits(
        space=space,
        features=np.zeros((2, 1), np.float32),
        budgets=[Budget(separable("weight_bits", weight_bits(space)), 120 * 8 + 200 * 2)],
        evaluate=None,
    )
    assert env.allocation_of([1, 1]).bits == (8, 2, 8)
    assert env.allocation_of([0.5, 1]).bits == (4, 4, 4)
    assert env.actions_of(Allocation.of(space, [8, 2, 8])) == [5 / 6, 1 / 2]
    assert env.actions_of(Allocation.of(space, [4, 4, 4])) == [1 / 2, 3 / 4]


def test_without_a_budget_everything_is_affordable():
    tables = make_tables(*SMALL, 0)
    env = LayerBits(**make_arguments(tables, ()))
    assert env.allocation_of([1, 1, 1]).bits == (8, 8, 8)
    assert env.reset()[0][-1] == 1


def test_a_latency_that_falls_with_the_width_is_within_the_budget_still():
    space = Space(tuple(Group(f"w:l{i}", 10, 1, (2, 4, 8)) for i in range(2)))
    table = {f"l{i}": {2: 5, 4: 9, 8: 3} for i in range(2)}
    cost = latency(space, [Operation(f"w:l{i}", 8, 1) for i in range(2)], table)
    env = LayerBits(
        space=space,
        features=np.zeros((2, 1), np.float32),
        budgets=[Budget(cost, 12)],
        evaluate=None,
    )
    reached = {env.allocation_of(actions).bits for actions in product((0, 0.4, 0.6, 1), repeat=2)}
    assert reached == {(2, 2), (2, 8), (8, 2), (8, 4), (8, 8)}


def test_an_allocation_beyond_the_budgets_is_met_as_far_as_they_go():
    arguments = make_instance(share=0.0)
    env = LayerBits(**arguments)
    widest = Allocation.of(arguments["space"], [8] * 5)
    assert env.allocation_of(env.actions_of(widest)).bits == (2, 2, 2, 8, 8)


# --- observations -------------------------------------------------------------------------------


def test_the_observation_is_the_one_that_is_documented():
    space = Space(tuple(Group(f"w:l{i}", n, 1, (2, 4)) for i, n in enumerate((10, 30))))
    cost = separable("weight_bits", weight_bits(space))
    features = np.array([[0.25, 0], [0.5, 1]], np.float32)
    budgets = [Budget(cost, 120), Budget(Cost("more", 2 * cost.steps), 260)]
    env = LayerBits(space=space, features=features, budgets=budgets, evaluate=lambda _: (1.0, {}))
    seen, reward, info = roll_out(env, [0.75, 0.2])
    # Of 40 bits above the narrowest the first row spends 20; of twice as many, 100, it spends 40.
    np.testing.assert_allclose(seen, [[0.25, 0, 0, 1], [0.5, 1, 0.75, 0.5], [0, 0, 0.2, 0.5]])
    assert (reward, info["allocation"].bits) == (1.0, (4, 2))


class Mobile(nn.Module):
    """A strided convolution, a depthwise and a pointwise one, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
        self.pointwise = nn.Conv2d(8, 16, 1)
        self.linear = nn.Linear(16, 4)

    def forward(self, x):
        x = self.pointwise(self.depthwise(self.stem(x).relu()).relu())
        return self.linear(x.mean((2, 3)))


def test_features_tell_what_layers_are():
    reads = read_network(Mobile(), torch.zeros(1, 3, 16, 16))
    space = network_space(reads, [2, 4], [4, 8])
    found = layer_features(space, reads)
    raw = np.array(
        [  # grouped, in, out, stride, kernel, weights, positions
            [0, 3, 8, 2, 3, 216, 16],
            [1, 8, 8, 1, 5, 200, 8],
            [0, 8, 16, 1, 1, 128, 8],
            [0, 16, 4, 1, 1, 64, 1],
        ],
        float,
    )
    scaled = (raw - raw.min(0)) / np.ptp(raw, axis=0)
    np.testing.assert_allclose(found[:4, :7], scaled, rtol=1e-6)
    np.testing.assert_array_equal(found[:4, :7], found[4:, :7])  # each tensor has one reader
    np.testing.assert_allclose(found[:, 7], np.arange(8) / 7, rtol=1e-6)
    np.testing.assert_array_equal(found[:, 8], [0] * 4 + [1] * 4)
    with pytest.raises(ValueError, match="layers or tensors of the network, got w:other"):
        layer_features(Space((Group("w:other", 1, 1, (2, 4)),)), reads)


class Twice(nn.Module):
    """Two convolutions read one tensor, and the wide one reads what it computed again."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(4, 4, 5, padding=2)
        self.narrow = nn.Conv2d(4, 6, 1)

    def forward(self, x):
        first, second = self.wide(x), self.narrow(x)
        return self.wide(first[..., ::2, ::2]).sum() + second.sum()


def test_a_tensor_is_described_by_its_first_reader_and_a_layer_by_its_first_call():
    reads = read_network(Twice(), torch.zeros(1, 4, 8, 8))
    found = layer_features(network_space(reads, [2, 4], [4, 8]), reads)
    wide, narrow, shared, again = found[:, [2, 4, 6]].tolist()
    # Output channels, kernel and positions; that tensor alone has 4 × 4 of them.
    assert (wide, narrow) == ([0, 1, 1], [1, 0, 1])
    assert (shared, again) == ([0, 1, 1], [0, 1, 0])


def test_tied_layers_are_described_by_their_average():
    reads = read_network(Mobile(), torch.zeros(1, 3, 16, 16))
    space = network_space(reads, [2, 4]).tied([["stem", "linear"]])
    found = layer_features(space, reads)
    # Input channels: 9.5 of the tied ones, 8 of both others.
    np.testing.assert_array_equal(found[:, 1], [1, 0, 0])


# --- the door -----------------------------------------------------------------------------------


def test_budgets_below_the_narrowest_say_what_would_do():
    arguments = make_instance(("weight_bits", "bops"))
    weights, bops = arguments["budgets"]
    with pytest.raises(InfeasibleBudgetsError, match="weight_bits ≤ 639 is too small") as caught:
        LayerBits(**arguments | {"budgets": [Budget(weights.cost, 639), bops]})
    first, second = caught.value.verdicts
    assert (first.least, first.nearest, second.nearest) == (640, 640, None)
    assert second.is_feasible_alone
    with pytest.raises(InfeasibleBudgetsError) as caught:
        LayerBits(**arguments | {"budgets": [Budget(weights.cost, 639), Budget(bops.cost, 1)]})
    assert [verdict.nearest for verdict in caught.value.verdicts] == [None, None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((4, 2))}, r"features must be of 5 rows, got shape \(4, 2\)"),
        ({"features": np.full((5, 2), 1.5)}, r"features must be within 0\.\.1"),
        ({"features": np.full((5, 2), np.nan)}, r"features must be within 0\.\.1"),
        ({"space": make_tables(*SMALL, 0, {"*": 4}).space, "budgets": (),
          "features": np.zeros((3, 1))}, "menu must hold two widths at least"),
        ({"budgets": [Budget(Cost("c", np.zeros((1, 2, 2), np.int64)), 1)]},
         r"c: cost must have shape \(5, 3\), got \(2, 2\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_walked_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        LayerBits(**make_instance() | changes)


def test_misuse_is_named():
    env = LayerBits(**make_instance())
    with pytest.raises(ValueError, match="actions must be 5, got 3"):
        env.allocation_of([0, 0, 0])
    with pytest.raises(ValueError, match=r"action must be a number in 0\.\.1, got nan"):
        env.allocation_of([0, float("nan"), 0, 0, 0])
    other = make_tables([1], (2, 4), 0).space
    with pytest.raises(ValueError, match="the allocation must belong to space"):
        env.actions_of(Allocation.of(other, [2]))
    roll_out(env, [0] * 5)
    with pytest.raises(ResetNeeded, match="reset must be called"):
        env.step(np.zeros(1, np.float32))


def test_gymnasium_makes_it_by_its_name():
    env = gymnasium.make("LayerBits-v0", **make_instance())
    assert isinstance(env.unwrapped, LayerBits)
