"""What other programs wrote, in the names of a run."""

import json

import pytest

from search.errors import InputError
from search.imports import read_bits

NAMES = ["w:conv1", "w:layer1.0.conv1", "w:layer1.0.downsample.0", "w:fc"]
SCOPES = [
    [8, "ResNet/NNCFConv2d[conv1]/conv2d_0|WEIGHT"],
    [2, "ResNet/Sequential[layer1]/BasicBlock[0]/NNCFConv2d[conv1]/conv2d_0|WEIGHT"],
    [
        4,
        "ResNet/Sequential[layer1]/BasicBlock[0]/Sequential[downsample]/NNCFConv2d[0]/"
        "ModuleDict[pre_ops]/UpdateWeight[0]/SymmetricQuantizer[op]|WEIGHT",
    ],
    [3, "TargetType.OPERATION_WITH_WEIGHTS ResNet/NNCFLinear[fc]"],
]
ACTIVATIONS = [
    [8, "ResNet/ReLU[relu]/relu__0|OUTPUT"],
    [8, "TargetType.OPERATOR_POST_HOOK /nncf_model_input_0"],
]
BITS = {"w:conv1": 8, "w:layer1.0.conv1": 2, "w:layer1.0.downsample.0": 4, "w:fc": 3}


def written(tmp_path, content):
    path = tmp_path / "bits"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    "content",
    [
        SCOPES,
        {"bitwidth_per_scope": SCOPES},
        {"compression": {"initializer": {"precision": {"bitwidth_per_scope": SCOPES}}}},
        BITS,
        {name[2:]: bits for name, bits in BITS.items()},
        {"method": "exact", "bits": BITS},
        "layer,bits\n" + "".join(f"{name[2:]},{bits}\n" for name, bits in BITS.items()),
        "bits,layer\n" + "".join(f"{bits},{name}\n" for name, bits in reversed(BITS.items())),
    ],
)
def test_every_form_gives_the_same_bits(tmp_path, content):
    found = read_bits(written(tmp_path, content), NAMES)
    assert found.bits == BITS
    assert list(found.bits) == NAMES
    assert found.left_out == ()


def test_what_operators_write_is_left_out_and_told(tmp_path):
    found = read_bits(written(tmp_path, SCOPES + ACTIVATIONS), NAMES)
    assert found.bits == BITS
    assert found.left_out == tuple(scope for _, scope in ACTIVATIONS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layer1.0.conv": 3}, "must be a layer of the run, got none; the nearest are w:layer1.0"),
        (SCOPES[:3], "lacks w:fc"),
        ([[2.5, "fc"]], "bits of fc must be a whole number, got 2.5"),
        ([["fc", 2]], r"must be a list of \[bits, scope\]"),
        ([*SCOPES, [4, "fc"]], "w:fc must be given once, got 3 and 4"),
        ("{", "got damaged text"),
        ("a,b\n1,2\n", "CSV with the columns layer and bits"),
        ("", "CSV with the columns layer and bits"),
        ({}, "got neither"),
    ],
)
def test_a_mistake_is_told_with_its_place(tmp_path, content, message):
    with pytest.raises(InputError, match=message):
        read_bits(written(tmp_path, content), NAMES)


def test_a_missing_file_is_a_mistake(tmp_path):
    with pytest.raises(InputError, match="must be a text file of bits"):
        read_bits(tmp_path / "none", NAMES)
