"""``hawq.traces``: any network in one call, and what it refuses."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import hessian as hessian_of
from torch.utils.data import DataLoader, TensorDataset

import hawq
from search.config import CurvatureConfig, WorkersConfig
from search.errors import InputError
from search.tracing import trace_on_cluster
from search.unit_file import UnitFile
from tests.oracles import ResidualNet, TinyTask

torch.set_num_threads(1)


def data(num=24, classes=4, shape=(2, 5, 5), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(num, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.arange(num) % classes


def loader(num=24, batch=8, **options):
    return DataLoader(TensorDataset(*data(num, **options)), batch_size=batch)


def dense_traces(model, layers, loss, inputs, targets):
    """Traces of the dense Hessian of the mean loss, and its diagonal by output channel."""
    model.eval()
    traces = []
    for name in layers:
        weight = model.get_submodule(name).weight

        def mean_loss(value, name=name):
            outputs = torch.func.functional_call(model, {f"{name}.weight": value}, (inputs,))
            return loss(outputs, targets)

        hessian = hessian_of(mean_loss, weight.detach())
        size = weight.numel()
        traces.append(float(hessian.reshape(size, size).trace()))
    return np.array(traces)


class WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out, self.unused = nn.Linear(50, 8), nn.Linear(8, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.first(x.flatten(1)).relu())


def network(kind="relu"):
    torch.manual_seed(1)
    activation = {"relu": F.relu, "silu": F.silu}[kind]
    return ResidualNet(activation).double()


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return ((outputs - F.one_hot(targets, 4)) ** 2).sum(1).mean() / 2


def tilted_cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    """Neither convex nor concave in the outputs."""
    return (outputs.cos() * (1 + F.one_hot(targets, 4))).sum(1).mean()


@pytest.mark.parametrize("kind", ["relu", "silu"])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        half_squares,
        tilted_cosine,
    ],
    ids=["mean", "sum", "smoothed", "squares", "indefinite"],
)
def test_any_loss_of_any_network_has_the_traces_of_its_dense_hessian(kind, loss):
    model = network(kind)
    inputs, targets = data(dtype=torch.float64)
    found = hawq.traces(model, [(inputs, targets)], loss, max_probes=60, rtol=0.02)
    expected = dense_traces(model, found.names, loss, inputs, targets)
    if getattr(loss, "reduction", "mean") == "sum":
        expected /= len(inputs)
    error = np.maximum(found.estimate.probe_error, 1e-4 * np.abs(expected))
    assert (np.abs(found.estimate.trace - expected) < 4.5 * error).all()
    assert ("hutchinson" in found.estimator) is False


def test_a_loader_and_the_list_of_its_batches_are_the_same():
    one = hawq.traces(network().float(), loader())
    other = hawq.traces(network().float(), list(loader(batch=5)))
    np.testing.assert_array_equal(one.estimate.trace, other.estimate.trace)


def test_a_group_answers_by_name_with_its_error():
    found = hawq.traces(network().float(), loader(), granularity="channel")
    trace, error = found["conv1"]
    channels = [found[f"conv1[{c}]"][0] for c in range(3)]
    assert trace == pytest.approx(sum(channels))
    assert error > 0
    assert "conv1" in str(found)
    assert [group["group"] for group in found.to_json()["groups"]] == list(found.names)


def test_train_mode_is_looked_at_in_eval_mode_and_left_as_it_was():
    model = network().float().train()
    statistics = model.bn1.running_mean.clone()
    flags = [p.requires_grad for p in model.parameters()]
    found = hawq.traces(model, loader())
    assert model.training
    assert model.bn1.training
    torch.testing.assert_close(model.bn1.running_mean, statistics)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    calm = hawq.traces(model.eval(), loader())
    np.testing.assert_array_equal(found.estimate.trace, calm.estimate.trace)


def test_examples_that_depend_on_each_other_are_refused():
    model = ResidualNet(live=True)
    with pytest.raises(ValueError, match="must not depend on the others of its batch"):
        hawq.traces(model, loader())


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, t: F.cross_entropy(o, t) ** 2,
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4])),
    ],
    ids=["square of a mean", "mean over weights"],
)
def test_a_loss_that_is_no_mean_or_sum_over_examples_is_refused(loss):
    with pytest.raises(ValueError, match="mean or a sum over the examples"):
        hawq.traces(network().float(), loader(), loss)


def test_frozen_layers_are_traced_and_unused_ones_have_no_curvature():
    model = WithUnused()
    model.first.weight.requires_grad_(False)
    found = hawq.traces(model, loader())
    assert found["first"][0] > 0
    assert found["unused"] == (0, 0)
    assert not model.first.weight.requires_grad


class Tied(nn.Module):
    """One weight in two layers, or in a layer and in the forward method."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.out = nn.Linear(6, 4)
        if where == "layers":
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.flatten(1).split(6, 1)
        if self.where == "layers":
            return self.out(self.first(left).relu() + self.second(right).relu())
        return self.out(self.first(left).relu() + F.linear(right, self.first.weight).relu())


@pytest.mark.parametrize("where", ["layers", "forward"])
def test_a_weight_that_is_used_twice_has_the_trace_of_both_uses(where):
    torch.manual_seed(0)
    model = Tied(where).double()
    inputs, targets = data(shape=(3, 4), dtype=torch.float64)
    found = hawq.traces(model, [(inputs, targets)], layers=["first", "out"], rtol=0.02)
    loss = F.cross_entropy
    weight = model.first.weight

    def mean_loss(value):
        tied = {"first.weight": value} | ({"second.weight": value} if where == "layers" else {})
        return loss(torch.func.functional_call(model, tied, (inputs,)), targets)

    hessian = hessian_of(mean_loss, weight.detach()).reshape(36, 36)
    error = max(found.estimate.probe_error[0], 1e-4 * float(hessian.trace()))
    assert abs(found["first"][0] - float(hessian.trace())) < 4.5 * error
    assert found.estimator == ("gauss_newton" if where == "forward" else found.estimator)


def test_in_place_operators_change_nothing():
    def build(inplace):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 4)
        )

    for of in ("weights", "activations"):
        one, other = (hawq.traces(build(flag), loader(), of=of) for flag in (False, True))
        np.testing.assert_allclose(one.estimate.trace, other.estimate.trace, rtol=1e-6)


def test_batches_of_one_example_will_do():
    one = hawq.traces(network().float(), loader(batch=1), batch_size=1)
    many = hawq.traces(network().float(), loader())
    np.testing.assert_allclose(one.estimate.trace, many.estimate.trace, rtol=0.1)


def test_images_of_several_sizes_are_taken_one_by_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
    )
    images = [torch.randn(1, 2, 5 + i % 3, 6) for i in range(12)]
    batches = [(image, torch.tensor([i % 4])) for i, image in enumerate(images)]
    weights = hawq.traces(model, batches, batch_size=4)
    assert (weights.estimate.trace > 0).all()
    found = hawq.traces(model, batches, of="activations")
    assert found.names == ("0#0", "4#0")
    # Of images of one size alone, the average trace of the site is that of its own elements.
    expected = np.mean(
        [
            hawq.traces(
                model, [(torch.cat([x, x]), torch.tensor([0, 0]))], of="activations"
            ).average[0]
            for x in images
        ]
    )
    assert found.average[0] == pytest.approx(expected, rel=0.2)


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match="at least 2 examples, got 0"):
        hawq.traces(network().float(), [])


def test_batches_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs of inputs and targets, got Tensor"):
        hawq.traces(network().float(), [torch.zeros(4, 2, 5, 5)])


def test_a_network_without_layers_and_a_layer_that_is_not_there_are_refused():
    with pytest.raises(ValueError, match="linear layers or embeddings of the network, got none"):
        hawq.traces(nn.Sequential(nn.Flatten()), loader())
    with pytest.raises(ValueError, match=r"got \['conv9'\]; known are conv1, conv2, linear"):
        hawq.traces(network().float(), loader(), layers=["conv9"])


def test_a_loss_that_is_no_number_is_named():
    model = network().float()
    with torch.no_grad():
        model.linear.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the loss must be finite"):
        hawq.traces(model, loader())


@dataclass(frozen=True)
class Flickering(TinyTask):
    """Augments where it should not."""

    def batch(self, split: str, indices: Tensor):
        images, labels = super().batch(split, indices)
        return images + torch.rand(()), labels


def test_a_loader_that_changes_its_examples_is_refused(tmp_path):
    task = Flickering()
    with pytest.raises(InputError, match="must return the same examples for the same indices"):
        trace_on_cluster(
            task,
            task.model().state_dict(),
            ["conv1"],
            settings=CurvatureConfig(examples=8, batch_size=4),
            workers=WorkersConfig(count=1),
            seed=0,
            units=UnitFile(tmp_path / "units.jsonl", "x"),
        )
