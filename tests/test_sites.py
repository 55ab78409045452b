"""Activation tensors as sites, and their curvature against dense Hessians."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import LAYERS, NetTask, TinyTask
from torch import Tensor, nn

from hawq.curvature import Site, TracePlan, estimate_traces, plan_traces
from hawq.curvature.hutchinson import hutchinson_samples
from hawq.curvature.sites import (
    ActivationTape,
    activation_sites,
    channel_sums,
    group_names,
    group_sums,
    weight_sites,
)
from hawq.factors import softmax_factor


class Branches(nn.Module):
    """A tensor that two layers and a sum read, before a last layer."""

    layers = ("stem", "left", "right", "head")

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.activation = activation
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.left, self.right = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(12, 4)

    def first(self, x: Tensor) -> Tensor:
        return self.activation(self.stem(x))

    def second(self, h: Tensor) -> Tensor:
        h = self.activation(self.left(h) + self.right(h) + h)
        return F.max_pool2d(h, 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))

    def tails(self, x: Tensor) -> dict[str, tuple[Tensor, int, Callable[[Tensor], Tensor]]]:
        """Site to its tensor, its channels' axis, and what the network makes of it."""
        h = self.first(x)
        return {
            "stem#0": (x, 1, self),
            "left#0": (h, 1, lambda h: self.head(self.second(h))),
            "head#0": (self.second(h), 1, self.head),
        }


class Again(nn.Module):
    """A layer that runs three times, the last time on what it has read before."""

    layers = ("conv", "head")

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.activation = activation
        self.conv, self.head = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(50, 4)

    def first(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))

    def second(self, h: Tensor) -> Tensor:
        return (self.activation(self.conv(h)) - 0.5 * self.conv(h)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))

    def tails(self, x: Tensor) -> dict[str, tuple[Tensor, int, Callable[[Tensor], Tensor]]]:
        h = self.first(x)
        return {
            "conv#0": (x, 1, self),
            "conv#1": (h, 1, lambda h: self.head(self.second(h))),
            "head#0": (self.second(h), 1, self.head),
        }


class Tokens(nn.Module):
    """Linear layers that read ten tokens an example: their channels come last."""

    layers = ("token", "head")

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.activation = activation
        self.token, self.head = nn.Linear(5, 3), nn.Linear(30, 4)

    def first(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), 10, 5)

    def second(self, h: Tensor) -> Tensor:
        return self.activation(self.token(h)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))

    def tails(self, x: Tensor) -> dict[str, tuple[Tensor, int, Callable[[Tensor], Tensor]]]:
        h = self.first(x)
        return {
            "token#0": (h, 2, lambda h: self.head(self.second(h))),
            "head#0": (self.second(h), 1, self.head),
        }


class InPlace(Branches):
    """Changes tensors in place where training may, and its own input first of all."""

    def first(self, x: Tensor) -> Tensor:
        return F.relu_(self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        x += 0
        return super().forward(x)


@dataclass(frozen=True)
class BranchTask(NetTask):
    """One of the networks above, in double precision."""

    dtype: torch.dtype = torch.float64
    num_examples: int = 10


def task_of(kind: type[nn.Module], activation: Callable[[Tensor], Tensor] = F.relu) -> BranchTask:
    return BranchTask(make=lambda: kind(activation))


KINDS = [Branches, Again, Tokens, InPlace]


def plan_of(task: TinyTask, layers: Sequence[str], estimator="exact_gauss_newton", **settings):
    settings = {"batch_size": 4, "num_examples": 10, "pool": None, "granularity": "channel"} | (
        settings
    )
    plan, _ = plan_traces(
        task, task.model(), layers, subject="activations", estimator=estimator, **settings
    )
    return replace(plan, estimator=estimator, floor=0.0)


def dense(task: NetTask, *, fisher: bool = False) -> dict[str, Tensor]:
    """Channels' traces of ∂²ℓ/∂a² of every site, averaged over the examples, from dense Hessians.

    Or, of the Fisher matrix, the mean of the squared gradients.
    """
    model = task.model().eval()
    x, y = task.batch("train", torch.arange(task.num_examples))
    found: dict[str, list[Tensor]] = {}
    for n in range(task.num_examples):
        for name, (tensor, axis, tail) in model.tails(x[n : n + 1].clone()).items():

            def loss(a: Tensor, tail=tail, n=n) -> Tensor:
                return F.cross_entropy(tail(a.clone()), y[n : n + 1])

            a = tensor.detach()
            if fisher:
                diagonal = torch.autograd.functional.jacobian(loss, a).square()
            else:
                hessian = torch.autograd.functional.hessian(loss, a)
                diagonal = hessian.view(a.numel(), a.numel()).diagonal().view_as(a)
            by_channel = diagonal[0].movedim(axis - 1, 0)
            found.setdefault(name, []).append(by_channel.reshape(len(by_channel), -1).sum(1))
    return {name: torch.stack(values).mean(0) for name, values in found.items()}


def as_groups(channels: dict[str, Tensor]) -> np.ndarray:
    return group_sums(list(channels.values()), "channel").numpy()


# --- what a site is -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_sites_are_the_tensors_that_are_read(kind):
    task = task_of(kind)
    model = task.model()
    x, _ = task.batch("train", torch.arange(1))
    sites = activation_sites(model, kind.layers, lambda: model(x))
    expected = [
        Site(name, tensor.numel(), tensor.shape[axis])
        for name, (tensor, axis, _) in model.eval().tails(x.clone()).items()
    ]
    assert list(sites) == expected


def test_a_tensor_with_two_readers_is_one_site_named_after_the_first():
    task = task_of(Branches)
    model = task.model()
    sites = activation_sites(
        model, ("right", "left"), lambda: model(task.batch("train", torch.arange(2))[0])
    )
    assert [site.name for site in sites] == ["left#0"]  # it runs first


def test_a_layer_that_runs_on_several_tensors_has_a_site_for_each():
    model = task_of(Again).model()
    sites = activation_sites(model, ("conv",), lambda: model(torch.ones(1, 2, 5, 5).double()))
    assert [site.name for site in sites] == ["conv#0", "conv#1"]


def test_looking_for_sites_leaves_the_network_and_its_input_alone():
    model = task_of(InPlace).model().train()
    x = torch.ones(1, 2, 5, 5).double()
    activation_sites(model, InPlace.layers, lambda: model(x))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not x.requires_grad
    assert x._version == 0


def test_weights_are_sites_with_their_output_channels():
    model = TinyTask().model()
    assert weight_sites(model, LAYERS) == (
        Site("conv1", 54, 3),
        Site("conv2", 81, 3),
        Site("linear", 48, 4),
    )


def test_groups_are_the_sites_and_then_their_channels():
    sites = [Site("a", 4, 2), Site("b#1", 3, 1)]
    assert group_names(sites, "layer") == ("a", "b#1")
    assert group_names(sites, "channel") == ("a", "b#1", "a[0]", "a[1]", "b#1[0]")
    channels = [torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[5.0], [6]])]
    assert group_sums(channels, "layer").tolist() == [[3, 5], [7, 6]]
    assert group_sums(channels, "channel").tolist() == [[3, 5, 1, 2, 5], [7, 6, 3, 4, 6]]


@pytest.mark.parametrize("subject", ["weights", "activations"])
def test_channels_add_up_to_their_site_for_every_probe(subject):
    task = TinyTask("silu", dtype=torch.float64)
    model, (x, y) = task.model().eval(), task.batch("train", torch.arange(4))
    tape = ActivationTape(model, LAYERS)
    with tape.recording():
        loss = F.cross_entropy(model(x), y, reduction="sum")
    if subject == "weights":
        leaves = [model.get_submodule(name).weight for name in LAYERS]
        sites, axes = weight_sites(model, LAYERS), [0, 0, 0]
    else:
        leaves, sites, axes = tape.edges, [s.site for s in tape.seen], [s.axis for s in tape.seen]

    def reduce(parts: Sequence[Tensor | None]) -> Tensor:
        return group_sums(channel_sums(parts, sites, axes), "channel")

    samples = hutchinson_samples(loss, leaves, range(6), reduce=reduce)
    start = len(sites)
    for i, site in enumerate(sites):
        channels = samples[:, start : start + site.num_channels]
        np.testing.assert_allclose(samples[:, i], channels.sum(1), rtol=1e-12)
        start += site.num_channels
    assert start == samples.shape[1]
    # All sites together are the whole quadratic form, which needs no reduction.
    whole = hutchinson_samples(loss, leaves, range(6)).sum(1)
    np.testing.assert_allclose(samples[:, : len(sites)].sum(1), whole, rtol=1e-10)


# --- traces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_exact_traces_are_the_dense_hessians_of_sites_and_channels(kind):
    task = task_of(kind)
    plan = plan_of(task, kind.layers)
    expected = dense(task)
    assert plan.names == group_names(plan.sites, "channel")
    estimate = estimate_traces(task, task.model(), plan)
    np.testing.assert_allclose(estimate.trace, as_groups(expected), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_traces_are_the_mean_squared_gradients(kind):
    task = task_of(kind)
    estimate = estimate_traces(task, task.model(), plan_of(task, kind.layers, "fisher"))
    expected = as_groups(dense(task, fisher=True))
    np.testing.assert_allclose(estimate.trace, expected, rtol=1e-9, atol=1e-13)


def assert_within(estimate, expected: np.ndarray, share: float) -> None:
    """Within four and a half probe errors, and these are small for the sites."""
    assert (np.abs(estimate.trace - expected) < 4.5 * estimate.probe_error + 1e-12).all()
    num = np.abs(expected) > 0
    assert (estimate.probe_error[num][:2] < share * np.abs(expected[num][:2])).all()


@pytest.mark.parametrize("estimator", ["hutchinson", "gauss_newton", "mixed_gauss_newton"])
@pytest.mark.parametrize("kind", [Branches, Again, Tokens])
def test_random_probes_agree_with_the_dense_hessians(kind, estimator):
    task = task_of(kind)
    plan = plan_of(task, kind.layers, estimator, probes_per_unit=100, max_probes=100, stop="count")
    estimate = estimate_traces(task, task.model(), replace(plan, leading=1))
    assert_within(estimate, as_groups(dense(task)), 0.25)


@pytest.mark.parametrize("kind", [Branches, Tokens])
def test_on_a_silu_network_hutchinson_is_right_and_gauss_newton_is_something_else(kind):
    task = task_of(kind, F.silu)
    expected = as_groups(dense(task))
    plan = plan_of(
        task, kind.layers, "hutchinson", probes_per_unit=100, max_probes=200, stop="count"
    )
    assert_within(estimate_traces(task, task.model(), plan), expected, 0.25)
    other = estimate_traces(task, task.model(), plan_of(task, kind.layers)).trace
    assert abs(other[0] - expected[0]) > 0.03 * abs(expected[0])
    head = [i for i, name in enumerate(plan.names) if name.startswith("head#0")]
    np.testing.assert_allclose(other[head], expected[head])  # linear in what the head reads


def test_the_last_layer_s_input_has_a_closed_form():
    # Per example Σ_c p_c w_cj² − (Σ_c p_c w_cj)² for channel j.
    task = task_of(Branches)
    model = task.model().eval()
    x, _ = task.batch("train", torch.arange(10))
    p, w = model(x).detach().softmax(1), model.head.weight.detach()
    channels = (p @ w.square() - (p @ w).square()).mean(0).numpy()
    estimate = estimate_traces(task, model, plan_of(task, ("head",)))
    np.testing.assert_allclose(estimate.trace[1:], channels, rtol=1e-10)
    whole = (p @ w.square().sum(1) - (p @ w).square().sum(1)).mean()
    assert estimate.trace[0] == pytest.approx(float(whole), rel=1e-10)


@pytest.mark.parametrize("estimator", ["exact_gauss_newton", "fisher"])
def test_a_batch_gives_what_its_examples_give_one_by_one(estimator):
    task = task_of(Branches)
    together = estimate_traces(task, task.model(), plan_of(task, Branches.layers, estimator))
    alone = plan_of(task, Branches.layers, estimator, batch_size=1)
    single = estimate_traces(task, task.model(), alone)
    np.testing.assert_allclose(single.trace, together.trace, rtol=1e-10)
    np.testing.assert_allclose(single.data_error, together.data_error, rtol=1e-8)


def test_a_floor_leaves_out_the_same_in_a_batch_and_one_by_one():
    # Of some examples a direction is left out that others keep.
    task = task_of(Branches)
    for floor in (0.05, 0.1, 0.2):
        plan = replace(plan_of(task, Branches.layers), floor=floor)
        together = estimate_traces(task, task.model(), plan)
        single = estimate_traces(task, task.model(), replace(plan, batch_size=1))
        np.testing.assert_allclose(single.trace, together.trace, rtol=1e-10)
        full = estimate_traces(task, task.model(), replace(plan, floor=0.0))
        assert 0 < together.trace[0] < full.trace[0]


def test_training_mode_and_frozen_weights_change_nothing():
    task = TinyTask(dtype=torch.float64)
    plan = plan_of(task, LAYERS)
    expected = estimate_traces(task, task.model().eval(), plan)
    model = task.model().train()
    model.conv2.weight.requires_grad_(False)
    np.testing.assert_array_equal(estimate_traces(task, model, plan).trace, expected.trace)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [
        name != "conv2.weight" for name, _ in model.named_parameters()
    ]


# --- examples of different sizes ----------------------------------------------------------------


class Growing(NetTask):
    """Example i is a picture of (4 + i)×5."""

    def batch(self, split, indices):
        assert len(indices) == 1, "examples of different sizes come one by one"
        index = int(indices)
        generator = torch.Generator().manual_seed(index)
        image = torch.randn(1, 2, 4 + index, 5, generator=generator, dtype=torch.float64)
        return image.to(self.dtype), indices % 4


def pooled() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(3, 3, 3),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


@pytest.mark.parametrize("estimator", ["exact_gauss_newton", "hutchinson", "gauss_newton"])
def test_examples_of_different_sizes_count_with_their_average_trace(estimator):
    task = Growing(make=pooled, dtype=torch.float64, num_examples=5)
    model = task.model().eval()
    sites = activation_sites(model, ("0", "2", "5"), lambda: model(torch.ones(1, 2, 4, 5).double()))
    assert [site.num_elements for site in sites] == [40, 60, 12]
    plan = TracePlan(
        layers=("0", "2", "5"),
        estimator=estimator,
        split="train",
        examples=tuple(range(5)),
        batch_size=1,
        probes_per_unit=100,
        rtol=1e-9,
        max_probes=100,
        seed=0,
        sites=sites,
        subject="activations",
    )
    expected = np.zeros((5, 3))
    for n in range(5):
        x, y = task.batch("train", torch.tensor([n]))
        h = model[:2](x).detach()
        parts = ((x, model), (h, model[2:]), (model[2:5](h).detach(), model[5:]))
        for i, (a, tail) in enumerate(parts):
            hessian = torch.autograd.functional.hessian(
                lambda a, tail=tail, y=y: F.cross_entropy(tail(a), y), a
            )
            average = hessian.view(a.numel(), a.numel()).trace() / a.numel()
            expected[n, i] = float(average) * sites[i].num_elements
    estimate = estimate_traces(task, model, plan)
    if estimator == "exact_gauss_newton":
        np.testing.assert_allclose(estimate.trace, expected.mean(0), rtol=1e-9)
        np.testing.assert_allclose(estimate.data_error, expected.std(0, ddof=1) / 5**0.5)
    else:
        assert_within(estimate, expected.mean(0), 0.25)


# --- what must not pass unseen --------------------------------------------------------------------


class Fickle(nn.Module):
    """Reads other activations for other examples."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 5), nn.Conv2d(2, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.first if float(x[0, 0, 0, 0].detach()) > -0.5 else self.second)(x).flatten(1)


def test_a_network_that_reads_other_activations_for_other_examples_is_refused():
    task = BranchTask(make=Fickle)
    plan = plan_of(task, ("first", "second"))
    with pytest.raises(ValueError, match="must read the same activations for all examples"):
        estimate_traces(task, task.model(), replace(plan, batch_size=1))


class Folded(nn.Module):
    """Folds ten tokens of every example into the batch, as window attention does."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Linear(5, 3), nn.Linear(30, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x.reshape(10 * len(x), 5)).relu()
        return self.head(h.reshape(len(x), -1))


def test_tokens_that_are_folded_into_the_batch_are_traced_right_or_refused():
    # The same network as ``Tokens``, with the same weights.
    unfolded = task_of(Tokens)
    expected = estimate_traces(
        unfolded, unfolded.model(), plan_of(unfolded, ("token", "head"), granularity="layer")
    ).trace
    task = BranchTask(make=Folded)
    try:
        plan = plan_of(task, ("token", "head"), granularity="layer")
        found = estimate_traces(task, task.model(), plan).trace
    except ValueError:
        return
    np.testing.assert_allclose(found, expected)


class Unrooted(TinyTask):
    """Runs its network by another method than by calling it."""

    def losses(self, model, batch):
        return F.cross_entropy(model.forward(batch[0]), batch[1], reduction="none")

    def curvature(self, model, batch):
        outputs = model.forward(batch[0])
        return outputs, [softmax_factor(outputs)]


@pytest.mark.parametrize("estimator", ["exact_gauss_newton", "hutchinson"])
def test_a_network_that_is_not_called_by_its_name_has_the_same_traces_or_is_refused(estimator):
    called = TinyTask(dtype=torch.float64)
    expected = estimate_traces(called, called.model(), plan_of(called, LAYERS, estimator)).trace
    task = Unrooted(dtype=torch.float64)
    try:
        found = estimate_traces(task, task.model(), plan_of(task, LAYERS, estimator)).trace
    except ValueError:
        return
    np.testing.assert_allclose(found, expected)
