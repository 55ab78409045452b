"""Recipes: rates, averages of weights, and trainings that go on with the same bits."""

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import LAYERS, TinyTask
from torch import nn

from hawq.finetune import (
    Recipe,
    WeightAverage,
    attach,
    calibrate,
    evaluate,
    fixed_activations,
    reestimate,
)
from hawq.finetune.batch_norm import statistics_batches
from hawq.reads import read_network
from search.fit import fit, refuse_impossible


@dataclass(frozen=True)
class TaughtTask(TinyTask):
    """The same task, whose network may learn from another."""

    def distillation(self, outputs, teacher_outputs, temperature):
        student = F.log_softmax(outputs / temperature, 1)
        teacher = F.softmax(teacher_outputs / temperature, 1)
        return F.kl_div(student, teacher, reduction="none").sum(1)


TASK = TaughtTask(num_examples=64)
RECIPE = Recipe(epochs=4, batch_size=16, lr=0.05)


def quantized():
    """A network with two-bit weights and four-bit activations, ready to be trained."""
    model = TASK.model()
    images = TASK.batch("train", torch.arange(8))[0]
    reads = read_network(model, images)
    bits = {f"w:{name}": 2 for name in LAYERS} | fixed_activations(reads, 4, 8)
    attach(model, bits, images)
    calibrate(model, [images])
    return model


def teacher():
    return TASK.model().eval().requires_grad_(False)


# --- rates --------------------------------------------------------------------------------------


def test_the_rate_of_steps_falls_at_every_milestone():
    recipe = replace(
        RECIPE, lr=2.0, warmup=0.2, schedule="step", milestones=(0.5, 0.8), step_factor=0.25
    )
    assert [recipe.rate(p) for p in (0.0, 0.1, 0.2, 0.49)] == pytest.approx([0, 1, 2, 2])
    assert [recipe.rate(p) for p in (0.5, 0.79, 0.8, 1.0)] == [0.5, 0.5, 0.125, 0.125]


@given(
    progress=st.floats(0, 1),
    warmup=st.floats(0, 0.4),
    milestones=st.lists(st.floats(0.45, 0.99), min_size=1, max_size=4, unique=True).map(sorted),
)
def test_no_schedule_leaves_the_range_up_to_its_peak_or_rises_after_the_warmup(
    progress, warmup, milestones
):
    for schedule in ("cosine", "step"):
        recipe = replace(
            RECIPE, warmup=warmup, schedule=schedule, milestones=tuple(milestones), lr=0.3
        )
        assert 0 <= recipe.rate(progress) <= 0.3
        if progress >= warmup:
            assert recipe.rate(min(1.0, progress + 0.1)) <= recipe.rate(progress)


def test_the_cosine_is_the_one_that_it_always_was():
    recipe = replace(RECIPE, lr=0.02, warmup=0.05)
    for progress in (0.0, 0.01, 0.05, 0.3, 0.77, 1.0):
        expected = (
            0.02 * progress / 0.05
            if progress < 0.05
            else 0.02 * (1 + math.cos(math.pi * (progress - 0.05) / (1 - 0.05))) / 2
        )
        assert recipe.rate(progress) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema": 1.0}, "ema must be between 0 and 1, or null, got 1.0"),
        ({"distillation": 1.5}, "distillation must be within 0..1, got 1.5"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"reestimate_batch_norm": -1}, "reestimate_batch_norm must be 0 or more batches, got -1"),
        ({"schedule": "poly"}, "schedule must be 'cosine' or 'step', got 'poly'"),
        ({"schedule": "step", "milestones": (0.8, 0.5)}, r"milestones must .* got \[0.8, 0.5\]"),
        ({"schedule": "step", "milestones": ()}, r"milestones must .* got \[\]"),
        ({"schedule": "step", "milestones": (0.01,)}, r"from warmup \(0.05\) .* got \[0.01\]"),
        ({"lr": math.nan}, "lr must be above 0, got nan"),
        ({"examples_per_epoch": 8}, r"examples_per_epoch must be at least batch_size \(16\), got"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **changes)


def test_a_split_smaller_than_a_batch_is_refused_before_any_training(tmp_path):
    task = TinyTask(num_examples=15)
    message = "batch_size must be at most 15, the examples of the training split, got 16"
    with pytest.raises(ValueError, match=message):
        fit(task.model(), task, RECIPE, folder=tmp_path / "run", seed=0)
    assert not (tmp_path / "run").exists()


class Volume(nn.Module):
    """Convolutions of one, two and three dimensions."""

    def __init__(self):
        super().__init__()
        self.plane, self.volume = nn.Conv2d(2, 2, 3), nn.Conv3d(2, 2, (1, 3, 3))
        self.line, self.head = nn.Conv1d(2, 2, 3, padding=1), nn.Linear(2, 4)

    def forward(self, x):
        x = self.volume(self.plane(x)[:, :, None]).relu().flatten(2)
        return self.head(self.line(x).mean(2))


def test_convolutions_of_every_dimension_are_trained(tmp_path):
    class Volumes(TinyTask):
        def model(self):
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return Volume()

    task = Volumes(num_examples=32)
    model = task.model()
    fit(model, task, RECIPE, folder=tmp_path, seed=0)
    assert not any(map(torch.equal, model.parameters(), task.model().parameters()))


# --- averages -----------------------------------------------------------------------------------


@given(decay=st.floats(0.01, 0.999), values=st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_the_average_has_its_closed_form(decay, values):
    model = nn.Linear(1, 1, bias=False).double()
    average = WeightAverage(model, decay)
    for value in values:
        model.weight.data.fill_(value)
        average.update(model)
    weights = [(1 - decay) * decay ** (len(values) - i) for i in range(1, len(values) + 1)]
    expected = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
    average.copy_to(model)
    assert model.weight.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_an_average_is_of_weights_biases_scales_and_statistics():
    model = quantized()
    model.register_buffer("point", torch.tensor(3.0))
    average = WeightAverage(model, 0.5)
    kinds = ("original", "scale", "weight", "bias", "running_mean", "running_var")
    assert all(any(name.endswith(kind) for name in model.state_dict()) for kind in kinds)
    first = copy.deepcopy(model.state_dict())
    average.update(model)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1) if value.is_floating_point() else value.logical_not_()
    second = copy.deepcopy(model.state_dict())
    average.update(model)
    with average.applied(model):
        for name, value in model.state_dict().items():
            if name.endswith(kinds):  # weights 1/3 and 2/3
                torch.testing.assert_close(value, (first[name] + 2 * second[name]) / 3)
            else:
                assert torch.equal(value, second[name])
    assert all(torch.equal(value, second[name]) for name, value in model.state_dict().items())


def test_before_the_first_step_the_average_is_the_network():
    model = quantized()
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        model.linear.bias.add_(1)
    bias = model.linear.bias.detach().clone()
    with average.applied(model):
        assert torch.equal(model.linear.bias, bias)


def test_a_network_with_other_tensors_has_another_average():
    average = WeightAverage(nn.Linear(2, 2), 0.9)
    with pytest.raises(ValueError, match=r"must keep its tensors while averaged, got \['bias'\]"):
        average.update(nn.Linear(2, 2, bias=False))


def test_the_average_is_what_is_scored_and_kept(tmp_path):
    recipe = replace(RECIPE, ema=0.9, epochs=3)
    plain, averaged = quantized(), quantized()
    seen = []

    def look(record):
        score = float(evaluate(averaged, TASK, "search").mean())
        seen.append((record.search_score, score))

    fit(plain, TASK, replace(recipe, ema=None), folder=tmp_path / "plain", seed=0)
    fit(averaged, TASK, recipe, folder=tmp_path / "ema", seed=0, on_epoch=look)
    assert all(recorded == score for recorded, score in seen)
    assert len(seen) == 4
    last = torch.load(tmp_path / "ema" / "checkpoint.pt", weights_only=True)
    assert all(torch.equal(v, last["model"][k]) for k, v in averaged.state_dict().items())
    # The training itself is not touched by the average that is drawn from it.
    optimizers = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
        for name in ("plain", "ema")
    ]
    for i, state in optimizers[0].items():
        assert torch.equal(state["momentum_buffer"], optimizers[1][i]["momentum_buffer"])
    assert not torch.equal(plain.linear.bias, averaged.linear.bias)


# --- going on with the same bits ----------------------------------------------------------------

FEATURES = {
    "plain": {},
    "step": {"schedule": "step", "milestones": (0.3, 0.6)},
    "ema": {"ema": 0.9},
    "distillation": {"distillation": 0.7, "temperature": 2.0},
    "reestimate": {"reestimate_batch_norm": 2},
    "frozen": {"freeze_batch_norm": 0.0},
    "all": {"ema": 0.8, "distillation": 0.5, "reestimate_batch_norm": 3, "schedule": "step"},
}


class KilledError(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("name", FEATURES)
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, name):
    recipe = replace(RECIPE, epochs=3, **FEATURES[name])
    whole, again = quantized(), quantized()
    expected = fit(whole, TASK, recipe, folder=tmp_path / "whole", seed=1, teacher=teacher())

    def die(record):
        raise KilledError

    for _ in range(2):  # after the first record, and after the first epoch
        with pytest.raises(KilledError):
            fit(
                quantized(),
                TASK,
                recipe,
                folder=tmp_path / "killed",
                seed=1,
                teacher=teacher(),
                on_epoch=die,
            )
    records = fit(again, TASK, recipe, folder=tmp_path / "killed", seed=1, teacher=teacher())
    plain = [(r.epoch, r.loss, r.search_score) for r in records]
    assert plain == [(r.epoch, r.loss, r.search_score) for r in expected]
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    # Once it is over nothing is done again, and the network is the same.
    third = quantized()
    fit(third, TASK, recipe, folder=tmp_path / "killed", seed=1, on_epoch=die)
    assert all(torch.equal(value, state[key]) for key, value in third.state_dict().items())


# --- batch-norm at the end of a training --------------------------------------------------------


def test_statistics_are_estimated_again_at_the_end_and_not_before(tmp_path):
    frozen = replace(RECIPE, epochs=2, freeze_batch_norm=0.0)
    plain, again = quantized(), quantized()
    before = plain.bn1.running_mean.clone()
    fit(plain, TASK, frozen, folder=tmp_path / "frozen", seed=0)
    assert torch.equal(plain.bn1.running_mean, before)
    means = []
    recipe = replace(frozen, reestimate_batch_norm=2)
    fit(
        again,
        TASK,
        recipe,
        folder=tmp_path / "again",
        seed=0,
        on_epoch=lambda _: means.append(again.bn1.running_mean.clone()),
    )
    assert [torch.equal(mean, before) for mean in means] == [True, True, False]
    assert torch.equal(again.conv1.weight, plain.conv1.weight)
    reestimate(plain, statistics_batches(TASK, 2, 16, 0, "cpu"))
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(again.bn1, name), getattr(plain.bn1, name))


def test_late_freezing_moves_statistics_before_it_and_never_after(tmp_path):
    model = quantized()
    means = []
    recipe = replace(RECIPE, epochs=4, freeze_batch_norm=0.5)
    first = model.bn1.running_mean.clone()

    def look(_):
        means.append(model.bn1.running_mean.clone())

    fit(model, TASK, recipe, folder=tmp_path, seed=0, on_epoch=look)
    assert torch.equal(means[0], first)
    assert not torch.equal(means[1], means[0])
    assert not torch.equal(means[2], means[1])
    assert torch.equal(means[3], means[2])
    assert torch.equal(means[4], means[2])


def test_a_network_without_batch_norm_has_nothing_to_estimate_again():
    task = TinyTask("dropout", num_examples=64)
    with pytest.raises(ValueError, match="reestimate_batch_norm must be 0 for a network without"):
        refuse_impossible(replace(RECIPE, reestimate_batch_norm=1), task, task.model())
