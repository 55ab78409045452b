"""The exact Gauss–Newton traces against gradients of one example and one column at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import TinyTask
from torch import nn

from hawq.curvature import draw_examples, output_curvature, supports_examples
from hawq.curvature import exact as exact_module
from hawq.curvature.estimate import UnitSums, summarize
from hawq.curvature.exact import exact_gauss_newton
from hawq.curvature.network import differentiable
from hawq.factors import softmax_factor
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


def image_net(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4))


CASES = {
    "plain": (image_net(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU()), (2, 6, 6)),
    "stride": (image_net(nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.ReLU()), (2, 7, 6)),
    "dilation": (image_net(nn.Conv2d(2, 3, 3, dilation=2), nn.ReLU()), (2, 8, 8)),
    "groups": (image_net(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU()), (4, 5, 5)),
    "depthwise": (image_net(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU()), (4, 5, 5)),
    "same": (image_net(nn.Conv2d(2, 3, (2, 4), padding="same"), nn.ReLU()), (2, 5, 5)),
    "in place": (image_net(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True)), (2, 5, 5)),
    "small images": (image_net(nn.Conv2d(6, 3, 3), nn.ReLU()), (6, 4, 4)),
    "1-D": (image_net(nn.Conv1d(3, 4, 3, stride=2, padding=1), nn.ReLU()), (3, 9)),
    "tokens": (
        nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)),
        (3, 5),
    ),
    "twice": (Twice(), (2, 4, 4)),
}


def make(name):
    torch.manual_seed(0)
    network, shape = CASES[name]
    x = torch.randn(5, *shape, dtype=torch.float64)
    network = network.double().eval()
    network(x)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    layers = {n: m for n, m in network.named_modules() if hasattr(m, "weight")}
    return network, x, layers


def one_at_a_time(network, x, layers, factors_of):
    """Σ_c sign·‖row o of the gradient of example n, column c‖², by plain autograd."""
    weights = [layer.weight for layer in layers.values()]
    found = [torch.zeros(len(x), len(w), dtype=torch.float64) for w in weights]
    for n in range(len(x)):
        outputs = network(x[n : n + 1])
        for factor in factors_of(outputs):
            for c in range(factor.rank):
                s = torch.eye(factor.rank, dtype=torch.float64)[c : c + 1]
                gradients = torch.autograd.grad(
                    outputs, weights, factor.apply(s), retain_graph=True
                )
                for rows, g in zip(found, gradients, strict=True):
                    rows[n] += factor.sign * g.square().flatten(1).sum(1)
    return found


def softmax(outputs):
    return [softmax_factor(outputs)]


def indefinite(outputs):
    """∇²ℓ = diag(1, …, 1) − ½·diag(1, 4, 9, …), which has both signs."""
    roots = torch.arange(1, outputs.shape[1] + 1, dtype=outputs.dtype) / 2**0.5
    rank = outputs.shape[1]
    return [Factor(rank, lambda s: s), Factor(rank, lambda s: s * roots, sign=-1.0)]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("factors_of", [softmax, indefinite])
@pytest.mark.parametrize("name", CASES)
def test_every_example_and_channel_agrees_with_plain_gradients(name, factors_of):
    network, x, layers = make(name)
    with differentiable(network, [layer.weight for layer in layers.values()]):
        expected = one_at_a_time(network, x, layers, factors_of)

        def forward():
            outputs = network(x)
            return outputs, factors_of(outputs)

        actual = exact_gauss_newton(forward, layers)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_columns_one_by_one_give_the_same_as_all_at_once(monkeypatch):
    network, x, layers = make("plain")

    def forward():
        outputs = network(x)
        return outputs, softmax(outputs)

    together = exact_gauss_newton(forward, layers)
    monkeypatch.setattr(exact_module, "_COLUMN_BYTES", 1)
    for a, b in zip(together, exact_gauss_newton(forward, layers), strict=True):
        torch.testing.assert_close(a, b)


def test_a_layer_that_does_not_run_has_a_trace_of_zero():
    network, x, layers = make("plain")
    layers = {**layers, "idle": nn.Linear(3, 2).double()}
    *_, idle = exact_gauss_newton(lambda: (network(x), softmax(network(x))), layers)
    assert torch.equal(idle, torch.zeros(5, 2, dtype=torch.float64))


def test_no_hook_stays_behind():
    network, x, layers = make("plain")

    def fail():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        exact_gauss_newton(fail, layers)
    exact_gauss_newton(lambda: (network(x), softmax(network(x))), layers)
    assert not any(layer._forward_hooks for layer in layers.values())


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(2, 2), True),
        (nn.Conv1d(2, 2, 1), True),
        (nn.Conv2d(2, 2, 1, padding_mode="reflect"), False),
        (nn.Conv3d(2, 2, 1), False),
    ],
)
def test_which_layers_can_be_taken_apart(layer, expected):
    assert supports_examples(layer) == expected


def test_an_exact_estimate_has_no_probe_error_and_the_error_of_a_mean():
    values = np.random.default_rng(0).lognormal(size=(60, 3))
    units = [
        UnitSums.exact(i, part, np.ones(len(part)))
        for i, part in enumerate(np.array_split(values, 7))
    ]
    estimate = summarize(units, ["a", "b", "c"])
    np.testing.assert_allclose(estimate.trace, values.mean(0))
    np.testing.assert_allclose(estimate.data_error, values.std(0, ddof=1) / 60**0.5)
    assert not estimate.probe_error.any()
    assert (estimate.num_probes, estimate.num_examples) == (0, 60)


# importance


def heavy_tailed(num, seed=0):
    """Traces of which a few examples hold most, and a rough guess of them, as of the outputs."""
    rng = np.random.default_rng(seed)
    guess = rng.lognormal(sigma=2.5, size=num)
    return guess * rng.lognormal(sigma=0.5, size=num), torch.from_numpy(guess)


def estimate_by_importance(traces, guess, num, seed, pool_variance=0.0):
    draw = draw_examples(guess, num, seed)
    values = traces[list(draw.examples)][:, None]
    units = [UnitSums.exact(0, values, np.array(draw.weights))]
    return summarize(units, ["a"], pool_variance)


def test_drawing_by_importance_is_unbiased_and_its_error_is_honest():
    traces, guess = heavy_tailed(4000)
    found = [estimate_by_importance(traces, guess, 200, seed) for seed in range(300)]
    deviations = np.array([f.trace[0] - traces.mean() for f in found])
    stated = np.sqrt(np.mean([f.data_error[0] ** 2 for f in found]))
    assert abs(deviations.mean()) < 4 * deviations.std() / len(found) ** 0.5
    # Systematic draws do better than the independent ones that the error is stated for.
    assert 0.3 * stated < deviations.std() < 1.1 * stated
    uniform = traces.std() / 200**0.5
    assert stated < uniform / 3


def test_the_pools_own_choice_is_in_the_error():
    everyone, guess = heavy_tailed(60_000)
    rng = np.random.default_rng(1)
    deviations, stated = [], []
    for seed in range(200):
        pool = rng.choice(len(everyone), 1000, replace=False)
        found = estimate_by_importance(
            everyone[pool], guess[pool], 400, seed, 1 / 1000 - 1 / len(everyone)
        )
        deviations.append(found.trace[0] - everyone.mean())
        stated.append(found.data_error[0])
    ratio = np.std(deviations) / np.sqrt(np.mean(np.square(stated)))
    assert 0.7 < ratio < 1.3


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.integers(1, 60), st.integers(0, 99))
def test_a_draw_is_ascending_and_no_weight_exceeds_ten(curvature, num, seed):
    draw = draw_examples(torch.tensor(curvature, dtype=torch.float64), num, seed)
    assert len(draw.examples) == len(draw.weights) == num
    assert list(draw.examples) == sorted(draw.examples)
    assert draw.examples[0] >= 0
    assert draw.examples[-1] < len(curvature)
    assert max(draw.weights) <= 10 * (1 + 1e-9)
    assert draw == draw_examples(torch.tensor(curvature, dtype=torch.float64), num, seed)


@pytest.mark.parametrize("curvature", [[1.0, -1.0], [float("nan")], [float("inf")]])
def test_curvature_that_is_no_share_is_refused(curvature):
    with pytest.raises(ValueError, match="finite and not negative"):
        draw_examples(torch.tensor(curvature), 3, 0)


def test_the_outputs_curvature_of_softmax_is_one_minus_the_squared_norm():
    task = TinyTask("relu")
    batch = task.batch("train", torch.arange(6))
    model = task.model().eval()
    p = task.curvature(model, batch)[0].softmax(1).double()
    expected = 1 - p.square().sum(1)
    torch.testing.assert_close(output_curvature(task, model, batch), expected, rtol=1e-5, atol=1e-7)
