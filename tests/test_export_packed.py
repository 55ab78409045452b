"""A packed file is as small as it says, and loads back to the bits that were tested."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hawq.export import encode, load, pack, read
from hawq.finetune import attach, calibrate
from hawq.quantizers import Scheme, Schemes
from hawq.reads import network_space, read_network
from search.tasks.networks import SmallResNet


class Net(nn.Module):
    """Every way of reading: a shared weight, a layer that runs twice, two readers of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.again = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.left = nn.Conv2d(6, 4, 1)
        self.right = nn.Conv2d(6, 4, 1)
        self.right.weight = self.left.weight
        self.last = nn.Linear(4, 5)
        self.register_buffer("steps", torch.tensor([3, 4]))

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        x = self.again(self.again(x)).tanh()
        x = self.left(x) + self.right(x)
        return self.last(x.mean((2, 3)))


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


IMAGES = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def quantized(schemes, bits=None, *, by_channel=False, draw=0):
    """A network with random bits, and scales that training has moved."""
    model = net()
    if bits is None:
        space = network_space(
            read_network(model, IMAGES), range(9), range(9), by_channel=by_channel
        )
        rng = np.random.default_rng(draw)
        bits = {g.name: int(rng.choice(g.menu)) for g in space.groups}
    attach(model, bits, IMAGES, schemes)
    calibrate(model, [IMAGES])
    generator = torch.Generator().manual_seed(draw)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter.mul_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))
    return model


SCHEMES = [
    Scheme(learning=learning, range="minmax", symmetric=symmetric, per=per)
    for learning, symmetric, per in product(
        ["lsq", "pact", "dorefa"], [True, False], ["channel", "tensor"]
    )
    if not (learning == "dorefa" and not symmetric)
]
SCHEMES += [Scheme(learning="fixed", range="mse"), Scheme(range="percentile", percentile=95)]


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_file_loads_back_to_the_same_bits(scheme, by_channel):
    weights = Scheme() if scheme.learning == "pact" else scheme
    for draw in range(3):
        model = quantized(Schemes(weights, scheme), by_channel=by_channel, draw=draw)
        loaded = load(read(encode(pack(model))), net())
        assert torch.equal(loaded(IMAGES), model(IMAGES))
        assert torch.equal(loaded(IMAGES), model(IMAGES)), (
            "a second pass begins where the first did"
        )


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_take_their_real_width(bits):
    layer = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False))
    attach(layer, {"w:0": bits})
    packed = pack(layer)
    rest = len(encode(packed)) - 32 * 16 * 9 * bits // 8 - 32 * 4
    assert 0 < rest < 600
    assert packed.weights[0].codes.max() <= 2**bits - 1


def test_a_pruned_channel_takes_no_room_but_its_entry_in_the_map():
    layer = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False))

    def size(pruned):
        attached = nn.Sequential(nn.Conv2d(16, 32, 3, bias=False))
        attached.load_state_dict(layer.state_dict())
        attach(attached, {f"w:0[{c}]": 0 if c < pruned else 4 for c in range(32)})
        return len(encode(pack(attached)))

    each = 16 * 9 * 4 // 8 + 4
    assert abs(size(4) - size(20) - 16 * each) < 8


@settings(max_examples=25)
@given(
    st.integers(1, 8).flatmap(
        lambda width: st.tuples(
            st.just(width), st.lists(st.integers(0, 2**width - 1), min_size=1, max_size=70)
        )
    )
)
def test_any_codes_survive(case):
    width, codes = case
    layer = nn.Sequential(nn.Linear(len(codes), 1, bias=False))
    scheme = Scheme(learning="fixed", range="minmax", symmetric=False)
    attach(layer, {"w:0": width}, schemes=Schemes(scheme))
    with torch.no_grad():
        quantizer = layer[0].parametrizations.weight[0]
        quantizer.scale.fill_(0.5)
        quantizer.zero_point.fill_(1)
        layer[0].parametrizations.weight.original.copy_(0.5 * (torch.tensor(codes) - 1.0))
        quantizer.load_state_dict(quantizer.state_dict())
    (weight,) = read(encode(pack(layer))).weights
    assert weight.codes.ravel().tolist() == codes


def test_the_size_of_a_resnet20_is_what_the_tables_count():
    model = SmallResNet(20, in_channels=3, num_classes=10).eval()
    images = torch.randn(4, 3, 32, 32)
    reads = read_network(model, images)
    bits = {f"w:{layer.name}": 2 + i % 2 for i, layer in enumerate(reads.layers)}
    bits |= {f"a:{tensor.name}": 4 for tensor in reads.activations}
    attach(model, bits, images)
    calibrate(model, [images])
    packed = pack(model)
    weights = sum(layer.num_elements * bits[f"w:{layer.name}"] for layer in reads.layers)
    scales = 32 * sum(layer.num_channels for layer in reads.layers)
    rest = 8 * sum(value.nbytes for value in packed.rest.values())
    assert len(encode(packed)) * 8 == pytest.approx(weights + scales + rest, rel=0.02)


def test_plain_data_goes_with_a_file():
    about = {"score": 0.91, "names": ["ä", "b"]}
    assert read(encode(pack(quantized(None), about))).about == about


def test_another_network_is_refused():
    packed = pack(quantized(None))
    with pytest.raises(ValueError, match="must be the one that was packed"):
        load(packed, nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04 something", b"\x08\0\0\0\0\0\0\0{}      "])
def test_what_is_no_packed_file_is_refused(data):
    with pytest.raises(ValueError, match="must be a packed network"):
        read(data)


def test_the_packed_network_is_left_as_it_was():
    model = quantized(None)
    before, outputs = json.dumps(list(model.state_dict())), model(IMAGES)
    pack(model)
    assert json.dumps(list(model.state_dict())) == before
    assert torch.equal(model(IMAGES), outputs)


def test_the_reader_needs_numpy_and_torch_alone(tmp_path):
    """Its page is copied somewhere else and read from there."""
    (tmp_path / "file").write_bytes(encode(pack(quantized(None))))
    from hawq.export import packed  # noqa: PLC0415  for its place

    (tmp_path / "packed.py").write_text(Path(packed.__file__).read_text())
    code = (
        "import sys, packed, pathlib; n = packed.read(pathlib.Path('file').read_bytes()); "
        "assert n.weights and not [m for m in sys.modules if m.startswith(('hawq', 'safetensors'))]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
