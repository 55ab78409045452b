"""Blocks of layers, found in networks and grouped by name."""

import pytest
import torch
from oracles import ResidualNet
from torch import nn
from torchvision import models

from hawq.curvature.blocks import grouped_blocks, residual_blocks
from hawq.space import quantizable_layers
from search.tasks.networks import SmallResNet


def on_meta(build, **arguments) -> nn.Module:
    """A large network without its weights."""
    with torch.device("meta"):
        return build(**arguments)


def sizes(model: nn.Module) -> dict[str, int]:
    blocks = residual_blocks(model)
    layers = [layer for members in blocks.values() for layer in members]
    assert layers == list(quantizable_layers(model))  # each once, in order
    return {name: len(members) for name, members in blocks.items()}


def test_resnet20_has_nine_residual_blocks_between_its_first_and_last_layer():
    blocks = residual_blocks(SmallResNet(20))
    assert list(blocks) == [
        "conv1",
        *(f"layer{stage}.{i}" for stage in (1, 2, 3) for i in range(3)),
        "linear",
    ]
    assert blocks["layer2.0"] == ("layer2.0.conv1", "layer2.0.conv2")
    assert blocks["linear"] == ("linear",)


def test_resnet50_has_sixteen_bottlenecks_that_hold_their_shortcuts():
    found = sizes(on_meta(models.resnet50))
    depths = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}
    bottlenecks = [f"{stage}.{i}" for stage, depth in depths.items() for i in range(depth)]
    assert list(found) == ["conv1", *bottlenecks, "fc"]
    assert {name for name in bottlenecks if found[name] == 4} == {f"{stage}.0" for stage in depths}


def test_inception_v3_has_a_block_for_each_of_its_mixed_modules():
    found = sizes(on_meta(models.inception_v3, init_weights=False))
    assert [name for name in found if name.startswith("Mixed")] == [
        *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d"),
        *("Mixed_6e", "Mixed_7a", "Mixed_7b", "Mixed_7c"),
    ]
    assert found["Mixed_5b"] == 7
    assert found["Conv2d_1a_3x3.conv"] == found["fc"] == 1


def test_mobilenet_v2_has_seventeen_inverted_residuals():
    found = sizes(on_meta(models.mobilenet_v2))
    assert list(found) == [
        "features.0.0",
        *(f"features.{i}" for i in range(1, 18)),
        "features.18.0",
        "classifier.1",
    ]
    assert [found[f"features.{i}"] for i in (1, 2, 17)] == [2, 3, 3]


def test_a_squeeze_and_excitation_belongs_to_the_block_around_it():
    found = sizes(on_meta(models.efficientnet_b0))
    assert len(found) == 16 + 3
    assert found["features.2.0"] == 5


@pytest.mark.parametrize(
    ("build", "block", "num_blocks"),
    [
        (models.densenet121, "features.denseblock1.denselayer1", 58 + 5),
        (models.squeezenet1_0, "features.3", 8 + 2),
        (models.vit_b_16, "encoder.layers.encoder_layer_0", 12 + 2),
        (models.shufflenet_v2_x0_5, "stage2.0", 16 + 3),
    ],
)
def test_other_families_fall_apart_where_their_authors_drew_the_line(build, block, num_blocks):
    found = sizes(on_meta(build))
    assert found[block] > 1
    assert len(found) == num_blocks


def test_a_plain_sequence_has_blocks_of_one_layer():
    net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.ReLU())
    assert residual_blocks(net) == {"0": ("0",), "1.0": ("1.0",), "1.1": ("1.1",)}


def test_a_sequence_with_a_forward_of_its_own_is_a_block():
    class Shortcut(nn.Sequential):
        def forward(self, x):
            return x + super().forward(x)

    net = nn.Sequential(nn.Linear(4, 4), Shortcut(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert residual_blocks(net) == {"0": ("0",), "1": ("1.0", "1.2")}


def test_the_network_itself_is_no_block_but_is_one_inside_another():
    assert list(residual_blocks(ResidualNet())) == ["conv1", "conv2", "linear"]
    wrapped = nn.Sequential(ResidualNet(), nn.Linear(4, 2))
    assert residual_blocks(wrapped) == {"0": ("0.conv1", "0.conv2", "0.linear"), "1": ("1",)}


def test_a_shared_weight_is_in_the_block_that_has_it_first():
    net = SmallResNet(8)
    net.layer3[0].conv2.weight = net.layer3[0].conv1.weight = nn.Parameter(torch.ones(64, 64, 3, 3))
    assert residual_blocks(net)["layer3.0.conv1"] == ("layer3.0.conv1",)


# --- by name ------------------------------------------------------------------------------------

LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "linear")


def test_layers_are_grouped_by_glob_and_the_rest_stay_alone():
    blocks = grouped_blocks(LAYERS, {"ends": ["linear", "conv1"], "stage": ["layer1.0.*", "*.1.*"]})
    assert blocks == {
        "ends": ("conv1", "linear"),
        "stage": ("layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1"),
    }
    assert grouped_blocks(LAYERS, {}) == {layer: (layer,) for layer in LAYERS}
    assert list(grouped_blocks(LAYERS, {"last": ["linear"]})) == [*LAYERS[:4], "last"]


def test_a_group_may_repeat_itself_and_have_its_first_layer_s_name():
    blocks = grouped_blocks(LAYERS, {"conv1": ["conv1", "conv*", "linear"]})
    assert blocks["conv1"] == ("conv1", "linear")


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"a": ["layer2.*"]}, r"'layer2.\*' in block 'a' must match a layer, got none of conv1, "),
        (
            {"a": ["layer1.*"], "b": ["*.conv2"]},
            "layer must be in one block, got layer1.0.conv2 in 'a' and 'b'",
        ),
        ({"conv1": ["linear"]}, "block 'conv1' must not have the name of a layer outside it"),
        ({"a": ["conv1"], "conv1": ["linear"]}, "block 'conv1' must not have the name"),
    ],
)
def test_groups_that_make_no_sense_are_refused(patterns, message):
    with pytest.raises(ValueError, match=message):
        grouped_blocks(LAYERS, patterns)
