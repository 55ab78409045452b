"""CW-HAWQ's process: within budget whatever is done, and every staircase within reach."""

from dataclasses import dataclass
from itertools import combinations_with_replacement, product

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from hypothesis import assume, given
from hypothesis import strategies as st

from envs import ChannelRatios, Ranked
from hawq.allocate import InfeasibleBudgetError
from hawq.allocation import Allocation
from hawq.cost import activation_bits, scale_bits, weight_bits
from hawq.ranking import ranking
from hawq.space import Group, Space


@dataclass(frozen=True)
class Omega:
    """Rewards an allocation by −Ω, and says what it was."""

    space: Space
    table: np.ndarray

    def __call__(self, allocation):
        choice = allocation.choice(self.space)
        omega = float(self.table[np.arange(len(self.space)), choice].sum())
        return -omega, {"omega": omega}


def make_space(layers, menu, tensors=(), tensor_menu=(2, 4, 8), pinned=None, ties=()):
    """A space of channels: of each layer, how many and how large."""
    groups = [
        Group(f"{prefix}:l{i}{'#0' * (prefix == 'a')}[{c}]", size, 1, tuple(widths))
        for prefix, sizes, widths in (("w", layers, menu), ("a", tensors, tensor_menu))
        for i, (num, size) in enumerate(sizes)
        for c in range(num)
    ]
    return Space(tuple(groups)).pinned(pinned or {}).tied(ties)


def make_arguments(space, share=0.5, seed=0, key="omega_gain", scales=0):
    """What an environment of a space takes, with limits at a share of the way to the widest."""
    rng = np.random.default_rng(seed)
    traces = rng.lognormal(size=len(space))
    table = np.where(space.allowed(), traces[:, None] * 4.0 ** -np.array(space.widths), np.inf)
    parts = []
    for kind in ("weights", "activations"):
        part = space.part(kind)
        if part is None:
            continue
        groups = np.array([i for i, name in enumerate(space.names) if name[0] == kind[0]])
        sensitivity = table[np.ix_(groups, np.searchsorted(space.widths, part.widths))]
        cost = weight_bits(part) if kind == "weights" else activation_bits(part)
        cost = cost + scale_bits(part, [scales] * len(part))
        least, most = (
            sum(
                int(cost[i, part.widths.index(menu[end])])
                for row in part.rows()
                for i in row
                for menu in [part.menu_of(row)]
            )
            for end in (0, -1)
        )
        order = ranking(part, key, traces=traces[groups], sensitivity=sensitivity)
        limit = int(least + share * (most - least))
        parts.append(Ranked(part, groups, cost, limit, sensitivity, order))
    return {"space": space, "parts": parts, "evaluate": Omega(space, table)}


def make_env(space, *, unit="channels", scope="network", render_mode=None, **how):
    arguments = make_arguments(space, **how)
    return ChannelRatios(**arguments, unit=unit, scope=scope, render_mode=render_mode)


def roll_out(env, actions):
    """Play an episode: its observations, its reward, and the last info."""
    seen = [env.reset()[0]]
    for i, action in enumerate(actions):
        observation, reward, terminated, truncated, info = env.step(np.array([action], np.float32))
        seen.append(observation)
        assert not truncated
        assert terminated == (i == env.num_steps - 1)
        assert terminated or (reward == 0 and info == {})
    return np.array(seen), reward, info


def costs(parts, allocation):
    bits = np.array(allocation.bits)
    return [
        int(part.cost[np.arange(len(part.groups)), columns].sum())
        for part in parts
        for columns in [np.searchsorted(part.space.widths, bits[part.groups])]
    ]


MENUS = st.sets(st.integers(0, 8), min_size=2, max_size=4).map(sorted)


@st.composite
def instances(draw):
    """Spaces of one part or two, with pins, narrower menus, ties and pruning."""
    layers = draw(
        st.lists(st.tuples(st.integers(2, 6), st.integers(1, 40)), min_size=3, max_size=4)
    )
    tensors = draw(st.sampled_from([(), [(5, 9)], [(3, 50), (4, 1)]]))
    space = make_space(layers, draw(MENUS), tensors)
    if draw(st.booleans()):
        space = space.pinned({"l0": draw(st.integers(1, 8))})
    if draw(st.booleans()):
        space = space.restricted({"l1": draw(st.sets(st.integers(1, 8), min_size=1, max_size=3))})
    elif draw(st.booleans()):
        space = space.tied([["l1", "l2"]])
    free = [row for row in space.rows() if len(space.menu_of(row)) > 1]
    for prefix in "wa":
        mine = [row for row in free if space.groups[row[0]].name[0] == prefix]
        widths = {b for row in mine for b in space.menu_of(row)}
        if len(mine) < len(widths):
            space = space.pinned({"*": 8}, "weights" if prefix == "w" else "activations")
    assume(any(len(space.menu_of(row)) > 1 for row in space.rows()))
    how = {
        "share": draw(st.floats(0, 1)),
        "seed": draw(st.integers(0, 99)),
        "scales": draw(st.integers(0, 1)),
    }
    arguments = make_arguments(space, **how)
    unit, scope = (
        draw(st.sampled_from(["channels", "weights"])),
        draw(st.sampled_from(["network", "layer"])),
    )
    return arguments | {"unit": unit, "scope": scope}


@given(instances(), st.integers(0, 999), st.sampled_from([None, 0.0, 1.0]))
def test_no_action_sequence_can_break_a_budget(arguments, seed, always):
    env = ChannelRatios(**arguments)
    actions = np.random.default_rng(seed).random(env.num_steps)
    actions = actions.astype(np.float32) if always is None else np.full(env.num_steps, always)
    seen, reward, info = roll_out(env, actions)
    allocation = info["allocation"]
    assert allocation == Allocation.of(arguments["space"], allocation.bits)  # menus and ties
    for spent, part in zip(costs(arguments["parts"], allocation), arguments["parts"], strict=True):
        assert spent <= part.limit
    assert seen.shape == (env.num_steps + 1, 10)
    assert seen.dtype == np.float32
    assert all(observation in env.observation_space for observation in seen)
    assert reward == -info["omega"] == arguments["evaluate"](allocation)[0]
    assert env.allocation_of(actions) == allocation


@given(instances(), st.integers(0, 999))
def test_the_actions_of_an_allocation_lead_back_to_it(arguments, seed):
    env = ChannelRatios(**arguments)
    allocation = env.allocation_of(np.random.default_rng(seed).random(env.num_steps))
    actions = env.actions_of(allocation)
    assert env.allocation_of(actions) == allocation
    assert roll_out(env, actions)[2]["allocation"] == allocation  # as 32-bit floats, too


# --- the known optimum --------------------------------------------------------------------------


def staircases(space, part):
    """All allocations within the limit whose bits do not rise along the order."""
    descending = sorted(space.widths, reverse=True)
    for chosen in combinations_with_replacement(range(len(descending)), len(space)):
        bits = np.empty(len(space), np.int64)
        bits[part.order] = [descending[c] for c in chosen]
        allocation = Allocation.of(space, bits.tolist())
        if costs([part], allocation)[0] <= part.limit:
            yield allocation


@pytest.mark.parametrize("unit", ["channels", "weights"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.77, 1.0])
def test_a_grid_of_actions_reaches_exactly_the_staircases_within_budget(unit, share):
    space = make_space([(6, 3), (9, 7), (5, 2)], (2, 4, 8))
    env = make_env(space, unit=unit, share=share)
    (part,) = make_arguments(space, share=share)["parts"]
    expected = set(staircases(space, part))
    grid = np.linspace(0, 1, 121)
    reached = {env.allocation_of(actions) for actions in product(grid, repeat=env.num_steps)}
    assert reached == expected
    assert {env.allocation_of(env.actions_of(allocation)) for allocation in expected} == expected


def test_the_best_staircase_is_found_by_its_reward():
    space = make_space([(6, 3), (9, 7), (5, 2)], (2, 4, 8))
    arguments = make_arguments(space, share=0.4)
    env = ChannelRatios(**arguments)
    best = max(arguments["evaluate"](a)[0] for a in staircases(space, arguments["parts"][0]))
    grid = np.linspace(0, 1, 41)
    found = max(roll_out(env, actions)[1] for actions in product(grid, repeat=env.num_steps))
    assert found == best
    assert env.num_steps == 2


# --- what a step does ---------------------------------------------------------------------------


def test_an_action_is_a_fraction_of_what_can_take_the_width():
    # Ten channels of one element at 2 bits leave 12 bits: two more at 8, or six more at 4.
    space = make_space([(10, 1)], (2, 4, 8))
    arguments = make_arguments(space)
    (part,) = arguments["parts"]
    ranked = Ranked(space, part.groups, part.cost, 32, part.sensitivity, np.arange(10))
    env = ChannelRatios(**arguments | {"parts": [ranked]})
    for actions, bits in (
        ((0, 0), [2] * 10),
        ((1, 1), [8] * 2 + [2] * 8),
        ((0.5, 1), [8] + [4] * 3 + [2] * 6),
        ((0, 1), [4] * 6 + [2] * 4),
        ((0, 0.5), [4] * 3 + [2] * 7),
        ((0, 0.4), [4] * 2 + [2] * 8),
        ((-3, 7), [4] * 6 + [2] * 4),
    ):
        assert list(env.allocation_of(actions).bits) == bits, actions


def test_by_weights_a_fraction_counts_elements():
    space = make_space([(1, 80), (2, 10)], (2, 4, 8)).restricted({"*": (2, 4)})
    arguments = make_arguments(space, share=1)
    (part,) = arguments["parts"]
    ranked = Ranked(space, part.groups, part.cost, part.limit, part.sensitivity, np.arange(3))
    by_unit = {
        unit: ChannelRatios(**arguments | {"parts": [ranked], "unit": unit})
        for unit in ("channels", "weights")
    }
    assert by_unit["channels"].allocation_of([0.39]).bits == (4, 2, 2)
    assert by_unit["weights"].allocation_of([0.39]).bits == (2, 2, 2)
    assert by_unit["weights"].allocation_of([0.41]).bits == (4, 2, 2)
    assert by_unit["weights"].allocation_of([0.86]).bits == (4, 4, 2)


def test_the_observation_is_the_one_that_is_documented():
    space = make_space([(4, 10)], (2, 4, 8), [(2, 5)], (2, 8))
    arguments = make_arguments(space)
    omega = [np.array([[101.0, 40, 1], [11, 5, 1], [2, 1.5, 1], [2, 1.5, 1]])]
    omega += [np.array([[5.0, 1.0], [2.0, 1.0]])]
    parts = [
        Ranked(p.space, p.groups, p.cost, limit, table, np.arange(len(p.groups)))
        for p, limit, table in zip(arguments["parts"], (200, 50), omega, strict=True)
    ]
    env = ChannelRatios(**arguments | {"parts": parts})
    assert env.num_steps == 3
    seen, _, _ = roll_out(env, [0.5, 1 / 3, 1])
    expected = [
        # At their narrowest the weights cost 80, the activations 20; Ω is 116 + 7 = 123.
        [0, 0, 8 / 8, 1, 0, 0, 80 / 200, 1, 1, 0],
        # Two rows can take 8 bits, for 60 more each: one does, and Ω falls by 100.
        [1 / 3, 0, 4 / 8, 3 / 4, 80 / 200, 0, 140 / 200, 23 / 123, 0.5, 0.5],
        # Three can take 4 bits, for 20 more: one does, and Ω falls by 6. The rest takes 2 bits.
        [2 / 3, 1, 8 / 8, 1, 160 / 200, 0, 20 / 50, 17 / 123, 1, 1 / 3],
        [1, 0, 0, 0, 160 / 200, 50 / 50, 0, 13 / 123, 0, 1],
    ]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)


def test_a_pinned_row_keeps_its_bits_and_is_not_walked():
    space = make_space([(2, 10), (4, 10)], (2, 4), pinned={"l0": 8})
    env = make_env(space, share=1)
    assert env.num_steps == 1
    assert env.allocation_of([0.5]).bits[:2] == (8, 8)
    assert sorted(env.allocation_of([0.5]).bits[2:]) == [2, 2, 4, 4]


def test_a_row_without_a_width_takes_the_next_narrower_one_or_its_narrowest():
    space = make_space([(2, 10), (4, 10)], (2, 4, 8)).restricted({"l0": (3, 6)})
    arguments = make_arguments(space, share=1)
    (part,) = arguments["parts"]
    ranked = Ranked(space, part.groups, part.cost, part.limit, part.sensitivity, np.arange(6))
    env = ChannelRatios(**arguments | {"parts": [ranked]})
    # Nothing changes at 3 bits, the narrowest of those that have it: no step.
    assert env.num_steps == 3
    assert env.allocation_of([0.5, 1, 0]).bits == (6, 6, 8, 4, 4, 4)
    assert env.allocation_of([0, 1 / 6, 0]).bits == (6, 3, 2, 2, 2, 2)
    assert env.allocation_of([0, 0, 1]).bits == (3, 3, 4, 4, 4, 4)


def test_a_part_without_a_choice_is_passed_over():
    space = make_space([(6, 10)], (2, 4), [(4, 5)]).pinned({"*": 8}, "activations")
    env = make_env(space, share=0.5)
    assert env.num_steps == 1
    seen, _, _ = roll_out(env, [0.5])
    assert (seen[:, 5] == 1).all()  # as pinned


def test_tied_channels_are_one_row():
    space = make_space([(4, 10), (4, 20)], (2, 4), ties=[["l0", "l1"]])
    env = make_env(space, share=1)
    bits = env.allocation_of([0.5]).bits
    assert sorted(bits[:4]) == [2, 2, 4, 4]
    assert bits[:4] == bits[4:]


def test_by_layer_each_has_ratios_of_its_own():
    space = make_space([(4, 10), (6, 5)], (2, 4, 8))
    env = make_env(space, scope="layer", share=1)
    assert env.num_steps == 4
    bits = env.allocation_of([0.25, 1 / 3, 0, 0.5]).bits
    assert sorted(bits[:4]) == [2, 2, 4, 8]
    assert sorted(bits[4:]) == [2, 2, 2, 4, 4, 4]
    # What the first layer spends, the second lacks.
    tight = make_env(space, scope="layer", share=0.5)
    assert set(tight.allocation_of([1, 1, 1, 1]).bits[4:]) == {2, 4}


def test_an_allocation_that_is_no_staircase_is_met_in_its_counts():
    space = make_space([(8, 10)], (2, 4, 8))
    env = make_env(space, share=1)
    allocation = Allocation.of(space, [2, 8, 4, 8, 2, 4, 2, 8])
    found = env.allocation_of(env.actions_of(allocation))
    assert sorted(found.bits) == sorted(allocation.bits)
    tight = make_env(space, share=0)
    assert set(tight.allocation_of(tight.actions_of(allocation)).bits) == {2}


# --- the door -----------------------------------------------------------------------------------


def test_a_budget_below_the_narrowest_says_what_would_do():
    space = make_space([(5, 10)], (2, 4, 8))
    (part,) = make_arguments(space)["parts"]
    tight = Ranked(space, part.groups, part.cost, 99, part.sensitivity, part.order)
    with pytest.raises(InfeasibleBudgetError, match="budget must be at least 100, got 99"):
        ChannelRatios(space=space, parts=[tight], evaluate=None)


@pytest.mark.parametrize(
    ("space", "changes", "message"),
    [
        (make_space([(3, 1)], (4, 5)).pinned({"*": 4}), {}, "menu must hold two widths at least"),
        (make_space([(3, 1)], (2, 3, 4, 6, 8)), {}, "got 3 channels and 5 widths"),
        (make_space([(3, 1)], (2, 4)), {"unit": "bits"}, "unit must be one of channels, weights"),
        (make_space([(3, 1)], (2, 4)), {"scope": "block"}, "scope must be one of network, layer"),
        (make_space([(3, 1)], (2, 4)), {"parts": []}, "each of the space's 3 groups once, got 0"),
    ],
)
def test_what_cannot_be_walked_is_refused(space, changes, message):
    with pytest.raises(ValueError, match=message):
        ChannelRatios(**make_arguments(space) | changes)


def test_tables_that_cannot_be_walked_are_refused():
    space = make_space([(3, 1)], (2, 4))
    arguments = make_arguments(space)
    (part,) = arguments["parts"]

    def refused(message, cost=part.cost, order=part.order, groups=part.groups, copies=1):
        changed = Ranked(space, groups, cost, part.limit, part.sensitivity, order)
        with pytest.raises(ValueError, match=message):
            ChannelRatios(**arguments | {"parts": [changed] * copies})

    refused(r"w:l0\[0\]: cost must not fall with the width", cost=part.cost[:, ::-1])
    refused("order must hold each of 3 rows once", order=np.array([0, 1, 1]))
    refused("groups once, got 6", copies=2)
    refused("each of the space's 3 groups", groups=np.array([1, 0, 2]))


def test_misuse_is_named():
    space = make_space([(5, 10)], (2, 4, 8))
    env = make_env(space)
    with pytest.raises(ValueError, match="actions must be 2, got 3"):
        env.allocation_of([0, 0, 0])
    with pytest.raises(ValueError, match=r"action must be a number in 0\.\.1, got nan"):
        env.allocation_of([0, float("nan")])
    with pytest.raises(ValueError, match="the allocation must belong to space"):
        env.actions_of(make_env(make_space([(5, 10)], (2, 4))).allocation_of([0]))
    roll_out(env, [0, 0])
    with pytest.raises(ResetNeeded, match="reset must be called"):
        env.step(np.zeros(1, np.float32))


def test_gymnasium_makes_it_by_its_name():
    arguments = make_arguments(make_space([(5, 10)], (2, 4, 8)))
    env = gymnasium.make("ChannelRatios-v0", **arguments)
    assert isinstance(env.unwrapped, ChannelRatios)
