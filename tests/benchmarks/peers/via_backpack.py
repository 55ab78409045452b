"""BackPACK: the diagonal of the Gauss–Newton matrix, exact and by sampled labels.

Its converter refuses option-A shortcuts (slicing and padding), so ResNet20 is rebuilt from modules
that it knows: the shortcut is a fixed 1×1 convolution of stride 2, which gives the same numbers.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from backpack import backpack, extend
from backpack.custom_module.branching import Parallel
from backpack.extensions import DiagGGNExact, DiagGGNMC
from torch import nn

from tests.benchmarks.peers.measure import Step, measure
from tests.benchmarks.peers.problem import Problem


def diagonal(
    extension: type[DiagGGNExact] | type[DiagGGNMC],
    field: str,
    probes: int,
    problem: Problem,
    batch: int,
) -> Callable[[], Step]:
    """Sum each layer's part of the diagonal, batch by batch."""
    if problem.name == "resnet20":
        model = extend(_modules(problem.model))
    else:
        model = extend(problem.model, use_converter=True)
    criterion = extend(nn.CrossEntropyLoss())
    with torch.no_grad():
        torch.testing.assert_close(model(problem.images[:8]), problem.model(problem.images[:8]))
    weights = [p for p in model.parameters() if p.requires_grad]

    def step() -> Step:
        traces = np.zeros(len(weights))
        for images, labels in problem.batches(batch):
            with backpack(extension()):
                criterion(model(images), labels).backward()
            for i, weight in enumerate(weights):
                share = len(labels) / len(problem.labels)
                traces[i] += share * float(getattr(weight, field).double().sum())
                weight.grad = None
                delattr(weight, field)
        return Step(traces, probes)

    return step


def _modules(model: nn.Module) -> nn.Sequential:
    """Rebuild a SmallResNet from its own layers, in the same order, and modules between them."""
    blocks = [
        part
        for stage in (model.layer1, model.layer2, model.layer3)
        for block in stage
        for part in (Parallel(_branch(block), _shortcut(block)), nn.ReLU())
    ]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.linear)
    return nn.Sequential(model.conv1, model.bn1, nn.ReLU(), *blocks, *head).eval()


def _branch(block: nn.Module) -> nn.Sequential:
    return nn.Sequential(block.conv1, block.bn1, nn.ReLU(), block.conv2, block.bn2)


def _shortcut(block: nn.Module) -> nn.Module:
    if not block.widening:
        return nn.Identity()
    channels = block.conv1.in_channels
    shortcut = nn.Conv2d(channels, block.conv1.out_channels, 1, 2, bias=False)
    shortcut.weight.requires_grad_(False).zero_()
    for channel in range(channels):
        shortcut.weight[block.widening // 2 + channel, channel] = 1
    return shortcut


if __name__ == "__main__":
    measure(
        {
            "exact GGN diagonal": partial(diagonal, DiagGGNExact, "diag_ggn_exact", 0),
            "sampled GGN diagonal": partial(diagonal, DiagGGNMC, "diag_ggn_mc", 1),
        },
        "backpack-for-pytorch",
    )
