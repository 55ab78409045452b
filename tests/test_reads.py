"""Who reads what: tensors with several readers, layers that run often, lifetimes, sums."""

import pytest
import torch
import torch.nn.functional as F
from oracles import ResidualNet
from torch import nn

from hawq.curvature.sites import activation_sites
from hawq.reads import network_space, read_network, weight_space
from hawq.space import quantizable_layers


class Shared(nn.Module):
    """One head over two levels, and a branch that reads what another layer reads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 1)
        self.right = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        y = self.left(x) + self.bn(self.right(x))
        big, small = torch.relu(y), F.avg_pool2d(torch.relu(y), 2)
        return self.head(big).flatten(1).sum(1) + self.head(small).flatten(1).sum(1)


def shared():
    torch.manual_seed(0)
    return read_network(Shared(), torch.randn(2, 3, 4, 4))


def test_a_tensor_with_several_readers_is_one_and_is_named_after_the_first():
    reads = shared()
    assert [(r.layer, r.activation) for r in reads.reads] == [
        ("stem", "stem#0"),
        ("left", "left#0"),
        ("right", "left#0"),
        ("head", "head#0"),
        ("head", "head#1"),
    ]
    assert [a.num_elements for a in reads.activations] == [48, 64, 64, 16]
    assert [a.num_channels for a in reads.activations] == [3, 4, 4, 4]
    assert [a.is_input for a in reads.activations] == [True, False, False, False]


def test_macs_are_counted_call_by_call():
    reads = shared()
    assert [r.macs for r in reads.reads] == [16 * 108, 16 * 16, 16 * 144, 16 * 8, 4 * 8]
    assert {layer.name: layer.macs for layer in reads.layers}["head"] == 16 * 8 + 4 * 8


def test_a_tensor_is_alive_from_what_makes_it_to_what_needs_it_last():
    assert shared().alive == (
        ("stem#0", "left#0"),
        ("left#0",),
        ("left#0", "head#0", "head#1"),  # both levels are made before the head first runs
        ("head#0", "head#1"),
        ("head#1",),
    )


def test_a_residual_branch_keeps_its_tensor_alive_until_it_is_added():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            x = torch.relu(self.layers[0](x))
            y = torch.relu(self.layers[1](x))
            y = self.layers[2](y)
            return self.layers[3](torch.relu(y + x))

    reads = read_network(Block(), torch.zeros(1, 4))
    names = ["layers.0#0", "layers.1#0", "layers.2#0", "layers.3#0"]
    assert reads.alive == (
        (names[0], names[1]),
        (names[1], names[2]),
        (names[1], names[2], names[3]),
        (names[3],),
    )


def test_layers_that_are_added_are_found_through_batch_norm_and_no_further():
    assert shared().sums == (("left", "right"),)
    assert read_network(ResidualNet(), torch.zeros(1, 2, 5, 5)).sums == ()

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(3, 3) for _ in range(4))

        def forward(self, x):
            together = self.a(x) + self.b(x)
            together += self.c(x)
            return together + torch.relu(self.d(x))  # d is rectified first

    assert read_network(Chain(), torch.zeros(1, 3)).sums == (("a", "b", "c"),)


def test_sites_of_the_curvature_are_the_tensors_that_are_read():
    for model, x in ((Shared(), torch.randn(2, 3, 4, 4)), (ResidualNet(), torch.randn(2, 2, 5, 5))):
        layers = list(quantizable_layers(model))
        reads = read_network(model, x)
        sites = activation_sites(model, layers, lambda m=model, x=x: m(x[:1]))
        assert [(s.name, s.num_elements, s.num_channels) for s in sites] == [
            (a.name, a.num_elements, a.num_channels) for a in reads.activations
        ]


def test_reading_a_network_leaves_nothing_behind():
    model = Shared().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    read_network(model, torch.randn(2, 3, 4, 4))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_space_of_channels_has_the_elements_and_macs_of_its_layers():
    reads = shared()
    layers = network_space(reads, (2, 4), (4, 8))
    channels = network_space(reads, (0, 2, 4), (4, 8), by_channel=True)
    assert layers.groups[0].menu == (2, 4)
    assert channels.groups[0].menu == (0, 2, 4)
    for layer in layers.groups:
        mine = [g for g in channels.groups if g.name.startswith(f"{layer.name}[")]
        assert [g.name for g in mine] == [f"{layer.name}[{c}]" for c in range(len(mine))]
        assert sum(g.num_elements for g in mine) == layer.num_elements
        assert sum(g.macs for g in mine) == pytest.approx(layer.macs, abs=len(mine))


def test_a_network_without_layers_is_refused():
    with pytest.raises(ValueError, match="must hold a convolution, a linear layer or an embedding"):
        weight_space(nn.Sequential(nn.ReLU()), torch.zeros(1, 1), (4,))
