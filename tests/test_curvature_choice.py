"""Which estimator is chosen, and the reason that is given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import LAYERS, NetTask, TinyTask
from torch import nn
from torch.autograd.function import once_differentiable

from hawq.curvature import NonFiniteTraceError, choose_estimator
from hawq.curvature.linearity import nonlinearities
from hawq.task import Factor

SUBJECTS = ["weights", "activations"]


def choose(task, layers=LAYERS, subject="weights"):
    few = task.batch("train", torch.arange(4))
    return choose_estimator(task, task.model(), layers, few, subject=subject)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_relu_network_in_eval_mode_gets_gauss_newton(subject):
    choice = choose(TinyTask("relu"), subject=subject)
    assert choice.estimator == "gauss_newton"
    assert choice.reason.startswith("the Hessian's blocks are Gauss–Newton's")
    assert f"piecewise linear in each {subject.removesuffix('s')}," in choice.reason


NONLINEAR = {
    "silu": "Silu",
    "gated": "Mul of two tensors that depend on the same weight",
    "normalized": "Div by a tensor that depends on a weight",
    "live_bn": "NativeBatchNorm in training mode",
}


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("network", NONLINEAR)
def test_what_is_not_piecewise_linear_gets_gauss_newton_corrected_and_says_why(network, subject):
    choice = choose(TinyTask(network), subject=subject)
    assert choice.estimator == "corrected_gauss_newton"
    assert f"not piecewise linear in every {subject.removesuffix('s')}" in choice.reason
    assert NONLINEAR[network] in choice.reason


def test_a_layer_that_runs_on_its_own_output_is_curved_in_its_weight_only():
    # Its activations are two tensors, and the network is piecewise linear in each.
    weights = choose(TinyTask("shared"))
    assert weights.estimator == "corrected_gauss_newton"
    assert "Convolution of two tensors that depend on the same weight" in weights.reason
    assert choose(TinyTask("shared"), subject="activations").estimator == "gauss_newton"


class Bare(nn.Module):
    """A transposed convolution whose weight no layer of torch's owns."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, 3, 3) / 3)

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight)


class Widening(nn.Module):
    """A smooth network with a layer that cannot be taken apart by example."""

    def __init__(self):
        super().__init__()
        self.wide, self.head = Bare(), nn.Linear(3 * 49, 4)

    def forward(self, x):
        return self.head(F.silu(self.wide(x)).flatten(1))


def test_a_smooth_network_that_cannot_be_taken_apart_gets_hutchinson():
    task = NetTask(make=Widening)
    choice = choose(task, ("wide", "head"))
    assert choice.estimator == "hutchinson"
    assert "Silu" in choice.reason
    assert choose(task, ("head",)).estimator == "gauss_newton"
    assert choose(task, ("wide", "head"), "activations").estimator == "corrected_gauss_newton"


class Halved(TinyTask):
    """Its loss runs the network twice."""

    def losses(self, model, batch):
        return sum(
            F.cross_entropy(model(batch[0]), batch[1], reduction="none") / 2 for _ in range(2)
        )


def test_a_smooth_network_that_runs_twice_gets_hutchinson():
    choice = choose(Halved("silu"))
    assert choice.estimator == "hutchinson"
    assert "Silu" in choice.reason


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_nonlinearity_before_all_that_is_traced_does_not_matter(subject):
    # Of the SiLU network's last layer alone, the outputs are linear. Activations are looked at
    # all together, from the network's input on.
    expected = {"weights": "gauss_newton", "activations": "corrected_gauss_newton"}[subject]
    assert choose(TinyTask("silu"), ("linear",), subject).estimator == expected


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_task_without_factors_gets_hutchinson(subject):
    choice = choose(TinyTask(factored=False), subject=subject)
    assert choice.estimator == "hutchinson"
    assert "no factor" in choice.reason


class Once(nn.Module):
    """An operator that must not be differentiated twice, between two layers."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(27, 4)

    def forward(self, x):
        return self.head(OnceDoubled.apply(self.conv(x)).flatten(1))


class OnceDoubled(torch.autograd.Function):
    """2x, from a kernel that says it has no second derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize("subject", SUBJECTS)
def test_an_operator_without_second_derivative_gets_gauss_newton_where_there_are_factors(subject):
    choice = choose(NetTask(make=Once), ("conv", "head"), subject)
    assert choice.estimator == "gauss_newton"
    assert "OnceDoubled is marked once_differentiable" in choice.reason


@pytest.mark.parametrize("subject", SUBJECTS)
def test_an_operator_without_second_derivative_gets_differences_where_there_are_none(subject):
    choice = choose(NetTask(make=Once, factored=False), ("conv", "head"), subject)
    assert choice.estimator == "finite_difference"
    assert "OnceDoubled is marked once_differentiable" in choice.reason


class WronglyFactored(TinyTask):
    """Its factor is of half the loss."""

    def curvature(self, model, batch):
        outputs, (factor,) = super().curvature(model, batch)
        return outputs, [Factor(factor.rank, lambda s: factor.apply(s) / 2**0.5)]


@pytest.mark.parametrize("network", ["relu", "silu"])
@pytest.mark.parametrize(("subject", "where"), [("weights", "conv1"), ("activations", "conv1#0")])
def test_a_factor_that_disagrees_with_a_hessian_vector_product_gets_hutchinson(
    network, subject, where
):
    choice = choose(WronglyFactored(network), subject=subject)
    assert choice.estimator == "hutchinson"
    assert f"a Hessian-vector product disagrees with Gauss–Newton in {where}" in choice.reason


def test_layers_that_nothing_uses_do_not_disturb_the_choice():
    assert choose(TinyTask("lazy"), ("unused",)).estimator == "gauss_newton"
    for subject in SUBJECTS:
        choice = choose(TinyTask("lazy"), ("unused", "used"), subject)
        assert choice.estimator == "gauss_newton"


@pytest.mark.parametrize("factor", [3, 30, 300, 3000])
def test_a_confident_network_still_gets_gauss_newton(factor):
    # Where p is 1 but for the last digits, so are the two products that are compared.
    task = TinyTask("lazy")
    model = task.model()
    with torch.no_grad():
        model.used.weight.mul_(factor)
    choice = choose_estimator(task, model, ("used",), task.batch("train", torch.arange(4)))
    assert choice.estimator == "gauss_newton"


def test_a_network_that_returns_nan_is_refused():
    task = TinyTask()
    model = task.model()
    with torch.no_grad():
        model.conv1.weight[0] = float("nan")
    with pytest.raises(NonFiniteTraceError, match="network's output must be finite"):
        choose_estimator(task, model, LAYERS, task.batch("train", torch.arange(4)))


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("network", ["relu", "silu"])
def test_choosing_leaves_the_network_alone(network, subject):
    task = TinyTask(network)
    model = task.model().train()
    model.conv1.weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    few = task.batch("train", torch.arange(4))
    choose_estimator(task, model, LAYERS, few, subject=subject)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 6
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


# --- operators ------------------------------------------------------------------------------------

PIECEWISE_LINEAR = {
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "in-place relu": lambda h: F.relu_(h + 0),
    "hardsigmoid": F.hardsigmoid,
    "prelu": lambda h: F.prelu(h, torch.full((4,), 0.2)),
    "average pooling": lambda h: F.avg_pool2d(h, 2),
    "global pooling": lambda h: F.adaptive_avg_pool2d(h, 1),
    "max pooling": lambda h: F.max_pool2d(h, 2),
    "concatenation": lambda h: torch.cat([h, -h], 1),
    "chunks": lambda h: torch.maximum(*h.chunk(2, 1)),
    "padding": lambda h: F.pad(h[:, :, ::2, ::2], [0, 0, 0, 0, 1, 1]),
    "upsampling": lambda h: F.interpolate(h, scale_factor=2),
    "channel shuffle": lambda h: F.channel_shuffle(h, 2),
    "division by a constant": lambda h: h / torch.tensor([3.0]),
    "frozen batch-norm": lambda h: F.batch_norm(h, torch.zeros(4), torch.ones(4)),
    "dropout in eval mode": lambda h: F.dropout(h, training=False),
}
CURVED = {
    "SiLU": F.silu,
    "GELU": F.gelu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "softmax": lambda h: h.softmax(1),
    "a square": lambda h: h.square(),
    "a product with itself": lambda h: h * h.relu(),
    "attention": lambda h: h.flatten(2) @ h.flatten(2).mT,
    "layer norm": lambda h: F.layer_norm(h, h.shape[1:]),
    "group norm": lambda h: F.group_norm(h, 2),
    "instance norm": F.instance_norm,
    "a norm": lambda h: h / h.norm(),
}


def graph(operation):
    weight = nn.Conv2d(2, 4, 3).weight
    x = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    return operation(F.conv2d(x, weight)), [weight]


@pytest.mark.parametrize("name", PIECEWISE_LINEAR)
def test_operators_that_are_piecewise_linear_pass(name):
    assert nonlinearities(*graph(PIECEWISE_LINEAR[name])) == []


@pytest.mark.parametrize("name", CURVED)
def test_operators_that_are_not_are_named(name):
    assert nonlinearities(*graph(CURVED[name]))


def test_a_product_of_two_different_weights_passes():
    # Curved in both together, linear in each alone: the diagonal blocks are Gauss–Newton's.
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.ones(2, 3)
    assert nonlinearities(a(x) * b(x), [a.weight, b.weight]) == []
    assert nonlinearities(a(x) * a(x + 1), [a.weight]) != []


def test_a_custom_function_is_not_trusted_for_its_name():
    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            return grad

    assert nonlinearities(*graph(Relu.apply)) == ["ReluBackward"]
