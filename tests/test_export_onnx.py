"""ONNX graphs and torch programs compute what the packed network does."""

import inspect
import io
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from hawq.export import load, pack
from hawq.export.onnx_graph import INPUT, onnx_graph
from hawq.export.program import torch_program
from hawq.finetune import attach, calibrate, fold_batch_norm
from hawq.quantizers import Scheme, Schemes
from search.exported import onnx_session

IMAGES = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Heads(nn.Module):
    """A detector's shape: several tensors, nested, one layer on two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.head = nn.Conv2d(4, 5, 1)
        self.classes = nn.Linear(4, 3)

    def forward(self, x):
        near = self.stem(x).relu()
        far = self.deep(near).tanh()
        return ([self.head(near), self.head(far)], self.classes(far.mean((2, 3))))


def heads() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Heads().eval()


def quantized(bits, schemes=None, *, by_channel=False):
    model = heads()
    counts = {"stem": 4, "deep": 4, "head": 5, "classes": 3}
    given = {"a:stem#0": 8, "a:deep#0": bits, "a:head#0": bits, "a:classes#0": 2}
    if by_channel:
        rng = np.random.default_rng(bits)
        given = {f"a:deep#0[{c}]": int(rng.integers(0, 9)) for c in range(4)}
        given |= {
            f"w:{name}[{c}]": int(rng.integers(0, bits + 1))
            for name, n in counts.items()
            for c in range(n)
        }
    else:
        given |= {f"w:{name}": bits for name in counts}
    attach(model, given, IMAGES, schemes)
    calibrate(model, [IMAGES])
    return model


def computed(graph, inputs):
    session = onnx_session(graph.model.SerializeToString(), 1)
    return session.run(None, {INPUT: inputs.numpy()})


SCHEMES = [
    None,
    Schemes(Scheme(symmetric=False), Scheme(symmetric=False, per="channel")),
    Schemes(Scheme(learning="dorefa"), Scheme(learning="pact", per="tensor")),
    Schemes(Scheme(per="tensor"), Scheme(learning="dorefa", per="channel")),
]


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("schemes", SCHEMES, ids=["lsq", "asymmetric", "dorefa", "mixed"])
def test_onnx_runtime_computes_what_was_tested(schemes, bits, by_channel):
    model = quantized(bits, schemes, by_channel=by_channel)
    graph = onnx_graph(pack(model), heads(), IMAGES[:2])
    for inputs in (IMAGES[:1], IMAGES):  # any number of them
        (near, far), classes = model(inputs)
        for found, expected in zip(computed(graph, inputs), (near, far, classes), strict=True):
            close = (torch.from_numpy(found) - expected).abs() < 1e-5
            # Sums in another order let a value fall to the other side of two codes' middle.
            assert close.float().mean() > 0.97


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_channels_of_a_sequence_have_scales_of_their_own(bits, symmetric):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()

    model, sequences = network(), torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(2))
    given = {f"a:0#0[{c}]": 3 + c for c in range(6)} | {f"a:2#0[{c}]": 1 + c for c in range(8)}
    schemes = Schemes(activations=Scheme(symmetric=symmetric))
    attach(model, given | {"w:0": bits, "w:2": bits}, sequences, schemes)
    calibrate(model, [sequences])
    graph = onnx_graph(pack(model), network(), sequences)
    (found,) = computed(graph, sequences)
    np.testing.assert_allclose(found, model(sequences).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"),
    [
        (2, True, "INT4"),
        (4, True, "INT4"),
        (5, True, "INT8"),
        (3, False, "UINT4"),
        (8, False, "UINT8"),
    ],
)
def test_weights_are_held_in_the_nearest_type(bits, symmetric, kind):
    schemes = Schemes(Scheme(symmetric=symmetric))
    graph = onnx_graph(pack(quantized(bits, schemes)), heads(), IMAGES[:2])
    held = {c.name: c.data_type for c in graph.model.graph.initializer}
    assert held["network.stem.weight.integers"] == TensorProto.DataType.Value(kind)
    assert "network.stem.weight" not in held
    assert any(f"held in {kind.lower()}" in note for note in graph.notes)


def test_products_of_few_bits_come_with_what_the_runtime_must_be_told():
    def told(bits):
        notes = onnx_graph(pack(quantized(bits)), heads(), IMAGES[:2]).notes
        return any("session.qdq_matmulnbits_accuracy_level = 1" in note for note in notes)

    assert told(4)
    assert not told(5)


def normalized(*, is_folded) -> nn.Module:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        layers += [nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Conv2d(8, 4, 1))
        model.train()(IMAGES)  # which gives batch-norm something to fold
    return fold_batch_norm(model.eval(), IMAGES) if is_folded else model.eval()


@pytest.mark.parametrize(
    ("is_folded", "bits", "num_integer"), [(True, 8, 2), (True, 4, 0), (False, 8, 0)]
)
def test_without_batch_norm_layers_of_8_bits_compute_with_integers(
    tmp_path, is_folded, bits, num_integer
):
    model = normalized(is_folded=is_folded)
    attach(
        model, {f"w:{i}": bits for i in (0, 3, 6)} | {f"a:{i}#0": bits for i in (0, 3, 6)}, IMAGES
    )
    calibrate(model, [IMAGES])
    graph = onnx_graph(pack(model), normalized(is_folded=is_folded), IMAGES[:2])
    session = onnx_session(graph.model.SerializeToString(), 1, tmp_path / "optimized.onnx")
    (found,) = session.run(None, {INPUT: IMAGES.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(IMAGES), rtol=0, atol=1e-5)
    operators = [node.op_type for node in onnx.load(str(tmp_path / "optimized.onnx")).graph.node]
    assert operators.count("QLinearConv") == num_integer


def test_what_onnx_lacks_is_named_with_what_is_used_instead():
    notes = " ".join(onnx_graph(pack(quantized(3)), heads(), IMAGES[:2]).notes)
    assert "no odd codes: classes#0 are shifted by half a step" in notes
    eight = quantized(8, Schemes(Scheme(learning="dorefa")))
    assert any("int16" in note for note in onnx_graph(pack(eight), heads(), IMAGES[:2]).notes)


class Deciding(nn.Module):
    """Goes by its sizes, which is well, and by its values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        if x.shape[2] > 2:
            x = 2 * x
        if x.sum() > 0:
            x = -x
        return self.layer(x)


def test_code_that_goes_by_values_is_named_for_a_graph_holds_one_decision():
    (note,) = onnx_graph(pack(Deciding()), Deciding(), IMAGES[:2]).notes
    line = inspect.getsourcelines(Deciding)[1] + 10
    assert f"the values of tensors at {Path(__file__).name}:{line}: the graph" in note
    assert not onnx_graph(pack(nn.Conv2d(3, 2, 1)), nn.Conv2d(3, 2, 1), IMAGES[:2]).notes


def test_scales_are_one_for_each_output_channel():
    graph = onnx_graph(pack(quantized(4)), heads(), IMAGES[:2]).model.graph
    scales = {c.name: numpy_helper.to_array(c).shape for c in graph.initializer}
    assert scales["network.head.weight.scale"] == (5,)


def test_a_graph_of_a_certain_batch_says_so():
    graph = onnx_graph(pack(quantized(4)), heads(), IMAGES[:3], is_dynamic=False)
    shape = graph.model.graph.input[0].type.tensor_type.shape
    assert [d.dim_value for d in shape.dim] == [3, 3, 6, 6]
    assert len(computed(graph, IMAGES[:3])) == 3


def test_a_network_that_is_not_quantized_is_a_plain_graph():
    graph = onnx_graph(pack(heads()), heads(), IMAGES[:2])
    operators = {node.op_type for node in graph.model.graph.node}
    assert not operators & {"QuantizeLinear", "DequantizeLinear"}
    assert graph.notes == ()


@pytest.mark.parametrize("is_dynamic", [True, False])
def test_a_torch_program_computes_the_same_bits(is_dynamic):
    model = quantized(3)
    program = torch_program(pack(model), heads(), IMAGES[:4], is_dynamic=is_dynamic)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    inputs = IMAGES if is_dynamic else IMAGES[:4]
    found = torch.export.load(buffer).module()(inputs)
    for mine, expected in zip(found[0], model(inputs)[0], strict=True):
        assert torch.equal(mine, expected)


def test_a_graph_is_of_the_network_that_was_packed():
    with pytest.raises(ValueError, match="must be the one that was packed"):
        onnx_graph(pack(quantized(4)), nn.Sequential(nn.Linear(2, 2)), IMAGES[:2])


def test_the_graph_passes_onnx_checker_in_full():
    graph = onnx_graph(pack(quantized(2)), heads(), IMAGES[:2])
    onnx.checker.check_model(graph.model, full_check=True)
    loaded = load(pack(quantized(2)), heads())
    assert len(computed(graph, IMAGES)) == 3
    assert torch.equal(loaded(IMAGES)[1], quantized(2)(IMAGES)[1])


def test_channels_of_what_a_linear_layer_reads_are_the_last():
    def linear() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(4, 3)).eval()

    tokens = torch.randn(5, 7, 4, generator=torch.Generator().manual_seed(2))
    model = linear()
    attach(model, {"w:0": 4, **{f"a:0#0[{c}]": c + 2 for c in range(4)}}, tokens)
    calibrate(model, [tokens])
    assert torch.equal(load(pack(model), linear())(tokens), model(tokens))
    (found,) = computed(onnx_graph(pack(model), linear(), tokens[:2]), tokens)
    torch.testing.assert_close(torch.from_numpy(found), model(tokens), rtol=0, atol=1e-5)
