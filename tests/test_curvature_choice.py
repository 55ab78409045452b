"""Which estimator is chosen, and the reason that is given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import LAYERS, TinyTask
from torch import nn

from hawq.curvature import choose_estimator
from hawq.curvature.linearity import nonlinearities
from hawq.task import Factor


def choose(task, layers=LAYERS, rtol=0.05):
    few = task.batch("train", torch.arange(4))
    return choose_estimator(task, task.model(), layers, few, rtol=rtol)


def test_a_relu_network_in_eval_mode_gets_gauss_newton_without_probes():
    choice = choose(TinyTask("relu"))
    assert choice.estimator == "exact_gauss_newton"
    assert choice.reason.startswith("the Hessian's blocks are Gauss–Newton's")


def test_a_loose_error_is_cheaper_by_a_few_probes_than_by_every_column():
    choice = choose(TinyTask("relu"), rtol=0.5)
    assert choice.estimator == "gauss_newton"
    assert "4 columns of outputs against about 1 probes" in choice.reason


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ("silu", "Silu"),
        ("gated", "Mul of two tensors that depend on the same weight"),
        ("shared", "Convolution of two tensors that depend on the same weight"),
        ("live_bn", "NativeBatchNorm in training mode"),
        ("normalized", "Div by a tensor that depends on a weight"),
    ],
)
def test_what_is_not_piecewise_linear_gets_hutchinson_and_says_why(network, reason):
    choice = choose(TinyTask(network))
    assert choice.estimator == "hutchinson"
    assert reason in choice.reason


def test_a_nonlinearity_before_all_traced_weights_does_not_matter():
    # Of the SiLU network's last layer alone, the outputs are linear.
    assert choose(TinyTask("silu"), ("linear",)).estimator == "exact_gauss_newton"


def test_a_task_without_factors_gets_hutchinson():
    choice = choose(TinyTask(factored=False))
    assert choice.estimator == "hutchinson"
    assert "no factor" in choice.reason


class WronglyFactored(TinyTask):
    """Its factor is of half the loss."""

    def curvature(self, model, batch):
        outputs, (factor,) = super().curvature(model, batch)
        return outputs, [Factor(factor.rank, lambda s: factor.apply(s) / 2**0.5)]


def test_a_factor_that_disagrees_with_a_hessian_vector_product_gets_hutchinson():
    choice = choose(WronglyFactored())
    assert choice.estimator == "hutchinson"
    assert "a Hessian-vector product disagrees with Gauss–Newton in conv1" in choice.reason


def test_layers_that_nothing_uses_do_not_disturb_the_choice():
    assert choose(TinyTask("lazy"), ("unused", "used")).estimator == "exact_gauss_newton"
    assert choose(TinyTask("lazy"), ("unused",)).estimator == "exact_gauss_newton"


def test_a_confident_network_still_gets_gauss_newton():
    task = TinyTask("lazy")
    model = task.model()
    with torch.no_grad():
        model.used.weight.mul_(30)
    batch = task.batch("train", torch.arange(4))
    choice = choose_estimator(task, model, ("used",), batch, rtol=0.05)
    assert choice.estimator == "exact_gauss_newton"


def test_choosing_leaves_the_network_alone():
    task = TinyTask("relu")
    model = task.model().train()
    model.conv1.weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    choose_estimator(task, model, LAYERS, task.batch("train", torch.arange(4)), rtol=0.05)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 6
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


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
