import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import ResidualNet, free_space
from torch import nn

from hawq.finetune import attach
from hawq.reads import weight_space
from hawq.space import Group, Space, evaluating, quantizable_layers


class Siamese(nn.Module):
    """Two layers that share one weight, after a layer of their own."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.left = nn.Linear(5, 5)
        self.right = nn.Linear(5, 5)
        self.right.weight = self.left.weight

    def forward(self, x):
        return self.right(self.left(self.first(x)).relu())


@st.composite
def spaces(draw):
    menus = st.sets(st.integers(1, 8), min_size=1).map(lambda bits: tuple(sorted(bits)))
    size = draw(st.integers(1, 6))
    ties = st.sampled_from([None, "a", "b"])
    shared = draw(menus)
    groups = []
    for i in range(size):
        tie = draw(ties)
        menu = draw(menus) if tie is None else shared
        groups.append(Group(f"w:l{i}", draw(st.integers(1, 999)), 7, menu, tie))
    return Space(tuple(groups))


@given(spaces())
def test_a_space_survives_json(space):
    again = Space.from_json(json.loads(json.dumps(space.to_json())))
    assert again == space
    assert again.fingerprint == space.fingerprint


@given(spaces())
def test_every_group_is_in_one_row(space):
    assert sorted(i for members in space.rows() for i in members) == list(range(len(space)))


@given(spaces())
def test_what_is_allowed_is_what_menus_and_ties_say(space):
    allowed = space.allowed()
    for members in space.rows():
        for i in members:
            widths = {b for b, ok in zip(space.widths, allowed[i], strict=True) if ok}
            assert widths == set.intersection(*(set(space.groups[j].menu) for j in members))


@pytest.mark.parametrize(
    "other",
    [
        Group("w:a", 10, 20, (2, 4, 8)),
        Group("w:b", 11, 20, (2, 4, 8)),
        Group("w:b", 10, 21, (2, 4, 8)),
        Group("w:b", 10, 20, (2, 4)),
        Group("w:b", 10, 20, (2, 4, 8), "t"),
    ],
)
def test_the_fingerprint_sees_every_property_of_a_group(other):
    assert Space((other,)).fingerprint != Space((Group("w:b", 10, 20, (2, 4, 8)),)).fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("conv", 1, 1, (4,)), "name must begin with 'w:' or 'a:', got 'conv'"),
        (("w:c", 0, 1, (4,)), "num_elements must be positive"),
        (("w:c", 1, -1, (4,)), "macs not negative, got 1 and -1"),
        (("w:c", 1, 1, ()), r"menu must be strictly increasing, got \(\)"),
        (("w:c", 1, 1, (4, 2)), r"menu must be strictly increasing, got \(4, 2\)"),
        (
            ("w:c", 1, 1, (4, 9)),
            r"menu must stay within 1..8 bits, or 0 for a channel, got \(4, 9\)",
        ),
        (
            ("w:c", 1, 1, (0, 4)),
            r"menu must stay within 1..8 bits, or 0 for a channel, got \(0, 4\)",
        ),
    ],
)
def test_a_group_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Group(*arguments)


def test_an_empty_space_is_refused():
    with pytest.raises(ValueError, match="at least one group"):
        Space(())


def test_two_groups_of_one_name_are_refused():
    with pytest.raises(ValueError, match="names of a space's groups must differ"):
        Space((Group("w:c", 1, 1, (4,)), Group("w:c", 2, 2, (4,))))


def test_a_tie_without_a_common_width_is_refused():
    with pytest.raises(ValueError, match="bit-width in common, got w:c, w:d"):
        Space((Group("w:c", 1, 1, (2, 4), "t"), Group("w:d", 1, 1, (3, 8), "t")))


def test_pins_fix_what_they_match_and_nothing_else():
    space = free_space([1, 2, 3], (2, 4, 8)).pinned({"l[02]": 8})
    assert [group.menu for group in space.groups] == [(8,), (2, 4, 8), (8,)]


def test_a_pin_may_lie_off_the_menu():
    space = free_space([1, 2], (2, 4)).pinned({"l0": 8})
    assert space.widths == (2, 4, 8)
    np.testing.assert_array_equal(space.allowed(), [[0, 0, 1], [1, 1, 0]])


def test_a_pin_that_matches_nothing_is_refused():
    with pytest.raises(
        ValueError, match="'stem' must match a layer of the weights, got none; there"
    ):
        free_space([1, 2], (2, 4)).pinned({"stem": 8})


def test_a_network_gives_its_layers_with_their_weights_and_macs():
    space = weight_space(ResidualNet(), torch.zeros(3, 2, 5, 5), (8, 2, 4))
    assert space.names == ("w:conv1", "w:conv2", "w:linear")
    assert [group.num_elements for group in space.groups] == [54, 81, 48]
    assert [group.macs for group in space.groups] == [54 * 25, 81 * 25, 48]
    assert space.widths == (2, 4, 8)


def test_groups_strides_and_sequences_are_counted():
    network = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.Flatten(2), nn.Linear(4, 5))
    space = weight_space(network, torch.zeros(2, 4, 5, 5), (4,))
    # 8 outputs of 2 inputs × 3 × 3 at 2 × 2 places; then 5 × 4 for each of 8 rows.
    assert [group.macs for group in space.groups] == [8 * 2 * 9 * 4, 5 * 4 * 8]


def test_a_layer_that_runs_on_many_regions_of_one_example_counts_each():
    class Regions(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(x.repeat(7, 1))

    assert weight_space(Regions(), torch.zeros(1, 3), (4,)).groups[0].macs == 7 * 6


def test_a_shared_weight_is_one_group_that_works_twice():
    space = weight_space(Siamese(), torch.zeros(1, 6), (4,))
    assert space.names == ("w:first", "w:left")
    assert [group.macs for group in space.groups] == [30, 50]


def test_quantized_layers_are_still_found_once_each():
    network = Siamese()
    before = list(quantizable_layers(network))
    attach(network, {f"w:{name}": 4 for name in before})
    assert list(quantizable_layers(network)) == before


def test_looking_at_a_network_leaves_modes_and_hooks_alone():
    network = ResidualNet().train()
    network.bn1.eval()
    statistics = network.bn1.running_mean.clone()
    weight_space(network, torch.ones(1, 2, 5, 5), (4,))
    assert network.training
    assert not network.bn1.training
    assert torch.equal(network.bn1.running_mean, statistics)
    assert not any(module._forward_hooks for module in network.modules())


def test_modes_come_back_after_an_error():
    network = ResidualNet().train()
    with pytest.raises(RuntimeError), evaluating(network):
        network(torch.zeros(1))
    assert all(module.training for module in network.modules())


def test_a_network_without_layers_is_refused():
    with pytest.raises(
        ValueError, match=r"must hold a convolution, a linear layer or an embedding .* ReLU"
    ):
        weight_space(nn.Sequential(nn.ReLU()), torch.zeros(1, 1), (4,))


# --- rules --------------------------------------------------------------------------------------


def both_kinds():
    names = ["w:stem", "w:block.conv", "w:head", "a:stem#0", "a:block.conv#0", "a:block.conv#1"]
    return Space(tuple(Group(name, 8, 1, (2, 4, 8)) for name in names))


def channels_of(*layers):
    return Space(tuple(Group(f"w:{name}[{c}]", 4, 1, (0, 2, 4)) for name in layers for c in (0, 1)))


def menus(space):
    return {group.name: group.menu for group in space.groups}


def test_rules_are_for_their_own_kind():
    space = both_kinds().pinned({"stem": 8}).pinned({"stem": 4}, "activations")
    assert (menus(space)["w:stem"], menus(space)["a:stem#0"]) == ((8,), (4,))


def test_a_tensor_is_meant_by_its_name_or_by_its_reader():
    by_reader = menus(both_kinds().pinned({"block.*": 4}, "activations"))
    assert by_reader["a:block.conv#0"] == by_reader["a:block.conv#1"] == (4,)
    by_name = menus(both_kinds().pinned({"block.conv#1": 4}, "activations"))
    assert by_name["a:block.conv#0"] == (2, 4, 8)


def test_a_layer_s_name_means_all_its_channels():
    space = channels_of("stem", "head").pinned({"stem": 4})
    assert [group.menu for group in space.groups] == [(4,), (4,), (0, 2, 4), (0, 2, 4)]


def test_least_bits_of_the_first_and_the_last_layer():
    space = both_kinds().at_least({"first": 4, "last": 8}).at_least({"first": 8}, "activations")
    assert menus(space)["w:stem"] == (4, 8)
    assert menus(space)["w:head"] == (8,)
    assert menus(space)["a:stem#0"] == (8,)
    with pytest.raises(ValueError, match="w:stem: menu must hold a width of at least 16 bits"):
        both_kinds().at_least({"first": 16})


def test_the_last_menu_that_matches_counts():
    space = both_kinds().restricted({"*": [4, 8], "head": [2, 8]})
    assert menus(space)["w:stem"] == (4, 8)
    assert menus(space)["w:head"] == (2, 8)


def test_ties_that_meet_are_one():
    space = both_kinds().tied([["stem", "block.*"], ["head", "stem"]])
    assert space.rows()[0] == (0, 1, 2)
    assert len(space.rows()) == 4


def test_tied_layers_share_bits_channel_by_channel():
    space = channels_of("left", "right").tied([["left", "right"]])
    assert space.rows() == [(0, 2), (1, 3)]


@pytest.mark.parametrize(
    ("ties", "message"),
    [
        ([["stem"]], r"tie \['stem'\] must join two layers or more, got stem"),
        ([["stem", "tail"]], "'tail' must match a layer of the weights, got none; there are"),
    ],
)
def test_a_tie_that_ties_nothing_is_refused(ties, message):
    with pytest.raises(ValueError, match=message):
        both_kinds().tied(ties)


def test_tied_layers_without_a_common_width_are_refused():
    space = both_kinds().pinned({"stem": 8, "head": 2})
    with pytest.raises(ValueError, match="tied groups must have a bit-width in common, got w:stem"):
        space.tied([["stem", "head"]])
