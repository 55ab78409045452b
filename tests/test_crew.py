"""A crew takes the step that one process would take."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hawq.finetune import attach, calibrate, make_optimizer
from hawq.finetune.recipe import Recipe
from hawq.space import evaluating
from search.crew import Crew, shared
from search.tasks.classification import ClassificationTask

TASK = ClassificationTask(data="digits", root=None, network="resnet8", search_size=101)
# Scales hardly move in a step: by so much that their gradients can be told apart.
RECIPE = Recipe(epochs=1, batch_size=64, lr=0.05, momentum=0.0, weight_decay=0.0, scale_lr=1e4)


def network():
    torch.manual_seed(0)
    model = TASK.model()
    example = TASK.inputs(TASK.batch("train", torch.arange(256)))
    attach(model, {"w:conv1": 4, "a:layer1.0.conv1#0": 4, "w:layer1.0.conv1": 3}, example)
    calibrate(model, [example])
    return model


def step(model, task, optimizer):
    """One step on a batch without augmentation, batch-norm at rest."""
    for group in optimizer.param_groups:
        group["lr"] = RECIPE.lr * group["factor"]
    with evaluating(model):
        loss = task.losses(model, task.batch("train", torch.arange(64))).mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def member(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size
    )
    crew = Crew.of_process_group("cpu")
    model = network()
    optimizer = make_optimizer(model, RECIPE)
    if rank:
        with torch.no_grad():  # whatever a member began with, it goes on from the chief's
            model.linear.weight.add_(1.0)
    crew.join(model, optimizer)
    task = shared(TASK, crew)
    loss = step(model, task, optimizer)
    scores = torch.arange(task.size("search")).float() * size + rank
    torch.save(
        {"model": model.state_dict(), "loss": loss, "mean": crew.mean(scores)},
        f"{folder}/{rank}.pt",
    )
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_mean.fill_(float(rank))
    crew.settle(model)
    assert torch.equal(norm.running_mean, torch.full_like(norm.running_mean, 0.5))
    nan = crew.agreed(torch.tensor([float("nan") if rank else 1.0]))
    assert nan.isnan().all(), "one member's loss must be known to all"
    dist.destroy_process_group()


def test_two_processes_take_the_step_of_one_and_stay_equal(tmp_path):
    mp.spawn(member, (2, str(tmp_path)), nprocs=2)
    chief, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = network()
    loss = step(alone, TASK, make_optimizer(alone, RECIPE))
    assert chief["loss"] == pytest.approx(loss)
    assert other["loss"] == pytest.approx(loss)
    assert chief["mean"] == pytest.approx(50.0)  # 0 … 100, each counted once
    start = network().state_dict()
    for name, value in alone.state_dict().items():
        assert torch.equal(chief["model"][name], other["model"][name]), name
        if value.is_floating_point() and not torch.equal(value, start[name]):
            moved, expected = chief["model"][name] - start[name], value - start[name]
            torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6, msg=name)
    name = "layer1.0.conv1.input_quantizer.scale"
    assert abs(alone.state_dict()[name] - start[name]) > 1e-3
