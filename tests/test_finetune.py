"""Fake quantizers that come and go, their gradients, and training that can be repeated."""

import copy
import math
from dataclasses import dataclass, field, replace

import pytest
import torch
from oracles import LAYERS, ResidualNet, TinyTask
from torch import Tensor, nn

from hawq.finetune import (
    DivergedError,
    Recipe,
    attach,
    calibrate,
    detach,
    evaluate,
    fixed_activations,
    make_optimizer,
    sample_activations,
    train_epoch,
)
from hawq.finetune.fake_quantizers import ActivationQuantizer, WeightQuantizer
from hawq.quantizers import quantize
from hawq.ranges import best_scales
from hawq.reads import read_network

BITS = {"conv1": 8, "conv2": 2, "linear": 4}
TASK = TinyTask(num_examples=64)
RECIPE = Recipe(epochs=4, batch_size=16, lr=0.05)


def network() -> nn.Module:
    return TASK.model().eval()


def images(num=8) -> Tensor:
    return TASK.batch("train", torch.arange(num))[0]


def weights(bits):
    return {f"w:{name}": b for name, b in bits.items()}


def quantize_all(model, bits, activation_bits, example, input_bits=8):
    """Attach to weights and, with one width, to what those layers read."""
    reads = read_network(model, example)
    fixed = fixed_activations(reads, activation_bits, input_bits, bits)
    attach(model, weights(bits) | fixed, example)


def hooks(model):
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


# --- attach and detach --------------------------------------------------------------------------


def test_attached_weights_are_the_quantizer_s():
    model, plain = network(), network()
    attach(model, weights(BITS))
    for name, bits in BITS.items():
        weight = plain.get_submodule(name).weight.detach()
        rows = weight.flatten(1)
        expected = quantize(rows, best_scales(rows, bits), bits).view_as(weight)
        torch.testing.assert_close(model.get_submodule(name).weight, expected)


@pytest.mark.parametrize("activation_bits", [None, 4])
def test_detaching_restores_the_exact_original(activation_bits):
    model = network()
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    before, hooked = model(images()), hooks(model)
    types = [type(module) for module in model.modules()]
    slots = [list(module._parameters) for module in model.modules()]
    quantize_all(model, BITS, activation_bits, images())
    calibrate(model, [images()])
    assert not torch.equal(model(images()), before)
    detach(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert [type(module) for module in model.modules()] == types
    assert [list(module._parameters) for module in model.modules()] == slots
    assert hooks(model) == hooked
    assert torch.equal(model(images()), before)


def test_detaching_a_plain_network_changes_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    detach(model)
    assert list(model.state_dict()) == list(before)


def test_a_copy_can_be_detached_without_the_original():
    model = network()
    plain = model(images())
    quantize_all(model, BITS, 4, images())
    calibrate(model, [images()])
    quantized = model(images())
    twin = copy.deepcopy(model)
    detach(twin)
    assert torch.equal(twin(images()), plain)
    assert torch.equal(model(images()), quantized)


def test_a_second_attachment_needs_a_detachment():
    model = network()
    attach(model, weights(BITS))
    with pytest.raises(ValueError, match="must be detached before it is quantized again"):
        attach(model, weights(BITS))
    detach(model)
    attach(model, weights(BITS))


def test_layers_that_share_a_weight_share_its_quantizer():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    shared = model[0].weight
    quantize_all(model, {"0": 2}, 4, torch.zeros(1, 3))
    assert torch.equal(model[0].weight, model[1].weight)
    assert not torch.equal(model[0].weight, shared)
    assert len([m for m in model.modules() if isinstance(m, WeightQuantizer)]) == 1
    detach(model)
    assert model[0].weight is model[1].weight is shared


def test_an_embedding_that_is_tied_to_a_layer_is_quantized_with_it():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[0].weight = model[1].weight
    shared = model[1].weight
    quantize_all(model, {"1": 2}, 4, torch.arange(5)[None])
    assert torch.equal(model[0].weight, model[1].weight)
    assert not torch.equal(model[0].weight, shared)
    detach(model)
    assert model[0].weight is model[1].weight is shared
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "1.bias"]


def test_layers_that_are_not_named_are_left_alone():
    model = network()
    weight = model.conv1.weight
    attach(model, {"w:linear": 4})
    assert model.conv1.weight is weight


def test_a_name_that_is_no_layer_is_refused():
    with pytest.raises(ValueError, match=r"must name quantizable layers as w:LAYER, got \['bn1'\]"):
        attach(network(), {"w:bn1": 4})


def test_activations_need_an_example():
    with pytest.raises(ValueError, match="example must be given"):
        attach(network(), {"a:conv1#0": 4})


def test_the_network_s_own_input_keeps_eight_bits():
    model = network()
    quantize_all(model, BITS, 3, images())
    assert [model.get_submodule(name).input_quantizer.bits for name in LAYERS] == [8, 3, 3]


# --- calibration --------------------------------------------------------------------------------


def test_activations_pass_through_until_they_are_calibrated():
    quantizer = ActivationQuantizer(2)
    x = torch.linspace(0, 1, 9)
    assert torch.equal(quantizer(x), x)
    quantizer.calibrate(x)
    assert len(quantizer(x).unique()) == 4


@pytest.mark.parametrize(("lowest", "expected"), [(0.0, False), (-0.1, True)])
def test_a_tensor_that_is_never_negative_spends_no_code_on_signs(lowest, expected):
    quantizer = ActivationQuantizer(4)
    x = torch.linspace(lowest, 3, 100)
    quantizer.calibrate(x)
    assert bool(quantizer.signed) is expected
    scale = best_scales(x[None], 4, signed=expected)[0, 0]
    torch.testing.assert_close(quantizer(x), quantize(x, scale, 4, signed=expected))


def test_calibration_looks_at_unquantized_inputs_and_leaves_modes_alone():
    model = network().train()
    quantize_all(model, dict.fromkeys(LAYERS, 8), 8, images())
    calibrate(model, [images()])
    first = model.linear.input_quantizer.scale.clone()
    calibrate(model, [images()])  # a second time, when quantizers are on
    assert torch.equal(model.linear.input_quantizer.scale, first)
    assert all(module.training for module in model.modules())
    assert hooks(model) == [(int(name in LAYERS), 0) for name, _ in model.named_modules()]


def test_calibration_does_not_see_some_columns_only():
    # A sample at a fixed stride would meet the first column of these images and nothing else.
    x = torch.ones(64, 4, 64, 64)
    x[:, :, :, 0] = 0
    model = nn.Sequential(nn.Conv2d(4, 1, 1))
    quantize_all(model, {"0": 8}, 4, x, input_bits=4)
    calibrate(model, [x])
    assert model[0].input_quantizer(torch.ones(())).detach().item() == pytest.approx(1, rel=1e-5)


def test_a_layer_that_never_runs_reads_nothing_to_quantize():
    model = TinyTask("lazy").model()
    quantize_all(model, {"used": 4, "unused": 4}, 4, images())
    calibrate(model, [images()])
    assert model.used.input_quantizer.calibrated
    assert not hasattr(model.unused, "input_quantizer")


def test_calibration_survives_the_state_dict():
    model, twin = network(), network()
    for each in (model, twin):
        quantize_all(each, BITS, 4, images())
    calibrate(model, [images()])
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(images()), model(images()))


# --- learned steps ------------------------------------------------------------------------------


def lsq_gradients(x, scale, upstream, bits, signed=True):
    """The formulas of LSQ (Esser et al., 2020), element by element; x is one row."""
    odd = signed and bits <= 2
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if odd:
        low, high = -(2**bits - 1), 2**bits - 1
    to_x, to_scale = [], 0.0
    for value, g in zip(x.tolist(), upstream.tolist(), strict=True):
        ratio = value / scale
        inside = low <= ratio <= high
        to_x.append(g if inside else 0.0)
        code = min(2 * math.floor(ratio / 2) + 1, high) if odd else round(ratio)
        to_scale += g * (code - ratio if inside else (low if ratio < low else high))
    return to_x, to_scale / math.sqrt(len(x) * high)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_gradients_of_weights_are_lsq_s(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 40, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    quantizer = WeightQuantizer(weight, bits)
    (quantizer(weight) * upstream).sum().backward()
    for row in range(3):
        scale = quantizer.scale[row].detach().item()
        to_x, to_scale = lsq_gradients(weight[row], scale, upstream[row], bits)
        torch.testing.assert_close(weight.grad[row].tolist(), to_x)
        assert float(quantizer.scale.grad[row]) == pytest.approx(to_scale, rel=1e-9)


def test_gradients_of_unsigned_activations_are_lsq_s():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, generator=generator, dtype=torch.float64).mul(2).requires_grad_()
    upstream = torch.randn(50, generator=generator, dtype=torch.float64)
    quantizer = ActivationQuantizer(3).double()
    quantizer.calibrate(x)
    (quantizer(x) * upstream).sum().backward()
    to_x, to_scale = lsq_gradients(x, quantizer.scale.detach().item(), upstream, 3, signed=False)
    torch.testing.assert_close(x.grad.tolist(), to_x)
    assert float(quantizer.scale.grad) == pytest.approx(to_scale, rel=1e-9)


@pytest.mark.parametrize(("bits", "codes"), [(1, (-1, 1)), (2, (-3, 3)), (4, (-8, 7))])
def test_where_codes_do_not_change_the_scale_s_gradient_is_that_of_finite_differences(bits, codes):
    # Saturated values: the output is scale × end code, smooth in the scale.
    x = torch.tensor([[-90.0, -70, 80, 95]], dtype=torch.float64)
    quantizer = WeightQuantizer(torch.ones(1, 4, dtype=torch.float64), bits)
    upstream = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64)

    def value(scale):
        quantizer.scale.data.fill_(scale)
        return (quantizer(x) * upstream).sum()

    value(0.5).backward()
    difference = (value(0.5 + 1e-6) - value(0.5 - 1e-6)).detach().item() / 2e-6
    damping = math.sqrt(4 * codes[1])
    assert float(quantizer.scale.grad) * damping == pytest.approx(difference, rel=1e-6)
    assert difference == pytest.approx(3 * codes[0] + 7 * codes[1])


def test_one_bit_weights_pass_gradients_inside_the_range_only():
    weight = torch.tensor([[0.2, -0.4, 3.0, -2.0]], requires_grad=True)
    quantizer = WeightQuantizer(weight, 1)
    quantizer.scale.data.fill_(1.0)
    assert quantizer(weight).tolist() == [[1, -1, 1, -1]]
    quantizer(weight).sum().backward()
    assert weight.grad.tolist() == [[1, 1, 0, 0]]


def test_a_scale_that_training_drives_below_zero_stays_usable():
    quantizer = WeightQuantizer(torch.ones(1, 4), 4)
    quantizer.scale.data.fill_(-1.0)
    result = quantizer(torch.ones(1, 4))
    result.sum().backward()
    assert torch.isfinite(result).all()
    assert torch.isfinite(quantizer.scale.grad).all()


# --- the optimizer ------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A network with a parameter of its own that happens to be called ``scale``."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.scale.mean()


def test_weights_decay_and_vectors_and_scales_do_not():
    model = Scaled()
    quantize_all(model, {"layer": 4}, 4, torch.zeros(1, 3))
    optimizer = make_optimizer(model, replace(RECIPE, weight_decay=0.01, scale_lr=0.1))
    weights, vectors, scales = optimizer.param_groups
    quantizers = [model.layer.parametrizations.weight[0], model.layer.input_quantizer]
    original = model.layer.parametrizations.weight.original
    assert {id(p) for p in weights["params"]} == {id(original), id(model.scale)}
    assert [p is model.layer.bias for p in vectors["params"]] == [True]
    assert {id(p) for p in scales["params"]} == {id(q.scale) for q in quantizers}
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0, 0]
    assert [g["factor"] for g in optimizer.param_groups] == [1, 1, 0.1]


def test_frozen_parameters_are_not_optimized():
    model = network()
    model.conv1.weight.requires_grad_(False)
    optimizer = make_optimizer(model, RECIPE)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


def test_training_without_momentum_is_possible():
    assert not make_optimizer(network(), replace(RECIPE, momentum=0.0)).defaults["nesterov"]


def test_the_rate_rises_to_its_peak_and_falls_to_zero():
    recipe = replace(RECIPE, lr=2.0, warmup=0.2)
    assert [recipe.rate(p) for p in (0.0, 0.1, 0.2)] == pytest.approx([0, 1, 2])
    assert recipe.rate(0.6) == pytest.approx(1)
    assert recipe.rate(1.0) == pytest.approx(0)
    assert replace(recipe, warmup=0.0).rate(0.0) == 2


def test_an_epoch_takes_whole_batches():
    assert RECIPE.steps_per_epoch(64) == 4
    assert RECIPE.steps_per_epoch(63) == 3
    assert replace(RECIPE, examples_per_epoch=32).steps_per_epoch(64) == 2


# --- training -----------------------------------------------------------------------------------


def trained(task, model, recipe=RECIPE, epochs=None, optimizer=None, first=0, **options):
    optimizer = optimizer or make_optimizer(model, recipe)
    losses = [
        train_epoch(model, optimizer, task, recipe, epoch=epoch, seed=5, **options)
        for epoch in range(first, recipe.epochs if epochs is None else epochs)
    ]
    return losses, optimizer


def assert_same_state(a, b):
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_training_learns_and_its_scores_are_those_of_the_network():
    model = network()
    before = evaluate(model, TASK, "search").mean()
    losses, _ = trained(TASK, model, replace(RECIPE, epochs=10))
    after = evaluate(model, TASK, "search", batch_size=7)
    assert losses[-1] < 0.5 * losses[0]
    assert after.shape == (64,)
    assert after.mean() > max(0.8, float(before))


def test_quantized_networks_are_fine_tuned_in_weights_and_scales():
    model = network()
    trained(TASK, model, replace(RECIPE, epochs=6))
    full = evaluate(model, TASK, "search").mean()
    quantize_all(model, dict.fromkeys(LAYERS, 2), 4, images())
    calibrate(model, [images(64)])
    scales = model.conv2.parametrizations.weight[0].scale.detach().clone()
    broken = evaluate(model, TASK, "search").mean()
    trained(TASK, model, replace(RECIPE, epochs=10, lr=0.02))
    assert evaluate(model, TASK, "search").mean() >= max(float(broken), float(full) - 0.1)
    assert not torch.equal(model.conv2.parametrizations.weight[0].scale, scales)
    assert len(model.conv2.weight[0].unique()) <= 4


@pytest.mark.parametrize("name", ["relu", "dropout"])
def test_an_interrupted_training_resumes_with_the_same_bits(name):
    task = TinyTask(name, num_examples=64)
    whole = task.model()
    torch.manual_seed(1)
    expected, _ = trained(task, whole)
    torch.manual_seed(2)  # another process, whose global generator stands elsewhere
    half = task.model()
    _, optimizer = trained(task, half, epochs=2)
    again = task.model()
    again.load_state_dict(copy.deepcopy(half.state_dict()))
    restored = make_optimizer(again, RECIPE)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    losses, _ = trained(task, again, optimizer=restored, first=2)
    assert losses == expected[2:]
    assert_same_state(again, whole)


def test_training_leaves_the_global_generator_alone():
    task = TinyTask("dropout", num_examples=64)
    state = torch.get_rng_state()
    trained(task, task.model(), epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_seed_is_another_training():
    losses = []
    for seed in (0, 1):
        model = network()
        optimizer = make_optimizer(model, RECIPE)
        losses.append(train_epoch(model, optimizer, TASK, RECIPE, epoch=0, seed=seed))
    assert losses[0] != losses[1]


@dataclass(frozen=True)
class Recorded(TinyTask):
    seen: list[list[int]] = field(default_factory=list)

    def batch(self, split, indices):
        self.seen.append(indices.tolist())
        return super().batch(split, indices)


def test_every_epoch_visits_all_examples_in_another_order():
    task = Recorded(num_examples=64)
    trained(task, network(), epochs=2)
    order = [index for batch in task.seen for index in batch]
    first, second = order[:64], order[64:]
    assert sorted(first) == sorted(second) == list(range(64))
    assert first != second


def test_batch_norm_s_statistics_stay_fixed_after_their_share_of_the_epochs():
    model = network()
    recipe = replace(RECIPE, epochs=4, freeze_batch_norm=0.5)
    _, optimizer = trained(TASK, model, recipe, epochs=2)
    statistics, weight = model.bn1.running_mean.clone(), model.bn1.weight.detach().clone()
    trained(TASK, model, recipe, optimizer=optimizer, first=2)
    assert torch.equal(model.bn1.running_mean, statistics)
    assert not torch.equal(model.bn1.weight, weight)


def test_steps_are_reported_as_they_are_done():
    seen = []
    trained(TASK, network(), epochs=1, on_step=lambda *step: seen.append(step))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bfloat16_trains_float32_weights():
    model = network()
    losses, _ = trained(TASK, model, replace(RECIPE, precision="bf16"))
    assert losses[-1] < losses[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@dataclass(frozen=True)
class Exploding(TinyTask):
    def losses(self, model, batch):
        return super().losses(model, batch) * float("inf")


def test_a_loss_that_explodes_is_refused_with_advice():
    with pytest.raises(DivergedError, match=r"got inf in epoch 1, step 1: lower lr \(now 0.05\)"):
        trained(Exploding(num_examples=64), network(), epochs=1)


def test_evaluating_leaves_the_network_in_its_mode():
    model = ResidualNet().train()
    statistics = model.bn1.running_mean.clone()
    evaluate(model, TASK, "search")
    assert model.training
    assert torch.equal(model.bn1.running_mean, statistics)


# --- bits of channels, and tensors with several readers -----------------------------------------


@pytest.mark.parametrize("bits", [(3, 3, 3), (1, 4, 8), (0, 2, 1)])
def test_a_channel_s_bits_quantize_it_as_if_it_were_alone(bits):
    torch.manual_seed(0)
    weight = torch.randn(3, 2, 3, 3, requires_grad=True)
    upstream = torch.randn(3, 2, 3, 3)
    together = WeightQuantizer(weight, bits)
    together(weight).backward(upstream)
    for c, b in enumerate(bits):
        row = weight.detach()[c : c + 1].requires_grad_()
        if b == 0:
            assert not together(weight)[c].any()
            assert not weight.grad[c].any()
            assert together.scale.grad[c].item() == 0
            continue
        alone = WeightQuantizer(row, b)
        alone(row).backward(upstream[c : c + 1])
        assert torch.equal(together(weight)[c : c + 1], alone(row))
        assert torch.equal(weight.grad[c : c + 1], row.grad)
        torch.testing.assert_close(together.scale.grad[c : c + 1], alone.scale.grad)


@pytest.mark.parametrize(("shape", "axis"), [((5, 3, 4, 4), 1), ((5, 3), -1), ((5, 7, 3), -1)])
def test_activation_channels_have_ranges_and_bits_of_their_own(shape, axis):
    torch.manual_seed(0)
    x = torch.rand(shape) * torch.tensor([1.0, 10, 100]).view([3, 1, 1] if axis == 1 else [3])
    quantizer = ActivationQuantizer((2, 4, 8), "a", axis)
    assert torch.equal(quantizer(x), x)
    quantizer.calibrate(quantizer.rows(x))
    found = quantizer(x)
    for c, b in enumerate((2, 4, 8)):
        mine = x.movedim(axis, 0)[c]
        alone = ActivationQuantizer(b)
        alone.calibrate(mine)
        torch.testing.assert_close(found.movedim(axis, 0)[c], alone(mine))


class Branches(nn.Module):
    """Two layers read one tensor; a head runs twice."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.head = nn.Linear(2, 2)

    def forward(self, x):
        x = torch.relu(x)
        y = (self.left(x) + self.right(x)).relu()
        return self.head(y.mean((2, 3))) + self.head(10 * y.amax((2, 3)))


BRANCH_BITS = {"w:left": 4, "w:head": 4, "a:left#0": 3, "a:head#0": 2, "a:head#1": 5}


def test_readers_of_one_tensor_share_its_quantizer_and_each_call_has_its_own():
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(4, 2, 3, 3)
    plain = copy.deepcopy(model)
    attach(model, BRANCH_BITS, x)
    calibrate(model, [x])
    assert model.left.input_quantizer is model.right.input_quantizer
    assert [q.bits for q in model.head.input_quantizer] == [2, 5]
    scales = make_optimizer(model, RECIPE).param_groups[-1]["params"]
    assert len(scales) == 2 + 3  # of each weight and each tensor once
    expected = model(x)
    assert torch.equal(model(x), expected)  # the calls are counted anew
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    detach(model)
    assert torch.equal(model(x), plain(x))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_forward_pass_that_breaks_off_leaves_the_calls_in_order():
    model, x = Branches(), torch.randn(4, 2, 3, 3)
    attach(model, BRANCH_BITS, x)
    calibrate(model, [x])
    expected = model(x)
    model.head.input_quantizer.turn = 1  # as after an exception between the two calls
    assert torch.equal(model(x), expected)


def test_samples_of_a_tensor_are_taken_once_and_unquantized():
    model, x = Branches(), torch.randn(4, 2, 3, 3)
    attach(model, BRANCH_BITS, x)
    samples = sample_activations(model, [x, x + 1])
    assert sorted(samples) == ["head#0", "head#1", "left#0"]
    assert torch.equal(samples["left#0"], torch.cat([x, x + 1]).relu().view(1, -1))


def test_bits_that_do_not_fit_the_network_are_refused():
    x = torch.randn(1, 2, 3, 3)
    with pytest.raises(ValueError, match="w:left must have bits for 2 channels, got 3"):
        attach(Branches(), {f"w:left[{c}]": 4 for c in range(3)})
    with pytest.raises(ValueError, match="the channels of w:left must come in order from 0"):
        attach(Branches(), {"w:left[1]": 4})
    with pytest.raises(ValueError, match=r"activations that a layer reads.*\['tail#0'\]"):
        attach(Branches(), {"a:tail#0": 4}, x)


def test_fixed_activations_are_those_that_the_layers_read():
    reads = read_network(Branches(), torch.randn(1, 2, 3, 3))
    assert fixed_activations(reads, 4, 8) == {"a:left#0": 4, "a:head#0": 4, "a:head#1": 4}
    assert fixed_activations(reads, 4, 8, ["left"]) == {"a:left#0": 4}
    assert fixed_activations(reads, None, 8) == {}
