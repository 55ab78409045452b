"""Attention in linear layers: torch's own function, in which every weight is found."""

import copy

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hawq.attention import ProjectedAttention, joint_attention, project_attention, project_state
from hawq.export import encode, load, pack, read
from hawq.export.onnx_graph import INPUT, onnx_graph
from hawq.finetune import attach, calibrate
from hawq.reads import network_space, read_network
from hawq.space import unquantizable_weights
from search.errors import InputError
from search.exported import onnx_session
from search.tasks.checkpoint import load_weights, save_state


def randomized(module):
    with torch.no_grad():
        for parameter in module.parameters():  # biases start at zero
            parameter.normal_(std=0.5)
    return module


class Around(nn.Module):
    """Attention somewhere inside a network."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@settings(max_examples=80)
@given(
    st.booleans(),
    st.booleans(),
    st.sampled_from([(None, None), (3, 5), (None, 7)]),
    st.sampled_from([None, "forbidden", "added", "each head"]),
    st.sampled_from([None, "forbidden", "added"]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_the_function_is_that_of_torch(
    batch_first, bias, dims, masked, padded, batched, weighs, averages, seed
):
    torch.manual_seed(seed)
    kdim, vdim = dims
    n, length, source, heads = 3, 4, 5, 2
    plain = randomized(
        nn.MultiheadAttention(
            6, heads, bias=bias, kdim=kdim, vdim=vdim, batch_first=batch_first, dtype=torch.float64
        )
    )

    def sequences(length, width):
        x = torch.randn(n, length, width, dtype=torch.float64)
        return (x if batch_first else x.transpose(0, 1)) if batched else x[0]

    query, key, value = (
        sequences(length, 6),
        sequences(source, kdim or 6),
        sequences(source, vdim or 6),
    )
    copies = n * heads if batched else heads
    shape = (copies, length, source) if masked == "each head" else (length, source)
    mask = None if masked is None else torch.randn(shape, dtype=torch.float64)
    padding = None
    if padded is not None:
        padding = torch.randn((n, source) if batched else (source,), dtype=torch.float64)
    if masked == "forbidden":
        mask = mask > 0.8
        mask[:, 0] = False  # something is left for all, or all is NaN
    if padded == "forbidden":
        padding = padding > 0.8
        padding[..., 0] = False
    options = {
        "attn_mask": mask,
        "key_padding_mask": padding,
        "need_weights": weighs,
        "average_attn_weights": averages,
    }
    expected, expected_weights = plain(query, key, value, **options)
    projected = project_attention(Around(copy.deepcopy(plain)))
    assert isinstance(projected.attention, ProjectedAttention)
    output, weights = projected(query, key, value, **options)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    if weighs:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-10, atol=1e-12)
    else:
        assert weights is None


def test_dropout_leaves_out_attention_weights_in_training_alone():
    projected = project_attention(Around(nn.MultiheadAttention(4, 2, 0.5, batch_first=True)))
    x = torch.randn(2, 3, 4)
    _, weights = projected(x, x, x, average_attn_weights=False)
    assert (weights == 0).any()
    kept = weights[weights > 0]
    projected.eval()
    _, calm = projected(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(kept, 2 * calm[weights > 0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_the_transformers_of_torch_compute_the_same_with_it(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    plain = randomized(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)).eval()
    x = torch.randn(3, 5, 8)
    padding = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    projected = project_attention(copy.deepcopy(plain))
    assert not unquantizable_weights(projected)
    torch.testing.assert_close(projected(x), plain(x), rtol=1e-4, atol=1e-5)
    # The fused layer leaves zeros where there is padding.
    torch.testing.assert_close(
        projected(x, src_key_padding_mask=padding)[~padding],
        plain(x, src_key_padding_mask=padding)[~padding],
        rtol=1e-4,
        atol=1e-5,
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(projected(x)[~padding], projected(x, None, padding)[~padding])


def vit():
    torch.manual_seed(0)
    return randomized_head(
        torchvision.models.VisionTransformer(
            image_size=8,
            patch_size=4,
            num_layers=2,
            num_heads=2,
            hidden_dim=8,
            mlp_dim=16,
            num_classes=3,
        ).eval()
    )


def randomized_head(model):
    nn.init.normal_(model.heads.head.weight)
    return model


def test_every_weight_of_a_vision_transformer_is_searched_traced_and_quantized():
    plain, images = vit(), torch.randn(6, 3, 8, 8)
    model = project_attention(vit())
    torch.testing.assert_close(model(images), plain(images), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    assert set(unquantizable_weights(model)) == {"class_token", "encoder.pos_embedding"}
    reads = read_network(model, images[:1])
    names = [layer.name for layer in reads.layers]
    own = "encoder.layers.encoder_layer_0.self_attention"
    assert [name for name in names if name.startswith(own)] == [
        f"{own}.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")
    ]
    # Five tokens of eight numbers, multiplied by an 8 × 8 matrix.
    assert {layer.macs for layer in reads.layers if own in layer.name} == {5 * 64}
    read = {read.layer: read.activation for read in reads.reads}
    assert read[f"{own}.q_proj"] == read[f"{own}.k_proj"] == read[f"{own}.v_proj"]


def test_a_shared_module_stays_shared_and_a_frozen_one_frozen():
    shared, trained = nn.MultiheadAttention(4, 2).requires_grad_(False), nn.MultiheadAttention(4, 2)
    model = nn.ModuleDict({"first": shared, "second": shared, "third": Around(shared)})
    model["trained"] = trained
    with torch.no_grad():
        project_attention(model)
    assert model["first"] is model["second"] is model["third"].attention
    assert not any(p.requires_grad for p in model["first"].parameters())
    assert all(p.requires_grad for p in model["trained"].parameters())


def test_ties_are_kept():
    model = nn.ModuleDict({name: nn.MultiheadAttention(4, 2) for name in "abc"})
    model["a"].in_proj_weight = model["b"].in_proj_weight
    model["tied"] = nn.Linear(4, 4)
    model["tied"].weight = model["c"].out_proj.weight
    project_attention(model)
    assert model["a"].in_proj_weight is model["b"].in_proj_weight
    assert isinstance(model["c"], ProjectedAttention)
    assert model["c"].out_proj.weight is model["tied"].weight


def test_a_causal_hint_without_its_mask_is_refused_as_torch_does():
    plain, x = Around(nn.MultiheadAttention(4, 2)), torch.randn(3, 2, 4)
    projected = project_attention(copy.deepcopy(plain))
    causal = nn.Transformer.generate_square_subsequent_mask(3)
    options = {"is_causal": True, "need_weights": False}
    for network in (plain, projected):
        with pytest.raises((ValueError, RuntimeError), match="attn_mask"):
            network(x, x, x, **options)
    expected, _ = plain(x, x, x, attn_mask=causal, **options)
    torch.testing.assert_close(projected(x, x, x, attn_mask=causal, **options)[0], expected)


class Own(nn.MultiheadAttention):
    """Somebody's class, which may read the joint weight."""


def hooked():
    attention = nn.MultiheadAttention(4, 2)
    attention.register_forward_hook(lambda *_: None)
    return attention


@pytest.mark.parametrize(
    "attention",
    [
        Own(4, 2),
        hooked(),
        nn.MultiheadAttention(4, 2, add_bias_kv=True),
        nn.MultiheadAttention(4, 2, add_zero_attn=True),
        nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(4, 2), "in_proj_weight"),
    ],
)
def test_what_is_more_than_torch_s_attention_is_left_alone(attention):
    model = Around(attention)
    assert not joint_attention(model)
    assert project_attention(model).attention is attention


@pytest.mark.parametrize("kdim", [None, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_the_joint_network_loads(tmp_path, kdim, bias):
    plain = Around(randomized(nn.MultiheadAttention(6, 2, bias=bias, kdim=kdim, vdim=kdim)))
    save_state(tmp_path / "joint.safetensors", plain.state_dict())
    model = project_attention(Around(nn.MultiheadAttention(6, 2, bias=bias, kdim=kdim, vdim=kdim)))
    load_weights(model, tmp_path / "joint.safetensors")
    expected = project_attention(plain).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert project_state(model, expected).keys() == expected.keys()
    save_state(tmp_path / "again.safetensors", expected)
    load_weights(model, tmp_path / "again.safetensors")
    save_state(tmp_path / "other.safetensors", Around(nn.MultiheadAttention(4, 2)).state_dict())
    with pytest.raises(InputError, match=r"attention\.k_proj\.weight is \(4, 4\)"):
        load_weights(model, tmp_path / "other.safetensors")


def test_it_is_packed_into_what_the_joint_network_loads_and_runs_as_a_graph():
    images = torch.randn(6, 3, 8, 8)
    model = project_attention(vit())
    names = network_space(read_network(model, images[:1]), [4], [8]).names
    attach(model, {name: 4 if name[0] == "w" else 8 for name in names}, images[:1])
    calibrate(model, [images])
    expected = model.eval()(images).detach()
    packed = read(encode(pack(model)))
    assert torch.equal(load(packed, vit())(images), expected)
    made = onnx_graph(packed, project_attention(vit()), images, is_dynamic=True)
    session = onnx_session(made.model.SerializeToString(), 1)
    (found,) = session.run(None, {INPUT: images.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-2)
