"""Layers quantized one after the other, in any order, and resumed anywhere."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import TinyTask
from torch.nn.utils import parametrize

from hawq.finetune import Recipe, attach, detach, make_optimizer, train_epoch
from hawq.finetune.staging import Staging

TASK = TinyTask(num_examples=64)
BITS = {"w:conv1": 2, "w:conv2": 2, "w:linear": 2}
RECIPE = Recipe(epochs=2, batch_size=16, lr=0.05)  # eight steps


def quantized():
    model = TASK.model()
    attach(model, BITS)
    return model


def active(model):
    return [
        name
        for name in ("conv1", "conv2", "linear")
        if model.get_submodule(name).parametrizations.weight[0].active
    ]


def walk(staging, steps=8, start=0):
    for step in range(start, steps):
        staging.advance((step - 1) / steps, step / steps)
        yield


def test_blocks_come_in_order_and_all_are_there_at_the_end():
    model = quantized()
    staging = Staging(model, [["linear"], ["conv2"], ["conv1"]], until=0.75)
    seen = [active(model) for _ in walk(staging)]
    assert seen == [["linear"]] * 2 + [["conv2", "linear"]] * 2 + [["conv1", "conv2", "linear"]] * 4
    assert staging.is_complete


def test_activations_may_come_before_all_weights():
    model = quantized()
    staging = Staging(model, [], activations_first=0.25, until=0.5)
    assert [len(active(model)) for _ in walk(staging)] == [0, 0, 3, 3, 3, 3, 3, 3]


def test_a_block_starts_from_the_weights_of_its_turn():
    model = quantized()
    staging = Staging(model, [["conv1"], ["conv2", "linear"]], until=0.5)
    quantizer = model.conv2.parametrizations.weight[0]
    first = quantizer.scale.clone()
    steps = walk(staging)
    next(steps)
    with torch.no_grad():
        model.conv2.parametrizations.weight.original.mul_(3)
        model.conv1.parametrizations.weight.original.mul_(3)
    before = model.conv1.parametrizations.weight[0].scale.clone()
    for _ in steps:
        pass
    torch.testing.assert_close(quantizer.scale, 3 * first)
    # One that was on already keeps what it learned.
    assert torch.equal(model.conv1.parametrizations.weight[0].scale, before)


@given(order=st.permutations(["conv1", "conv2", "linear"]), cut=st.integers(0, 8))
def test_a_training_that_resumes_anywhere_has_the_same_layers_quantized(order, cut):
    blocks = [[name] for name in order]
    whole, resumed = quantized(), quantized()
    expected = [active(whole) for _ in walk(Staging(whole, blocks))]
    found = [active(resumed) for _ in walk(Staging(resumed, blocks), start=cut)]
    assert found == expected[cut:]


def test_an_epoch_trains_what_is_quantized_by_then():
    task = TASK
    model = quantized()
    original = model.conv1.parametrizations.weight.original
    staging = Staging(model, [["linear"], ["conv1", "conv2"]], until=0.9)
    optimizer = make_optimizer(model, RECIPE)
    train_epoch(model, optimizer, task, RECIPE, epoch=0, seed=0, staging=staging)
    assert torch.equal(model.conv1.weight, original)  # in floating point still
    assert not staging.is_complete
    train_epoch(model, optimizer, task, RECIPE, epoch=1, seed=0, staging=staging)
    assert len(model.conv1.weight[0].unique()) <= 4
    assert staging.is_complete


def test_an_order_changes_where_training_ends_and_none_is_the_default():
    ends = []
    for order in (None, [["conv1"], ["conv2"], ["linear"]], [["linear"], ["conv2"], ["conv1"]]):
        model = quantized()
        staging = order and Staging(model, order)
        optimizer = make_optimizer(model, replace(RECIPE, epochs=1))
        for epoch in range(1):
            train_epoch(
                model, optimizer, TASK, RECIPE, epoch=epoch, seed=0, staging=staging or None
            )
        detach(model)
        ends.append(model.conv1.weight.detach().clone())
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


@pytest.mark.parametrize(
    ("order", "shares", "message"),
    [
        ([["conv9"]], {}, r"order must name each quantized layer once at most, got \['conv9'\]"),
        ([["conv1"], ["conv1"]], {}, "once at most"),
        ([], {"activations_first": 0.6, "until": 0.5}, "must leave a part of the training"),
    ],
)
def test_orders_that_cannot_be_followed_are_refused(order, shares, message):
    with pytest.raises(ValueError, match=message):
        Staging(quantized(), order, **shares)


def test_a_layer_that_is_not_quantized_has_no_turn():
    model = TASK.model()
    attach(model, {"w:conv1": 2})
    Staging(model, []).advance(-1, 0)
    assert not parametrize.is_parametrized(model.conv2)
