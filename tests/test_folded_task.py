"""A task with a folded network keeps the contract, and takes an unfolded network's weights."""

import pickle
from dataclasses import dataclass

import pytest
import torch
from oracles import NetTask, TinyTask
from torch import nn

from hawq.finetune.batch_norm import has_statistics
from hawq.testing import check_task
from search.config import TaskConfig
from search.errors import InputError
from search.tasks.build import build_task
from search.tasks.checkpoint import load_weights, save_state
from search.tasks.classification import ClassificationTask
from search.tasks.rewritten import FoldedTask, folding

DIGITS = ClassificationTask("digits", None, "resnet8", search_size=200)


def digits(**changes):
    given = {"data": "digits", "network": "resnet8", "search_size": 200, "checkpoint": "x.pt"}
    return TaskConfig.model_validate(given | changes)


@pytest.mark.parametrize("task", [DIGITS, TinyTask(num_examples=20)])
def test_a_folded_task_keeps_the_contract(task):
    wrapped = FoldedTask(task)
    check_task(wrapped)
    assert wrapped.fingerprint != task.fingerprint
    assert FoldedTask(task).fingerprint == pickle.loads(pickle.dumps(wrapped)).fingerprint
    assert hasattr(wrapped, "distillation") == hasattr(task, "distillation")
    assert not hasattr(wrapped, "pooled")  # else every process of a crew would score all examples
    assert not has_statistics(wrapped.model())


def test_divergences_are_the_inner_task_s():
    outputs, wanted = torch.randn(3, 10), torch.randn(3, 10)
    found = FoldedTask(DIGITS).distillation(outputs, wanted, 2.0)
    assert torch.equal(found, DIGITS.distillation(outputs, wanted, 2.0))


@pytest.fixture
def checkpoint(tmp_path):
    """Weights of an unfolded network whose batch-norms do something."""
    model = DIGITS.model()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    save_state(tmp_path / "unfolded.safetensors", model.state_dict())
    return tmp_path / "unfolded.safetensors", model


def test_a_checkpoint_of_the_unfolded_network_loads(checkpoint):
    path, unfolded = checkpoint
    task = build_task(digits(checkpoint=str(path), fold_batch_norm=True), seed=0)
    model = task.model()
    load_weights(model, path)
    images = task.batch("test", torch.arange(20))[0]
    torch.testing.assert_close(model(images), unfolded(images), rtol=1e-3, atol=1e-4)
    save_state(path.with_name("folded.safetensors"), model.state_dict())
    again = task.model()
    load_weights(again, path.with_name("folded.safetensors"))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_a_checkpoint_of_another_network_is_refused_in_its_own_words(tmp_path):
    other = ClassificationTask("digits", None, "resnet14", search_size=200)
    save_state(tmp_path / "other.safetensors", other.model().state_dict())
    model = FoldedTask(DIGITS).model()
    with pytest.raises(InputError, match=r"must fit SmallResNet, got unknown layer1.1.bn1.bias"):
        load_weights(model, tmp_path / "other.safetensors")


class Unfoldable(nn.Module):
    """Normalizes its input."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm2d(2), nn.Linear(50, 4)

    def forward(self, x):
        return self.layer(self.norm(x).flatten(1))


@dataclass(frozen=True)
class UnfoldableTask(NetTask):
    make: type = Unfoldable


def test_a_network_without_anything_to_fold_is_refused_with_the_reason():
    config = TaskConfig(factory=f"{__name__}:UnfoldableTask", fold_batch_norm=True)
    with pytest.raises(InputError) as caught:
        build_task(config, seed=0)
    assert "task.fold_batch_norm: must be false" in str(caught.value)
    assert "norm: what it reads is not the output of a convolution" in str(caught.value)
    assert folding(FoldedTask(DIGITS)).kept == {}


def test_folding_before_training_is_refused():
    pretrain = {"epochs": 1}
    with pytest.raises(ValueError, match="fold_batch_norm needs trained weights"):
        digits(checkpoint=None, pretrain=pretrain, fold_batch_norm=True)


def test_there_is_no_teacher_before_training():
    with pytest.raises(ValueError, match=r"pretrain.distillation must be 0.*got 0.5"):
        digits(checkpoint=None, pretrain={"distillation": 0.5})
