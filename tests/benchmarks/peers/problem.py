"""The problem that every peer is given: a network in eval mode, images and labels, from one file.

It needs torch and numpy alone (torchvision for ResNet50), so that it loads beside any peer.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from search.tasks.networks import SmallResNet

__all__ = ["Problem", "load_problem", "network", "save_problem"]


@dataclass(frozen=True, slots=True)
class Problem:
    """Cross-entropy of one network, meant over fixed images.

    Attributes:
        name: ``"resnet20"`` or ``"resnet50"``.
        model: In eval mode; of its parameters only the traced weights require gradients.
        images: Shape (N, 3, H, W).
        labels: Shape (N,).
        layers: Names of the L layers whose weights are traced, in the order of ``parameters()``.
    """

    name: str
    model: nn.Module
    images: Tensor
    labels: Tensor
    layers: tuple[str, ...]

    @property
    def weights(self) -> list[nn.Parameter]:
        """The layers' weights."""
        return [self.model.get_submodule(name).weight for name in self.layers]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Cut images and labels into batches; the last may be smaller."""
        return zip(self.images.split(size), self.labels.split(size), strict=True)


def network(name: str) -> nn.Module:
    """Build a network by name, with weights that are to be loaded over."""
    if name == "resnet20":
        return SmallResNet(20)
    if name == "resnet50":
        from torchvision.models import resnet50  # noqa: PLC0415  seconds, only where it is used

        return resnet50(weights=None)
    raise ValueError(f"name must be 'resnet20' or 'resnet50', got {name!r}")


def save_problem(path: Path, name: str, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Write what ``load_problem`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"state/{key}": value.numpy() for key, value in model.state_dict().items()}
    np.savez(path, name=name, images=images.numpy(), labels=labels.numpy(), **state)


def load_problem(path: Path) -> Problem:
    """Read a problem, and let the weights of its layers alone require gradients."""
    with np.load(path) as archive:
        name = str(archive["name"])
        state = {
            key.removeprefix("state/"): torch.from_numpy(archive[key])
            for key in archive.files
            if key.startswith("state/")
        }
        images, labels = (torch.from_numpy(archive[key]) for key in ("images", "labels"))
    model = network(name).eval()
    model.load_state_dict(state)
    model.requires_grad_(False)
    layers = []
    for layer, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.requires_grad_(True)
            layers.append(layer)
    return Problem(name, model, images, labels, tuple(layers))
