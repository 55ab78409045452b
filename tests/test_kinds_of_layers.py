"""Transposed convolutions and embeddings go the whole way that convolutions go."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import mean_loss_gauss_newton
from torch import nn

import hawq
from hawq.channels import channels_first, transposed_groups
from hawq.export import encode, load, pack, read
from hawq.export.onnx_graph import INPUT, onnx_graph
from hawq.finetune import attach, calibrate, detach, fold_batch_norm
from hawq.finetune.requantized import Requantized
from hawq.quantizers import Scheme, Schemes
from hawq.ranges import weight_errors
from hawq.reads import network_space, read_network
from hawq.space import quantizable_layers, unquantizable_weights
from search.exported import onnx_session


class Decoder(nn.Module):
    """Grows images: transposed convolutions, one grouped, one depthwise, one to a given size."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, 2, 1)
        self.grouped = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = nn.ConvTranspose2d(6, 6, 2, groups=6)
        self.up = nn.ConvTranspose2d(6, 3, 3, padding=1)
        self.norm.running_mean.normal_(0, 0.3)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.norm(self.grouped(self.down(x).relu())).relu()
        return self.up(self.depthwise(x).relu()).mean((2, 3))


class Reader(nn.Module):
    """Classifies sentences: what each word means, and where it stands."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 6, padding_idx=0)
        self.places = nn.Embedding(5, 6)
        self.wide, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        places = torch.arange(x.shape[1]).expand_as(x)
        return self.head(self.wide(self.words(x) + self.places(places)).relu().mean(1))


IMAGES = torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def made(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


# Words come more than once, and the end of every second sentence is empty.
WORDS = torch.randint(1, 9, (8, 5), generator=torch.Generator().manual_seed(1))
WORDS[::2, 3:] = 0
CASES = {"decoder": (Decoder, IMAGES), "reader": (Reader, WORDS)}
SCHEMES = {
    "lsq": None,
    "asymmetric": Schemes(Scheme(symmetric=False), Scheme(symmetric=False, per="channel")),
    "dorefa": Schemes(Scheme(learning="dorefa"), Scheme(learning="pact", per="tensor")),
    "one scale": Schemes(Scheme(per="tensor"), Scheme(per="tensor")),
}
every_case = pytest.mark.parametrize("case", CASES)


def drawn(case, schemes=None, *, by_channel=False, whole_activations=False):
    """A network whose groups have random bits, calibrated."""
    kind, x = CASES[case]
    model = made(kind)
    menu = range(9) if by_channel else range(1, 9)
    reads = read_network(model, x)
    groups = network_space(reads, menu, menu, by_channel=by_channel).groups
    if whole_activations:
        groups = network_space(reads, menu, by_channel=by_channel).groups
        activations = network_space(reads, menu, menu).part("activations")
        groups += activations.groups
    rng = np.random.default_rng(0)
    attach(model, {g.name: int(rng.choice(g.menu)) for g in groups}, x, schemes)
    calibrate(model, [x])
    return model


@every_case
def test_every_weight_is_a_group_and_none_is_left(case):
    kind, x = CASES[case]
    model = made(kind)
    reads = read_network(model, x)
    assert unquantizable_weights(model) == {}
    assert [layer.name for layer in reads.layers] == list(quantizable_layers(model))
    channels = network_space(reads, [4], by_channel=True)
    for layer in reads.layers:
        own = [g for g in channels.groups if g.owner == layer.name]
        assert sum(g.num_elements for g in own) == layer.num_elements
        assert len(own) == layer.num_channels


def test_channels_first_is_the_weight_of_the_convolution_that_does_the_same():
    for groups, outputs in ((1, 3), (2, 6), (4, 4)):
        layer = nn.ConvTranspose2d(4, outputs, 3, groups=groups)
        rows = channels_first(layer.weight, transposed_groups(layer))
        assert rows.shape == (outputs, 4 // groups, 3, 3)
        assert torch.equal(channels_first(rows, groups), layer.weight)
        x = torch.randn(2, 4, 5, 5)
        # A full convolution with the kernel turned round.
        expected = F.conv2d(x, rows.flip(2, 3), layer.bias, padding=2, groups=groups)
        torch.testing.assert_close(layer(x), expected)


def test_a_transposed_convolution_multiplies_each_input_with_its_kernel():
    model = made(Decoder)
    macs = {layer.name: layer.macs for layer in read_network(model, IMAGES).layers}
    # 3×3 inputs; then 5×5, of six channels; then 6×6.
    assert macs == {
        "down": 9 * 4 * 2 * 9,
        "grouped": 4 * 9 * 3 * 9,
        "depthwise": 6 * 25 * 4,
        "up": 6 * 36 * 3 * 9,
    }


@every_case
def test_a_channel_of_a_weight_has_its_own_scale_and_error(case):
    kind, x = CASES[case]
    model = made(kind)
    plain = {n: layer.weight.detach().clone() for n, layer in quantizable_layers(model).items()}
    reads = read_network(model, x)
    # Only the second channel of each weight loses its bits.
    space = network_space(reads, range(9), by_channel=True)
    attach(model, {g.name: 0 if g.name.endswith("[1]") else 8 for g in space.groups}, x)
    for name, layer in quantizable_layers(model).items():
        groups = transposed_groups(layer)
        rows = channels_first(layer.weight, groups).detach()
        before = channels_first(plain[name], groups)
        survives = (before.flatten(1) != 0).any(1)
        survives[1] = False
        assert torch.equal((rows.flatten(1) != 0).any(1), survives)
        error = weight_errors(before, [8])[:, 0]
        found = (rows - before).double().square().flatten(1).sum(1)
        others = [c for c in range(len(rows)) if c != 1]
        torch.testing.assert_close(found[others], error[others])


@every_case
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_traces_agree_with_dense_gauss_newton_blocks(case, granularity):
    kind, x = CASES[case]
    model = made(kind).double()
    x = x.double() if x.is_floating_point() else x
    found = hawq.traces(
        model,
        [(x, torch.arange(len(x)) % 3)],
        granularity=granularity,
        estimator="exact_gauss_newton",
        num_examples=len(x),
        batch_size=4,
    )
    for name, layer in quantizable_layers(model).items():
        diagonal = mean_loss_gauss_newton(model, [name], x).diagonal().view_as(layer.weight)
        torch.testing.assert_close(found[name][0], diagonal.sum().item(), rtol=1e-4, atol=1e-9)
        if granularity == "channel":
            rows = channels_first(diagonal, transposed_groups(layer)).flatten(1).sum(1)
            channels = [found[f"{name}[{c}]"][0] for c in range(len(rows))]
            torch.testing.assert_close(
                torch.tensor(channels, dtype=torch.float64), rows, rtol=1e-4, atol=1e-9
            )


@every_case
def test_hessian_products_agree_with_exact_traces_of_channels(case):
    kind, x = CASES[case]
    arguments = {"granularity": "channel", "num_examples": len(x), "batch_size": 4}
    exact, sampled = (
        hawq.traces(made(kind), [(x, torch.arange(len(x)) % 3)], estimator=name, **arguments)
        for name in ("exact_gauss_newton", "hutchinson")
    )
    e, s = exact.estimate, sampled.estimate
    error = np.hypot(s.probe_error, 1e-6 * np.abs(e.trace).max())
    assert (np.abs(np.asarray(s.trace) - np.asarray(e.trace)) < 6 * error).all()


@every_case
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("schemes", SCHEMES)
def test_a_packed_network_loads_back_bit_for_bit(case, schemes, by_channel):
    kind, x = CASES[case]
    model = drawn(case, SCHEMES[schemes], by_channel=by_channel)
    found = load(read(encode(pack(model))), made(kind))
    for name, layer in quantizable_layers(model).items():
        assert torch.equal(found.get_submodule(name).weight, layer.weight), name
    with torch.no_grad():
        assert torch.equal(found(x), model.eval()(x))


@every_case
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("schemes", SCHEMES)
def test_onnx_runtime_computes_what_is_quantized_here(case, schemes, by_channel):
    kind, x = CASES[case]
    # ONNX Runtime multiplies matrices of codes that have one scale for all features alone.
    whole, own = case == "reader", SCHEMES[schemes] or Schemes()
    if whole:
        own = replace(own, activations=replace(own.activations, per="tensor"))
    model = drawn(case, own, by_channel=by_channel, whole_activations=whole)
    graph = onnx_graph(pack(model), made(kind), x[:2])
    session = onnx_session(graph.model.SerializeToString(), 1)
    for inputs in (x[:1], x):
        (found,) = session.run(None, {INPUT: inputs.numpy()})
        close = np.abs(found - model(inputs).detach().numpy()) < 1e-4
        assert close.mean() > 0.9  # sums in another order meet the middle between two codes


def test_scales_of_a_transposed_convolution_lie_on_its_output_axis_in_onnx():
    graph = onnx_graph(pack(drawn("decoder")), made(Decoder), IMAGES[:2]).model.graph
    constants = {c.name: tuple(c.dims) for c in graph.initializer}
    (node,) = [n for n in graph.node if n.output[0] == "network.up.weight"]
    assert (node.op_type, node.attribute[0].i) == ("DequantizeLinear", 1)
    assert constants[node.input[0]] == (6, 3, 3, 3)
    assert constants[node.input[1]] == (3,)
    assert constants["network.grouped.weight.integers"] == (6, 2, 3, 3)  # outputs first


@every_case
@pytest.mark.parametrize("by_channel", [False, True])
def test_training_moves_every_weight_and_scale_and_detaching_gives_the_network_back(
    case, by_channel
):
    kind, x = CASES[case]
    model = made(kind)
    names = list(model.state_dict())
    plain = model(x)
    space = network_space(read_network(model, x), [3], [4], by_channel=by_channel)
    attach(model, {g.name: g.menu[0] for g in space.groups}, x)
    calibrate(model, [x])
    F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    for name, parameter in model.named_parameters():
        if name.endswith((".original", ".scale")):
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    detach(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), plain)


@every_case
def test_quantizing_again_and_again_gives_what_attaching_gives(case):
    kind, x = CASES[case]
    again = Requantized(made(kind), lambda: [x])
    space = network_space(read_network(made(kind), x), range(9), by_channel=True)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        bits = {g.name: int(rng.choice(g.menu)) for g in space.groups}
        again.quantize(bits)
        model = made(kind)
        attach(model, bits, x)
        for name, layer in quantizable_layers(model).items():
            assert torch.equal(again.model.get_submodule(name).weight, layer.weight)


def test_batch_norm_folds_into_a_grouped_transposed_convolution():
    model = made(Decoder)
    folded = fold_batch_norm(model, IMAGES)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(IMAGES), model(IMAGES))


def test_a_weight_that_both_kinds_of_convolution_use_is_one():
    class Mirrored(nn.Module):
        """As of an autoencoder: what made the features small makes the image large."""

        def __init__(self):
            super().__init__()
            self.down, self.up = nn.Conv2d(2, 4, 3, 2), nn.ConvTranspose2d(4, 2, 3, 2)
            self.up.weight = self.down.weight

        def forward(self, x):
            return self.up(self.down(x)).flatten(1)[:, :3]

    model = made(Mirrored)
    assert list(quantizable_layers(model)) == ["down"]
    attach(model, {"w:down": 3})
    assert torch.equal(model.up.weight, model.down.weight)
    plain = model(IMAGES)
    assert torch.equal(load(read(encode(pack(model))), made(Mirrored))(IMAGES), plain)


# Embeddings.


def test_an_embedding_multiplies_nothing_and_reads_no_activation():
    reads = read_network(made(Reader), WORDS)
    assert {layer.name: layer.macs for layer in reads.layers} == {
        "words": 0,
        "places": 0,
        "wide": 5 * 6 * 8,
        "head": 8 * 3,
    }
    assert [read.layer for read in reads.reads] == ["wide", "head"]
    assert [a.name for a in reads.activations] == ["wide#0", "head#0"]
    assert reads.sums == (("words", "places"),)


@pytest.mark.parametrize("bits", range(1, 9))
def test_an_empty_place_stays_empty(bits):
    model = made(Reader)
    attach(model, {"w:words": bits})
    assert model.words.weight[0].abs().max() < 1e-11
    F.cross_entropy(model(WORDS), torch.arange(8) % 3).backward()
    assert not model.words.parametrizations.weight.original.grad[0].any()


def test_activations_behind_an_embedding_are_traced():
    model = made(Reader)
    data = [(WORDS, torch.arange(8) % 3)]
    found = hawq.traces(model, data, of="activations", num_examples=8, batch_size=4, rtol=0.05)
    assert found.names == ("wide#0", "head#0")
    # What the head reads is all that its logits depend on: Tr AᵀHA of one matrix A.
    p = model(WORDS).softmax(1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    weight = model.head.weight.detach()
    expected = torch.einsum("nij,ik,jk->n", hessian, weight, weight).mean()
    assert found["head#0"][0] == pytest.approx(float(expected), rel=1e-4)


def test_an_embedding_of_places_that_all_examples_share_is_traced_by_random_signs():
    class Shared(Reader):
        def forward(self, x):
            return self.head(self.wide(self.words(x) + self.places.weight).relu().mean(1))

    for kind in (Shared, Reader):
        model = made(kind)
        found = hawq.traces(
            model, [(WORDS, torch.arange(8) % 3)], num_examples=8, batch_size=4, rtol=0.02
        )
        assert ("places" in found.reason) == (kind is Shared)
        expected = float(mean_loss_gauss_newton(model, ["places"], WORDS).trace())
        trace, error = found["places"]
        assert abs(trace - expected) < 5 * error + 1e-4 * expected


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}]
)
def test_an_embedding_whose_gradients_are_not_its_own_stays_in_floating_point(options):
    model = nn.Sequential(nn.Embedding(5, 3, **options), nn.Linear(3, 2))
    assert list(quantizable_layers(model)) == ["1"]
    assert unquantizable_weights(model) == {"0.weight": 15}


def test_an_embedding_that_is_tied_to_a_layer_goes_under_the_layers_name():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[0].weight = model[1].weight
    assert list(quantizable_layers(model)) == ["1"]
    twins = nn.ModuleList([nn.Embedding(5, 3), nn.Embedding(5, 3)])
    twins[1].weight = twins[0].weight
    assert list(quantizable_layers(twins)) == ["0"]
