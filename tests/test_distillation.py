"""A network that learns from the one it was before quantization."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from oracles import TinyTask
from torch import nn

from hawq.finetune import Recipe, make_optimizer, train_epoch
from hawq.finetune.distillation import distilled_losses, frozen_teacher
from search.fit import fit
from search.tasks.classification import ClassificationTask

DIGITS = ClassificationTask("digits", None, "resnet8", search_size=200)
RECIPE = Recipe(epochs=2, batch_size=16, lr=0.05, distillation=0.5)


@dataclass(frozen=True)
class TaughtTask(TinyTask):
    """The divergence is the squared distance of the outputs, whatever the temperature."""

    def distillation(self, outputs, teacher_outputs, temperature):
        return (outputs - teacher_outputs).square().sum(1)


TASK = TaughtTask(num_examples=64)


def pair():
    """A network, and a teacher that is another one."""
    model, teacher = TASK.model(), TASK.model()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3)
    return model, frozen_teacher(teacher)


def batch(num=6):
    return TASK.batch("train", torch.arange(num))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_classes_divergence_is_torch_s(temperature):
    generator = torch.Generator().manual_seed(0)
    outputs, wanted = (torch.randn(7, 10, generator=generator) for _ in range(2))
    found = DIGITS.distillation(outputs, wanted, temperature)
    teacher, student = ((x / temperature).softmax(1) for x in (wanted, outputs))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(teacher), torch.distributions.Categorical(student)
    )
    torch.testing.assert_close(found, expected)
    assert (found > 0).all()
    torch.testing.assert_close(DIGITS.distillation(outputs, outputs, temperature), torch.zeros(7))


def test_the_loss_is_weighed_as_hinton_weighs_it():
    model, teacher = pair()
    found = distilled_losses(model, teacher, TASK, batch(), weight=0.3, temperature=2.0)
    images, labels = batch()
    outputs, wanted = model(images), teacher(images)
    own = F.cross_entropy(outputs, labels, reduction="none")
    expected = 0.7 * own + 0.3 * 4 * (outputs - wanted).square().sum(1)
    torch.testing.assert_close(found, expected)


def test_the_gradient_does_not_fall_with_the_temperature():
    torch.manual_seed(0)
    outputs = torch.randn(50, 10, requires_grad=True)
    wanted = torch.randn(50, 10)
    sizes = []
    for temperature in (8.0, 32.0):
        loss = temperature**2 * DIGITS.distillation(outputs, wanted, temperature).mean()
        sizes.append(torch.autograd.grad(loss, outputs)[0].norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_only_the_network_learns():
    model, teacher = pair()
    teacher_before = {k: v.clone() for k, v in teacher.state_dict().items()}
    before = model.linear.weight.detach().clone()
    train_epoch(
        model, make_optimizer(model, RECIPE), TASK, RECIPE, epoch=0, seed=0, teacher=teacher
    )
    assert not torch.equal(model.linear.weight, before)
    assert all(torch.equal(v, teacher_before[k]) for k, v in teacher.state_dict().items())
    assert not model._forward_hooks
    assert not teacher._forward_hooks


@dataclass(frozen=True)
class SeenTask(TaughtTask):
    """Outputs are the images: the teacher must have seen the same augmented ones."""

    def distillation(self, outputs, teacher_outputs, temperature):
        assert torch.equal(outputs.detach(), teacher_outputs)
        return super().distillation(outputs, teacher_outputs, temperature)


class Echo(nn.Module):
    """Returns what it sees, and has something to learn."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x.flatten(1)[:, :4] + self.bias


def test_the_teacher_sees_the_same_augmented_batch():
    model = Echo()
    recipe = replace(RECIPE, lr=1e-30)
    loss = train_epoch(
        model,
        make_optimizer(model, recipe),
        SeenTask(num_examples=64),
        recipe,
        epoch=0,
        seed=0,
        teacher=frozen_teacher(Echo()),
    )
    assert loss > 0


def test_imitation_alone_brings_the_outputs_together():
    model, teacher = pair()
    recipe = replace(RECIPE, distillation=1.0, lr=0.005, epochs=4)
    optimizer = make_optimizer(model, recipe)
    losses = [
        train_epoch(model, optimizer, TASK, recipe, epoch=e, seed=0, teacher=teacher)
        for e in range(4)
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_a_task_without_a_divergence_is_refused_by_name_before_any_training(tmp_path):
    message = "distillation must be 0 for TinyTask, which has no method distillation"
    with pytest.raises(ValueError, match=message):
        fit(
            TASK.model(),
            TinyTask(num_examples=64),
            RECIPE,
            folder=tmp_path / "run",
            seed=0,
            teacher=pair()[1],
        )
    assert not (tmp_path / "run").exists()


def test_distillation_needs_a_teacher():
    model = TASK.model()
    with pytest.raises(ValueError, match=r"distillation must be 0 without a teacher, got 0.5"):
        train_epoch(model, make_optimizer(model, RECIPE), TASK, RECIPE, epoch=0, seed=0)


class Twice(TaughtTask):
    def losses(self, model, batch):
        return super().losses(model, batch) + super().losses(model, batch)


class Never(TaughtTask):
    def losses(self, model, batch):
        return F.cross_entropy(model.linear(torch.ones(6, 12)), batch[1], reduction="none")


class Tupled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x), None


class First(TaughtTask):
    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0])[0], batch[1], reduction="none")


@pytest.mark.parametrize(
    ("task", "wrap", "got"),
    [
        (Twice(), lambda m: m, "Tensor, Tensor"),
        (Never(), lambda m: m, "no call"),
        (First(), Tupled, "tuple"),
    ],
)
def test_a_task_that_calls_its_network_otherwise_is_refused(task, wrap, got):
    model, teacher = (wrap(network) for network in pair())
    message = rf"{type(task).__name__}.losses must call its network once, for one tensor.*got {got}"
    with pytest.raises(ValueError, match=message):
        distilled_losses(model, teacher, task, batch(), weight=0.5, temperature=1.0)
    assert not model._forward_hooks


class Summed(TaughtTask):
    def distillation(self, outputs, teacher_outputs, temperature):
        return (outputs - teacher_outputs).square().sum()


def test_a_divergence_that_is_not_of_examples_is_refused():
    with pytest.raises(ValueError, match=r"must return shape \(6,\), a value an example, got \(\)"):
        distilled_losses(*pair(), Summed(), batch(), weight=0.5, temperature=1.0)
