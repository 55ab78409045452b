"""Traces example by example against plain gradients, dense blocks and their own theory."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import block_traces, dense_hessian, mean_loss_gauss_newton, mean_loss_hessian
from torch import Tensor, nn

from hawq.channels import channels_first, transposed_groups
from hawq.curvature import per_example, supports_examples
from hawq.curvature.columns import directions
from hawq.curvature.network import differentiable
from hawq.curvature.per_example import WeightTape, per_example_traces
from hawq.factors import softmax_factor
from hawq.space import quantizable_layers
from hawq.task import Factor


class Twice(nn.Module):
    """One layer that runs on two tensors, as a detector's head does on two levels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        y = F.relu(self.stem(x))
        return (self.head(y) + F.interpolate(self.head(F.max_pool2d(y, 2)), scale_factor=2)).mean(
            (2, 3)
        )


class Tied(nn.Module):
    """Two layers with one weight, on two paths: the outputs are linear in it."""

    def __init__(self, kind=nn.Linear):
        super().__init__()
        self.first, self.second = (
            (nn.Linear(12, 3), nn.Linear(12, 3))
            if kind is nn.Linear
            else (nn.Conv2d(3, 3, 2), nn.Conv2d(3, 3, 2, dilation=1, padding=1))
        )
        self.second.weight = self.first.weight

    def forward(self, x):
        if isinstance(self.first, nn.Linear):
            x = x.flatten(1)
            return self.first(x) + self.second(x.relu())
        return self.first(x).mean((2, 3)) + self.second(x.relu()).mean((2, 3))


def image_net(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4))


CASES = {
    "plain": (image_net(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU()), (2, 6, 6)),
    "stride": (image_net(nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.ReLU()), (2, 7, 6)),
    "stride that leaves a rest": (image_net(nn.Conv2d(2, 3, 2, stride=3), nn.ReLU()), (2, 7, 6)),
    "dilation": (image_net(nn.Conv2d(2, 3, 3, dilation=2), nn.ReLU()), (2, 8, 8)),
    "groups": (image_net(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU()), (4, 5, 5)),
    "depthwise": (image_net(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU()), (4, 5, 5)),
    "same": (image_net(nn.Conv2d(2, 3, (2, 4), padding="same"), nn.ReLU()), (2, 5, 5)),
    "circular": (
        image_net(nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), nn.ReLU()),
        (2, 4, 5),
    ),
    "reflect": (
        image_net(nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), nn.ReLU()),
        (2, 4, 5),
    ),
    "all at once": (
        image_net(
            nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2),
            nn.ReLU(),
        ),
        (4, 5, 4),
    ),
    "in place": (image_net(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True)), (2, 5, 5)),
    "small images": (image_net(nn.Conv2d(6, 5, 3), nn.ReLU()), (6, 4, 4)),
    "small images, groups": (
        image_net(nn.Conv2d(8, 6, 3, groups=2, dilation=2, padding=2, stride=2), nn.ReLU()),
        (8, 4, 3),
    ),
    "1-D": (image_net(nn.Conv1d(3, 4, 3, stride=2, padding=1), nn.ReLU()), (3, 9)),
    "3-D": (
        image_net(nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0)), nn.ReLU()),
        (2, 2, 5, 2),
    ),
    "transposed": (
        image_net(nn.ConvTranspose2d(4, 3, (3, 2), stride=2, padding=1), nn.ReLU()),
        (4, 3, 4),
    ),
    "transposed, all at once": (
        image_net(
            nn.ConvTranspose2d(4, 6, 3, 2, (2, 1), (1, 0), groups=2, dilation=(1, 2)), nn.ReLU()
        ),
        (4, 3, 2),
    ),
    "transposed, depthwise": (
        image_net(nn.ConvTranspose1d(4, 4, 3, 2, groups=4), nn.ReLU()),
        (4, 3),
    ),
    "transposed, 3-D": (image_net(nn.ConvTranspose3d(2, 3, 2), nn.ReLU()), (2, 2, 1, 2)),
    "few tokens": (
        nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)),
        (2, 5),
    ),
    "many tokens": (
        nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)),
        (2, 4, 3),
    ),
    "twice": (Twice(), (2, 4, 4)),
    "tied linear layers": (Tied(), (3, 2, 2)),
    "tied convolutions": (Tied(nn.Conv2d), (3, 3, 3)),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def make(name):
    torch.manual_seed(0)
    network, shape = CASES[name]
    x = torch.randn(5, *shape, dtype=torch.float64)
    network = network.double().eval()
    network(x)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return network, x, list(quantizable_layers(network))


def softmax(outputs):
    return [softmax_factor(outputs)]


def indefinite(outputs):
    """∇²ℓ = diag(1, …, 1) − ½·diag(1, 4, 9, …), which has both signs."""
    roots = torch.arange(1, outputs.shape[1] + 1, dtype=outputs.dtype) / 2**0.5
    rank = outputs.shape[1]
    return [Factor(rank, lambda s: s), Factor(rank, lambda s: s * roots, sign=-1.0)]


def traced(network, x, layers, factors_of=softmax, weights=None, **settings):
    """Every layer's traces, shape (K, N, O) each."""

    def forward():
        outputs = network(x)
        return outputs, factors_of(outputs)

    weights = torch.ones(len(x), dtype=torch.float64) if weights is None else weights
    return per_example_traces(forward, WeightTape(network, layers), weights=weights, **settings)


def one_at_a_time(network, x, layers, factors_of):
    """Σ_c sign·‖row o of the gradient of example n, column c‖², by plain autograd."""
    weights = [network.get_submodule(name).weight for name in layers]
    groups = [transposed_groups(network.get_submodule(name)) for name in layers]
    found = [
        torch.zeros(len(x), len(channels_first(w, own)), dtype=torch.float64)
        for w, own in zip(weights, groups, strict=True)
    ]
    for n in range(len(x)):
        outputs = network(x[n : n + 1])
        for factor in factors_of(outputs):
            for c in range(factor.rank):
                s = torch.eye(factor.rank, dtype=torch.float64)[c : c + 1]
                gradients = torch.autograd.grad(
                    outputs, weights, factor.apply(s), retain_graph=True
                )
                for rows, g, own in zip(found, gradients, groups, strict=True):
                    norms = channels_first(g, own).square().flatten(1).sum(1)
                    rows[n] += factor.sign * norms
    return found


# --- all directions -----------------------------------------------------------------------------


@pytest.mark.parametrize("factors_of", [softmax, indefinite])
@pytest.mark.parametrize("name", CASES)
def test_every_example_and_channel_agrees_with_plain_gradients(name, factors_of):
    network, x, layers = make(name)
    expected = one_at_a_time(network, x, layers, factors_of)
    for actual, e in zip(traced(network, x, layers, factors_of), expected, strict=True):
        torch.testing.assert_close(actual, e[None])


@pytest.mark.parametrize(
    "name", ["all at once", "circular", "3-D", "1-D", "few tokens", "twice", "tied linear layers"]
)
def test_layers_and_channels_agree_with_dense_blocks(name):
    network, x, layers = make(name)
    y = torch.arange(len(x)) % 3
    weights = [network.get_submodule(layer).weight for layer in layers]
    for i, layer in enumerate(layers):
        channels = traced(network, x, [layer])[0][0].mean(0)
        gauss_newton = mean_loss_gauss_newton(network, [layer], x)
        rows = gauss_newton.diagonal().view(len(weights[i]), -1).sum(1)
        torch.testing.assert_close(channels, rows)
        if "tied" not in name:  # their second name is another parameter to ``functional_call``
            hessian = mean_loss_hessian(network, [layer], x, y)
            torch.testing.assert_close(channels.sum(), hessian.trace())
    together = mean_loss_gauss_newton(network, layers, x)
    sums = [values[0].mean(0).sum() for values in traced(network, x, layers)]
    torch.testing.assert_close(torch.stack(sums), block_traces(together, weights))


@pytest.mark.parametrize("name", ["small images", "small images, groups", "1-D"])
def test_gradients_that_are_formed_and_gram_matrices_agree(name):
    # A layer that runs again has its gradients formed; here the second run counts for nothing.
    network, x, _ = make(name)

    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.rest = network[0], network[1:]

        def forward(self, x):
            return self.rest(self.layer(x) + 0 * self.layer(x))

    (once,), (again,) = traced(network, x, ["0"]), traced(Again(), x, ["layer"])
    assert float(once.sum()) > 0
    torch.testing.assert_close(again, once, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["plain", "small images", "many tokens", "twice"])
def test_chunks_change_nothing_beyond_rounding(name, monkeypatch):
    network, x, layers = make(name)
    together = traced(network, x, layers, leading=1, seeds=[0, 1])
    monkeypatch.setattr(per_example, "_CHUNK_BYTES", 1)
    for a, b in zip(together, traced(network, x, layers, leading=1, seeds=[0, 1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_one_example_gives_what_it_gives_among_others():
    network, x, layers = make("groups")
    energy = directions(network(x).detach(), softmax_factor(network(x))).energy
    for floor in (0.0, 1.01 * float(energy[:, 1].median())):  # which some reach and some do not
        together = traced(network, x, layers, floor=floor)
        for n in range(len(x)):
            alone = traced(network, x[n : n + 1], layers, floor=floor)
            for a, b in zip(together, alone, strict=True):
                torch.testing.assert_close(a[:, n], b[:, 0], rtol=1e-12, atol=0)


def test_outputs_of_any_shape_are_traced():
    # One output an example, without an axis for it, and a picture of outputs.
    network, x, layers = make("plain")
    for outputs_of in (lambda o: o[:, 0], lambda o: o.view(-1, 2, 1, 2)):

        def factors_of(outputs):
            rank = outputs[0].numel()
            return [Factor(rank, lambda s, outputs=outputs: s.reshape(outputs.shape))]

        def forward(outputs_of=outputs_of, factors_of=factors_of):
            outputs = outputs_of(network(x))
            return outputs, factors_of(outputs)

        ones = torch.ones(5, dtype=torch.float64)
        actual = per_example_traces(forward, WeightTape(network, layers), weights=ones)

        def flat(outputs, outputs_of=outputs_of):
            chosen = outputs_of(outputs)[0].numel()
            rows = torch.eye(4, dtype=torch.float64)[:chosen]
            return [Factor(chosen, lambda s: s @ rows)]

        for a, e in zip(actual, one_at_a_time(network, x, layers, flat), strict=True):
            torch.testing.assert_close(a[0], e)


# --- the leading directions, and random combinations of the others -------------------------------


def jacobian_norm(network, x, layer) -> Tensor:
    """The largest singular value of ∂outputs/∂W of each example, shape (N,)."""
    weight = network.get_submodule(layer).weight

    def outputs(w):
        return torch.func.functional_call(network, {f"{layer}.weight": w}, (x,))

    jacobian = torch.autograd.functional.jacobian(outputs, weight.detach())
    return torch.linalg.matrix_norm(jacobian.flatten(2), 2)


def test_a_floor_leaves_out_no_more_than_its_directions_hold():
    network, x, layers = make("small images")
    weights = torch.tensor([0.1, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    energy = directions(network(x).detach(), softmax_factor(network(x))).energy
    floor = float((weights[:, None] * energy).flatten().sort().values[12])
    left_out = torch.where(weights[:, None] * energy <= floor, energy, 0).sum(1)
    exact = traced(network, x, layers, weights=weights)
    floored = traced(network, x, layers, weights=weights, floor=floor)
    for layer, all_, some in zip(layers, exact, floored, strict=True):
        missing = (all_ - some)[0].sum(1)
        assert (missing >= -1e-12 * all_[0].sum(1)).all()
        assert (missing <= jacobian_norm(network, x, layer).square() * left_out + 1e-12).all()
        assert missing.sum() > 1e-3 * all_.sum()
        assert (weights * left_out).sum() <= floor * energy.numel()


def test_a_floor_above_everything_leaves_nothing_and_one_of_zero_leaves_all():
    network, x, layers = make("plain")
    assert not any(values.any() for values in traced(network, x, layers, floor=1e9))
    for a, b in zip(traced(network, x, layers), traced(network, x, layers, floor=0.0), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("factors_of", [softmax, indefinite])
@pytest.mark.parametrize("leading", [0, 1, 2])
def test_leading_directions_and_probes_of_the_others_are_unbiased(leading, factors_of):
    network, x, layers = make("small images")
    exact = traced(network, x, layers, factors_of)
    samples = traced(network, x, layers, factors_of, leading=leading, seeds=range(400))
    for values, expected in zip(samples, exact, strict=True):
        assert values.shape == (400, *expected.shape[1:])
        mean, error = values.mean(0), values.std(0) / len(values) ** 0.5
        assert ((mean - expected[0]).abs() < 4.5 * error + 1e-9).all()
        whole = values.sum((1, 2))
        allowed = 4.5 * whole.std() / 400**0.5 + 1e-9 * expected.sum().abs()
        assert abs(whole.mean() - expected.sum()) < allowed


def test_the_variance_falls_with_every_leading_direction():
    network, x, layers = make("small images")
    variances = []
    for leading in range(4):
        samples = traced(network, x, layers, leading=leading, seeds=range(100))
        variances.append([float(values.sum(2).var(0).sum()) for values in samples])
    # Of softmax's four directions the last is (1, 1, 1, 1): B maps it to zero.
    assert (np.diff(variances, axis=0) < 0).all()
    assert max(variances[3]) < 1e-20 * max(variances[0])


def test_all_directions_are_what_no_direction_and_all_probes_would_be():
    network, x, layers = make("plain")
    exact = traced(network, x, layers)
    for leading in (3, 4, 9):
        samples = traced(network, x, layers, leading=leading, seeds=[0, 1])
        for values, expected in zip(samples, exact, strict=True):
            torch.testing.assert_close(values, expected.expand_as(values))


def test_a_probe_depends_on_its_seed_alone():
    network, x, layers = make("plain")
    whole = traced(network, x, layers, leading=1, seeds=[3, 4, 5])
    for i, seed in enumerate([3, 4, 5]):
        for a, b in zip(whole, traced(network, x, layers, leading=1, seeds=[seed]), strict=True):
            assert torch.equal(a[i], b[0])


# --- layers that cannot be traced, or have nothing to trace ---------------------------------------


def test_a_layer_that_does_not_run_has_a_trace_of_zero():
    network, x, layers = make("plain")
    network = nn.ModuleDict({"net": network, "idle": nn.Linear(3, 2).double()})
    names = [f"net.{name}" for name in layers]

    def forward():
        outputs = network["net"](x)
        return outputs, softmax(outputs)

    ones = torch.ones(5, dtype=torch.float64)
    for seeds in ((), (1, 2, 3)):
        tape = WeightTape(network, [*names, "idle"])
        *_, idle = per_example_traces(forward, tape, weights=ones, seeds=seeds, leading=0)
        assert torch.equal(idle, torch.zeros(max(1, len(seeds)), 5, 2, dtype=torch.float64))
        tape = WeightTape(network, ["idle"])
        (idle,) = per_example_traces(forward, tape, weights=ones, seeds=seeds, leading=0)
        assert torch.equal(idle, torch.zeros(max(1, len(seeds)), 5, 2, dtype=torch.float64))


def test_a_layer_that_runs_without_gradients_has_a_trace_of_zero():
    class Frozen(nn.Sequential):
        def forward(self, x):
            with torch.no_grad():
                x = self[0](x)
            for layer in list(self)[1:]:
                x = layer(x)
            return x

    network, x, layers = make("plain")
    frozen, last = traced(Frozen(*network), x, layers)
    assert not frozen.any()
    torch.testing.assert_close(last, traced(network, x, layers)[1])


class Changed(nn.Module):
    """Changes what its second layer has read."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        h = self.first(x)
        y = self.second(h)
        h.mul_(2)
        return y.flatten(1)[:, :4] + h.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("first", "second", "shape"),
    [
        (nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3), (2, 6, 6)),
        (nn.Linear(8, 6), nn.Linear(6, 6), (8,)),
        (nn.Linear(8, 6), nn.Linear(6, 6), (4, 8)),
    ],
)
def test_an_input_that_is_changed_in_place_is_refused_by_name(first, second, shape):
    network, x = Changed(first, second), torch.ones(3, *shape)
    with pytest.raises(ValueError, match="second: its input must not be changed in place"):
        traced(network, x, ["first", "second"])


def test_no_hook_stays_behind():
    network, x, layers = make("plain")

    def fail():
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        per_example_traces(fail, WeightTape(network, layers), weights=torch.ones(5))
    traced(network, x, layers)
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 2), True),
        (nn.Conv1d(2, 2, 1), True),
        (nn.Conv2d(2, 2, 1, padding_mode="reflect"), True),
        (nn.Conv3d(2, 2, 1), True),
        (nn.ConvTranspose2d(2, 2, 1), True),
        (nn.Bilinear(2, 2, 2), False),
    ],
)
def test_which_layers_can_be_taken_apart(layer, expected):
    assert supports_examples(layer) == expected


# --- Fisher: the losses themselves as outputs -----------------------------------------------------


@pytest.mark.parametrize("name", ["groups", "few tokens", "tied linear layers"])
def test_with_the_losses_as_outputs_it_is_the_empirical_fisher_matrix(name):
    network, x, layers = make(name)
    y = torch.arange(len(x)) % 3

    def forward():
        losses = F.cross_entropy(network(x), y, reduction="none")
        return losses, [Factor(1, lambda s: s[:, 0], energies=torch.ones_like(losses)[:, None])]

    ones = torch.ones(len(x), dtype=torch.float64)
    weights = [network.get_submodule(layer).weight for layer in layers]
    actual = per_example_traces(forward, WeightTape(network, layers), weights=ones)
    for n in range(len(x)):
        loss = F.cross_entropy(network(x[n : n + 1]), y[n : n + 1])
        for values, g in zip(actual, torch.autograd.grad(loss, weights), strict=True):
            torch.testing.assert_close(values[0, n], g.square().flatten(1).sum(1))


def test_gauss_newton_s_energy_is_the_trace_of_the_loss_s_hessian():
    # With an identity for a network, the traces are those of ∇²ℓ itself.
    network = nn.Linear(1, 4, bias=False).double()
    z = torch.randn(4, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        network.weight.copy_(z)
    with differentiable(network, [network.weight]):
        (values,) = traced(nn.Sequential(network), torch.ones(1, 1).double(), ["0"])
    hessian = dense_hessian(lambda o: F.cross_entropy(o[None], torch.tensor([1])), [z[:, 0]])
    torch.testing.assert_close(values[0, 0], hessian.diagonal())
