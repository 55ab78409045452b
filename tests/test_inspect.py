"""What there is to quantize in a network, and that every kind of layer goes all the way."""

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import hawq
from hawq.finetune import attach, detach
from hawq.reads import network_space, read_network
from hawq.space import unquantizable_weights
from search.cli import app
from search.commands.inspect import _smaller, inspected, inspection_view
from search.errors import InputError

SMALL = "pytorchcv:sqnxt23_w1"


class Mixed(nn.Module):
    """Sums, a concatenation after activations, a shared weight, and what cannot be quantized."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 4, 1), nn.Conv2d(1, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2, groups=8)
        self.place = nn.Parameter(torch.zeros(16, 16))
        self.depthwise = nn.Conv2d(8, 8, 3, 4, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.twin = nn.Conv2d(8, 8, 1, groups=2)
        self.twin.weight = self.grouped.weight
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        x = self.depthwise(self.up(x) + self.place)
        return self.head((x + self.twin(self.grouped(x))).mean((2, 3)))


def make_mixed():
    return Mixed()


CONFIG = f"""
task:
  data: digits
  model: {__name__}:make_mixed
  search_size: 100
budgets: [{{average_bits: 4}}]
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "mixed.yaml"
    path.write_text(CONFIG)
    return inspected(str(path), ["weights.keep=[head]"], estimator=True)


def test_layers_are_named_with_their_kind_their_reads_and_their_ties(found):
    layers = {layer.name: layer for layer in found.layers}
    assert list(layers) == ["left", "right", "up", "depthwise", "grouped"]  # the head is kept
    assert layers["depthwise"].kind == "Conv2d, depthwise"
    assert layers["up"].kind == "ConvTranspose2d, depthwise"
    assert layers["grouped"].kind == "Conv2d, 2 groups"
    assert layers["grouped"].shape == (8, 4, 1, 1)
    assert layers["left"].ties == layers["right"].ties == ("concatenation 1",)
    assert layers["grouped"].ties == ("sum 1", "shared by 2 modules")
    assert layers["left"].reads == layers["right"].reads == ("left#0",)
    assert layers["grouped"].reads == ("grouped#0", "twin#0")
    assert layers["left"].macs == 64 * 4
    assert layers["up"].macs == 64 * 8 * 4
    assert layers["depthwise"].num_elements == 72
    assert found.kept == {"place": 256}
    assert found.input_shape == (1, 8, 8)


def test_the_estimator_is_the_one_that_a_search_would_take(found):
    assert found.estimator.startswith("corrected gauss newton: ") or found.estimator.startswith(
        "gauss newton: "
    )


def test_the_table_says_what_stays_in_floating_point(found):
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(inspection_view(found))
    console.file.close()
    text = console.export_text()
    for piece in ("depthwise", "in floating point, for they cannot be quantized: place (256)"):
        assert piece in text


def test_a_published_network_is_inspected_on_the_command_line():
    done = CliRunner().invoke(app, ["inspect", SMALL, "--resolution", "224"])
    assert done.exit_code == 0, done.output
    assert "MiB in fp32" in done.output
    assert "3×224×224" in done.output


@pytest.mark.parametrize(
    ("name", "estimator", "side"),
    [
        ("timm:test_resnet", "gauss newton: ", 160),
        ("timm:test_vit", "corrected gauss newton: ", 160),  # whose size is built in
    ],
)
def test_a_published_network_tells_its_estimator(name, estimator, side):
    found = inspected(name, estimator=True)
    assert found.estimator.startswith(estimator)
    assert found.input_shape == (3, side, side)  # as its library says, whatever was looked at


def test_an_estimator_is_found_on_smaller_images_where_a_network_takes_them():
    images = torch.randn(1, 3, 30, 30)
    free = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(28), nn.Flatten(), nn.Linear(4, 2))
    for model in (free, pooled):
        looked_at, seen = _smaller(model, images)
        assert torch.equal(seen, images[..., :10, :10])
        assert looked_at(seen).shape == (1, 2)
    bound = nn.Sequential(nn.Flatten(), nn.Linear(2700, 2))
    looked_at, seen = _smaller(bound, images)
    assert looked_at is bound
    assert seen is images


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("nowhere.yaml", {}, r"nowhere\.yaml: must be a config that exists, or a network"),
        (SMALL, {"resolution": 8}, r"must take images of 8 pixels, got .*give --resolution"),
        (SMALL, {"overrides": ["seed=1"]}, r"--set: is for a config"),
        ("pytorchcv:resnet", {}, r"did you mean"),
    ],
)
def test_what_cannot_be_inspected_is_refused(what, options, message):
    with pytest.raises(InputError, match=message):
        inspected(what, **options)


# Every kind of layer: read, traced, quantized and given back.


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x.mean(1))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.embedding(x).mean(1))


def pooled(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


KINDS = {
    "depthwise": (lambda: pooled(nn.Conv2d(4, 4, 3, groups=4)), (4, 5, 5), {}),
    "grouped": (lambda: pooled(nn.Conv2d(4, 6, 3, groups=2)), (4, 5, 5), {}),
    "one dimension": (lambda: pooled(nn.Conv1d(4, 6, 3, dilation=2)), (4, 7), {}),
    "three dimensions": (lambda: pooled(nn.Conv3d(2, 3, 2)), (2, 3, 3, 3), {}),
    "transposed": (lambda: pooled(nn.ConvTranspose2d(2, 3, 2)), (2, 3, 3), {}),
    "transposed, grouped": (lambda: pooled(nn.ConvTranspose1d(4, 6, 3, 2, groups=2)), (4, 5), {}),
    "linear, sequences": (lambda: pooled(nn.Linear(4, 5), nn.ReLU()), (3, 4), {}),
    "embedding": (Embedded, (5,), {}),
    "attention": (Attention, (3, 4), {"attention.in_proj_weight": 48}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_is_read_traced_quantized_and_given_back(kind):
    make, shape, kept = KINDS[kind]
    torch.manual_seed(0)
    model = make().eval()
    x = torch.randint(7, (8, *shape)) if kind == "embedding" else torch.randn(8, *shape)
    model(x)  # lazy layers find their shapes
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reads = read_network(model, x)
    space = network_space(reads, [4], [8])
    assert unquantizable_weights(model) == kept
    found = hawq.traces(
        model, [(x, torch.arange(8) % 3)], num_examples=8, batch_size=4, rtol=0.3, max_probes=8
    )
    assert {f"w:{name}" for name in found.names} == {n for n in space.names if n[:2] == "w:"}
    assert torch.isfinite(torch.tensor(found.estimate.trace)).all()
    plain = model(x)
    attach(model, {name: 4 if name[:2] == "w:" else 8 for name in space.names}, x)
    quantized = model(x)
    assert quantized.shape == plain.shape
    assert not torch.equal(quantized, plain)
    quantized.sum().backward()
    detach(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_projection_inside_attention_has_bits_but_reads_no_tensor_by_name():
    # torch's attention takes the module's weight and never calls it.
    reads = read_network(Attention(), torch.randn(1, 3, 4))
    assert [(layer.name, layer.macs > 0) for layer in reads.layers] == [
        ("attention.out_proj", False),
        ("head", True),
    ]
    assert [read.layer for read in reads.reads] == ["head"]
