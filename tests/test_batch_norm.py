"""Batch-norm: statistics that are estimated again, and layers that take them in."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import ResidualNet, TinyTask
from torch import nn
from torch.nn.utils import parametrizations

from hawq.finetune import attach, fold_batch_norm, reestimate
from hawq.finetune.batch_norm import has_statistics, statistics_batches
from hawq.finetune.folding import FoldedBatchNorm, fold_state, foldable
from search.tasks.networks import SmallResNet


def settle(model, seed=0):
    """Give every batch-norm statistics and factors of its own; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.2, 3, generator=generator)
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5, generator=generator)
                nn.init.uniform_(module.bias, -1, 1, generator=generator)
    return model.eval()


# --- statistics ---------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_statistics_are_those_of_all_batches_as_one(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [3 + 2 * torch.randn(n, 2, 4, 3, generator=generator) for n in sizes]
    model = nn.Sequential(nn.BatchNorm2d(2))
    reestimate(model, batches)
    values = np.concatenate([b.numpy() for b in batches]).astype(np.float64)
    np.testing.assert_allclose(model[0].running_mean, values.mean((0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(model[0].running_var, values.var((0, 2, 3), ddof=1), rtol=1e-5)
    assert model[0].num_batches_tracked == len(sizes)


def test_later_layers_see_what_batch_statistics_give():
    torch.manual_seed(0)
    batches = [torch.randn(16, 3) * 4 + 1 for _ in range(3)]
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    reestimate(model, batches)
    seen = torch.cat([F.batch_norm(b, None, None, training=True).relu() for b in batches]).double()
    torch.testing.assert_close(model[2].running_mean.double(), seen.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[2].running_var.double(), seen.var(0), rtol=1e-5, atol=1e-6)


def test_the_past_leaves_no_trace():
    batches = [torch.randn(8, 2, 5, 5, generator=torch.Generator().manual_seed(1))]
    states = []
    for mean in (0.0, 100.0):
        torch.manual_seed(0)
        model = ResidualNet()
        model.bn1.running_mean.fill_(mean)
        reestimate(model, batches)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_modes_weights_and_momentum_are_left_alone():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.5))
    model.train()
    model[1].eval()
    before = copy.deepcopy(dict(model.named_parameters()))
    reestimate(model, [torch.randn(4, 2, 3, 3)])
    assert [m.training for m in model] == [True, False, True]
    assert model[1].momentum == 0.3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_dropout_is_off_while_statistics_are_taken():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(1)).train()
    reestimate(model, [torch.ones(64, 1)])
    assert model[1].running_mean.item() == 1


class Lazy(nn.Module):
    """A batch-norm that never runs beside one that runs twice."""

    def __init__(self):
        super().__init__()
        self.unused, self.twice = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

    def forward(self, x):
        return self.twice(x) + self.twice(x + 1)


def test_a_batch_norm_that_never_runs_keeps_its_own_statistics():
    model = Lazy()
    model.unused.running_mean.fill_(5)
    x = torch.randn(10, 1)
    reestimate(model, [x])
    assert model.unused.running_mean.item() == 5
    both = torch.cat([x, x + 1])
    torch.testing.assert_close(model.twice.running_mean, both.mean(0))
    torch.testing.assert_close(model.twice.running_var, both.var(0))


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match="must hold a batch-norm with running statistics"):
        reestimate(nn.Sequential(nn.BatchNorm1d(1, track_running_stats=False)), [torch.ones(2, 1)])
    model = settle(nn.Sequential(nn.BatchNorm1d(1)))
    mean = model[0].running_mean.clone()
    with pytest.raises(ValueError, match="batches must hold one"):
        reestimate(model, [])
    assert torch.equal(model[0].running_mean, mean)


def test_channels_of_a_quantized_network_get_back_the_spread_that_quantization_changed():
    task = TinyTask(num_examples=64)
    x = task.batch("train", torch.arange(64))[0]
    model = task.model().eval()

    def spread():
        out = model.bn1(model.conv1(x))
        return torch.cat([out.mean((0, 2, 3)), out.std((0, 2, 3))])

    reestimate(model, [x])
    plain = spread()
    attach(model, {"w:conv1": 1})
    assert (spread() - plain).abs().max() > 0.05
    reestimate(model, [x])
    torch.testing.assert_close(spread(), plain, rtol=1e-3, atol=1e-4)


def test_batches_of_statistics_are_distinct_plain_and_a_function_of_the_seed():
    task = TinyTask(num_examples=20)
    everything = task.batch("train", torch.arange(20))[0]

    def drawn(seed, num=2, size=6):
        return list(statistics_batches(task, num, size, seed, "cpu"))

    batches = drawn(0)
    assert [len(batch) for batch in batches] == [6, 6]
    rows = [int((everything == image).flatten(1).all(1).nonzero()) for image in torch.cat(batches)]
    assert len(set(rows)) == 12
    assert all(torch.equal(a, b) for a, b in zip(batches, drawn(0), strict=True))
    assert not torch.equal(batches[0], drawn(1)[0])
    assert [len(batch) for batch in drawn(0, num=9)] == [6, 6, 6]
    assert [len(batch) for batch in drawn(0, size=50)] == [20]


# --- folding ------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Every way in which a batch-norm can be out of a layer's reach, and two that are within."""

    def __init__(self):
        super().__init__()
        self.first, self.within = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.before, self.after = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.shared, self.of_shared = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.read, self.of_read = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.grouped, self.of_grouped = nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)
        self.live, self.of_live = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.tied, self.of_tied = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice = nn.BatchNorm2d(4)
        self.kept, self.of_kept = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.dense, self.of_dense = nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)
        self.tokens, self.of_tokens = nn.Linear(3, 3), nn.BatchNorm1d(2)

    def forward(self, x):
        x = self.within(self.first(x)).relu()
        x = self.after(self.before(x))
        x = self.of_shared(self.shared(self.shared(x)))
        y = self.read(x)
        x = self.of_read(y) + y
        x = self.of_grouped(self.grouped(x)).relu()
        x = self.of_live(self.live(x))
        x = self.of_tied(self.tied(x)) * self.tied.weight.mean()
        x = self.twice(self.twice(x))
        kept = self.kept(x)
        x = self.of_dense(self.dense(self.of_kept(kept).mean((2, 3))))
        return self.of_tokens(self.tokens(torch.stack([x, -x], 1))), kept


KEPT = {
    "before": "what it reads is not the output of a convolution or linear layer",
    "of_shared": "shared runs 2 times",
    "of_read": "the output of read is read by add, too",
    "of_live": "it has no running statistics",
    "of_tied": "a parameter of tied is read by mean, too",
    "twice": "it runs 2 times",
    "of_kept": "the output of kept is read by the network's outputs, too",
    "of_tokens": "the channels of tokens are not where the batch-norm looks for them",
}


def test_what_can_be_folded_is_found_and_the_rest_is_named():
    torch.manual_seed(0)
    model = settle(Odd())
    found = foldable(model, torch.randn(2, 2, 6, 6))
    assert found.layers == {"within": "first", "of_grouped": "grouped", "of_dense": "dense"}
    assert found.kept == KEPT
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


NETWORKS = {
    "residual": (ResidualNet, (2, 5, 5)),
    "shared": (lambda: ResidualNet(shared=True), (2, 5, 5)),
    "resnet14": (lambda: SmallResNet(14, 1), (1, 8, 8)),
    "odd": (Odd, (2, 6, 6)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_network_gives_the_same_outputs(name):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    model = settle(make())
    x = torch.randn(5, *shape)
    state = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model, x)
    for output, expected in zip(_tensors(folded(x)), _tensors(model(x)), strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * largest)
    assert any(isinstance(m, FoldedBatchNorm) for m in folded.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(m, FoldedBatchNorm) for m in model.modules())


def _tensors(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def test_every_batch_norm_of_a_residual_network_is_folded():
    model = settle(SmallResNet(14, 1))
    folded = fold_batch_norm(model, torch.randn(1, 1, 8, 8))
    assert not has_statistics(folded)
    assert not foldable(model, torch.randn(1, 1, 8, 8)).kept


def test_folding_in_float64_is_exact_but_for_the_last_digits():
    torch.manual_seed(0)
    model, x = settle(SmallResNet(8, 1)).double(), torch.randn(3, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(fold_batch_norm(model, x)(x), model(x), rtol=1e-12, atol=1e-12)


def test_weights_of_an_unfolded_network_fold_into_a_folded_one():
    example = torch.randn(2, 1, 8, 8)
    torch.manual_seed(0)
    trained = settle(SmallResNet(8, 1))
    folded = fold_batch_norm(settle(SmallResNet(8, 1), 5), example)
    folded.load_state_dict(fold_state(folded, trained.state_dict()))
    torch.testing.assert_close(folded(example), trained(example), rtol=1e-4, atol=1e-4)
    state = folded.state_dict()
    again = fold_state(folded, state)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], state[k]) for k in state)


def test_a_made_weight_is_not_folded_into():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.BatchNorm1d(2))
    kept = foldable(model.eval(), torch.ones(1, 2)).kept
    assert kept == {"1": "the weight of 0 is made of others"}


@pytest.mark.parametrize("spoil", [lambda y: y.mul_(2), lambda y: y.T.T, lambda y: y[:]])
def test_a_view_or_a_change_in_place_is_a_reader(spoil):
    class Spoilt(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)

        def forward(self, x):
            y = self.layer(x)
            view = spoil(y)
            return self.norm(y) + view

    assert "norm" in foldable(Spoilt().eval(), torch.ones(1, 2)).kept


def test_asking_for_the_shape_is_not_reading():
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)

        def forward(self, x):
            y = self.layer(x)
            return self.norm(y).view(y.shape[0], y.size(1), len(y) // len(y))

    assert foldable(Shaped().eval(), torch.ones(1, 2)).layers == {"norm": "layer"}
