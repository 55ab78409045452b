"""What may be chosen: the groups of a network that receive a bit-width each.

A group is what shares one bit-width: a layer's weight, one of its output channels, or an
activation tensor. A space is an ordered list of groups with what each may be given. It is data:
it can be compared, hashed, written to JSON and sent to a worker without the network.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["Group", "Space", "quantizable_layers", "weight_space"]

BITS = range(1, 9)


@dataclass(frozen=True, slots=True)
class Group:
    """One thing that receives a bit-width.

    Attributes:
        name: ``w:LAYER`` for a layer's weight, ``w:LAYER[c]`` for output channel c of it, and
            ``a:LAYER#i`` for an activation tensor.
        num_elements: Weights in the group, or activations for one example.
        macs: Multiply-accumulates for one example in which the group takes part.
        menu: Allowed bit-widths, strictly increasing, each in 1..8. A pinned group has one.
        tie: Groups with the same tie must receive the same bits; None ties to nothing.
    """

    name: str
    num_elements: int
    macs: int
    menu: tuple[int, ...]
    tie: str | None = None

    def __post_init__(self) -> None:
        if self.name[:2] not in {"w:", "a:"}:
            raise ValueError(f"name must begin with 'w:' or 'a:', got {self.name!r}")
        if self.num_elements < 1 or self.macs < 0:
            raise ValueError(
                f"{self.name}: num_elements must be positive and macs not negative, "
                f"got {self.num_elements} and {self.macs}"
            )
        if not self.menu or sorted(set(self.menu)) != list(self.menu):
            raise ValueError(f"{self.name}: menu must be strictly increasing, got {self.menu}")
        if any(bits not in BITS for bits in self.menu):
            raise ValueError(f"{self.name}: menu must stay within 1..8 bits, got {self.menu}")


@dataclass(frozen=True, slots=True)
class Space:
    """An ordered list of groups.

    Raises:
        ValueError: If two groups share a name, if there is none, or if tied groups have no
            bit-width in common.
    """

    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("a space must hold at least one group, got none")
        if len(set(self.names)) < len(self.groups):
            raise ValueError("the names of a space's groups must differ")
        for members in self.rows():
            if not self.menu_of(members):
                names = ", ".join(self.groups[i].name for i in members)
                raise ValueError(f"tied groups must have a bit-width in common, got {names}")

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def names(self) -> tuple[str, ...]:
        """The groups' names, in order."""
        return tuple(group.name for group in self.groups)

    @property
    def num_elements(self) -> int:
        """Elements of all groups together."""
        return sum(group.num_elements for group in self.groups)

    @property
    def widths(self) -> tuple[int, ...]:
        """Every bit-width that some group may receive, increasing: the columns of all tables."""
        return tuple(sorted({bits for group in self.groups for bits in group.menu}))

    @property
    def fingerprint(self) -> str:
        """A hash of everything above; allocations and tables carry it."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def rows(self) -> list[tuple[int, ...]]:
        """Indices of the groups that choose together, tied ones in one tuple, in order."""
        members: dict[tuple[str, str | int], list[int]] = {}
        for i, group in enumerate(self.groups):
            key = ("single", i) if group.tie is None else ("tie", group.tie)
            members.setdefault(key, []).append(i)
        return [tuple(indices) for indices in members.values()]

    def menu_of(self, members: Sequence[int]) -> tuple[int, ...]:
        """Bit-widths that every one of these groups allows, increasing."""
        shared = set.intersection(*(set(self.groups[i].menu) for i in members))
        return tuple(sorted(shared))

    def allowed(self) -> NDArray[np.bool_]:
        """Which widths each group's menu and tie allow, shape (L, B), columns ``widths``."""
        widths = self.widths
        masks: dict[tuple[int, ...], NDArray[np.bool_]] = {}  # many channels share a menu
        mask = np.zeros((len(self), len(widths)), np.bool_)
        for members in self.rows():
            menu = self.groups[members[0]].menu if len(members) == 1 else self.menu_of(members)
            if menu not in masks:
                masks[menu] = np.isin(widths, menu)
            mask[list(members)] = masks[menu]
        return mask

    def pinned(self, pins: Mapping[str, int]) -> "Space":
        """Fix groups to one bit-width each.

        Args:
            pins: Layer name or glob, without the ``w:``, to bits.

        Raises:
            ValueError: If a glob matches no group, or the bits are outside 1..8.
        """
        groups = list(self.groups)
        for pattern, bits in pins.items():
            hits = [i for i, g in enumerate(groups) if fnmatchcase(g.name[2:], pattern)]
            if not hits:
                known = ", ".join(group.name[2:] for group in groups[:5])
                raise ValueError(f"pin {pattern!r} must match a layer, got none of {known}, …")
            for i in hits:
                groups[i] = replace(groups[i], menu=(bits,))
        return Space(tuple(groups))

    def to_json(self) -> list[dict[str, Any]]:
        """Return plain data, a list of one object a group."""
        return [asdict(group) | {"menu": list(group.menu)} for group in self.groups]

    @staticmethod
    def from_json(data: Sequence[Mapping[str, Any]]) -> "Space":
        """Read what ``to_json`` returned."""
        return Space(tuple(Group(**{**entry, "menu": tuple(entry["menu"])}) for entry in data))


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers whose weight can be quantized: convolutions and linear layers.

    A weight that several layers share is listed once, under the first one's name.

    Returns:
        Layer name to module, in the order of registration.
    """
    return {name: sharers[0] for name, sharers in sharing_layers(model).items()}


def sharing_layers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Find the same layers, each at the head of all those that share its weight."""
    first: dict[int, str] = {}
    layers: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        weight = module.weight
        if parametrize.is_parametrized(module, "weight"):
            # ``module.weight`` is then a passing value, whose id a later one may receive.
            weight = module.get_parameter("parametrizations.weight.original")
        layers.setdefault(first.setdefault(id(weight), name), []).append(module)
    return layers


def weight_space(model: nn.Module, inputs: Tensor, menu: Sequence[int]) -> Space:
    """Make the space of all layers' weights, one group a layer.

    Args:
        model: The network; it is run once, in eval mode.
        inputs: What the network takes, shape (N, …); only the first example is used.
        menu: Bit-widths that every layer may receive.

    Raises:
        ValueError: If the network has no quantizable layer.
    """
    layers = sharing_layers(model)
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        raise ValueError(
            "the network must hold a convolution or a linear layer to quantize, "
            f"got only {', '.join(kinds)}"
        )
    macs = dict.fromkeys(layers, 0)
    names = {id(layer): name for name, sharers in layers.items() for layer in sharers}

    def count(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        positions = output.numel() // weight.shape[0]
        macs[names[id(module)]] += weight.numel() * positions

    handles = [
        layer.register_forward_hook(count) for sharers in layers.values() for layer in sharers
    ]
    try:
        with torch.no_grad(), evaluating(model):
            model(inputs[:1])
    finally:
        for handle in handles:
            handle.remove()
    groups = []
    for name, (layer, *_) in layers.items():
        assert isinstance(layer.weight, Tensor)
        groups.append(Group(f"w:{name}", layer.weight.numel(), macs[name], tuple(sorted(menu))))
    return Space(tuple(groups))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
