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
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hawq.channels import TransposedConvolution

__all__ = [
    "PREFIX",
    "Group",
    "Kind",
    "Space",
    "evaluating",
    "quantizable_layers",
    "sharing_layers",
    "unquantizable_weights",
]

BITS = range(9)

_LAYERS = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | TransposedConvolution

Kind = Literal["weights", "activations"]
PREFIX: dict[Kind, str] = {"weights": "w:", "activations": "a:"}


@dataclass(frozen=True, slots=True)
class Group:
    """One thing that receives a bit-width.

    Attributes:
        name: ``w:LAYER`` for a layer's weight, ``w:LAYER[c]`` for output channel c of it, and
            ``a:LAYER#i`` for an activation tensor.
        num_elements: Weights in the group, or activations for one example.
        macs: Multiply-accumulates for one example in which the group takes part.
        menu: Allowed bit-widths, strictly increasing, each in 1..8, or 0 for a channel that may be
            pruned. A pinned group has one.
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
        if any(bits not in BITS[not self.is_channel :] for bits in self.menu):
            raise ValueError(
                f"{self.name}: menu must stay within 1..8 bits, or 0 for a channel, got {self.menu}"
            )

    @property
    def is_channel(self) -> bool:
        """Whether this is one channel of a layer or a tensor."""
        return self.name.endswith("]")

    @property
    def owner(self) -> str:
        """The layer, or ``LAYER#i``: the name without ``w:`` and without a channel."""
        return self.name[2:].rpartition("[")[0] if self.is_channel else self.name[2:]

    def matches(self, pattern: str) -> bool:
        """Whether a glob means this group: its name, its layer's, or its tensor's first reader."""
        names = (self.name[2:], self.owner, self.owner.partition("#")[0])
        return any(fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True)
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

    @cached_property
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

    @cached_property
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

    def part(self, kind: Kind) -> "Space | None":
        """Return the groups of the weights, or those of the activations; None where none is."""
        groups = tuple(group for group in self.groups if group.name[:2] == PREFIX[kind])
        return Space(groups) if groups else None

    def pinned(self, pins: Mapping[str, int], kind: Kind = "weights") -> "Space":
        """Fix groups to one bit-width each.

        Args:
            pins: Layer name or glob, without the ``w:``, to bits.
            kind: Whether they name weights or activations.

        Raises:
            ValueError: If a glob matches no group, or the bits are outside 1..8.
        """
        return self.restricted({pattern: (bits,) for pattern, bits in pins.items()}, kind)

    def restricted(self, menus: Mapping[str, Sequence[int]], kind: Kind = "weights") -> "Space":
        """Give groups menus of their own.

        Args:
            menus: Layer name or glob, without the ``w:``, to its bit-widths. Of several that match,
                the last one counts.
            kind: Whether they name weights or activations.

        Raises:
            ValueError: If a glob matches no group, or a menu is empty or wider than 1..8.
        """
        groups = list(self.groups)
        for pattern, menu in menus.items():
            for i in self._named(pattern, kind):
                groups[i] = replace(groups[i], menu=tuple(sorted(set(menu))))
        return Space(tuple(groups))

    def at_least(self, least: Mapping[str, int], kind: Kind = "weights") -> "Space":
        """Take widths below a least one off the menus.

        Args:
            least: Layer name or glob to bits; ``"first"`` and ``"last"`` mean the first and the
                last layer where none is called so.
            kind: Whether they name weights or activations.

        Raises:
            ValueError: If a glob matches no group, or nothing is left on a menu.
        """
        groups = list(self.groups)
        for pattern, bits in least.items():
            for i in self._named(pattern, kind):
                menu = tuple(b for b in groups[i].menu if b >= bits)
                if not menu:
                    raise ValueError(
                        f"{groups[i].name}: menu must hold a width of at least {bits} bits, "
                        f"got {groups[i].menu}"
                    )
                groups[i] = replace(groups[i], menu=menu)
        return Space(tuple(groups))

    def tied(self, ties: Sequence[Sequence[str]], kind: Kind = "weights") -> "Space":
        """Let groups share one bit-width; a channel shares its with that channel of the others.

        Args:
            ties: Sets of layer names or globs. Sets that meet are one.
            kind: Whether they name weights or activations.

        Raises:
            ValueError: If a glob matches no group, tied layers have no bit-width in common, or a
                tie of one group ties nothing.
        """
        groups = list(self.groups)
        for patterns in ties:
            members = sorted({i for pattern in patterns for i in self._named(pattern, kind)})
            owners = sorted({groups[i].owner for i in members})
            if len(owners) < 2:
                raise ValueError(
                    f"tie {list(patterns)} must join two layers or more, got {', '.join(owners)}"
                )
            met = {groups[i].tie for i in members if groups[i].tie is not None}
            for i, group in enumerate(groups):
                if i in members or group.tie in met:
                    channel = group.name[2 + len(group.owner) :]
                    groups[i] = replace(group, tie=f"{owners[0]}{channel}")
        return Space(tuple(groups))

    def _named(self, pattern: str, kind: Kind) -> list[int]:
        """Return the indices of the groups that a glob means."""
        mine = [i for i, group in enumerate(self.groups) if group.name[:2] == PREFIX[kind]]
        hits = [i for i in mine if self.groups[i].matches(pattern)]
        if not hits and mine and pattern in {"first", "last"}:
            owner = self.groups[mine[0 if pattern == "first" else -1]].owner
            hits = [i for i in mine if self.groups[i].owner == owner]
        if not hits:
            owners = list(dict.fromkeys(self.groups[i].owner for i in mine))
            near = get_close_matches(pattern, owners, 3, 0.5) or owners[:5]
            raise ValueError(
                f"{pattern!r} must match a layer of the {kind}, got none; there are "
                f"{', '.join(near) or 'none'}{', …' if len(owners) > len(near) else ''}"
            )
        return hits

    def to_json(self) -> list[dict[str, Any]]:
        """Return plain data, a list of one object a group."""
        return [asdict(group) | {"menu": list(group.menu)} for group in self.groups]

    @staticmethod
    def from_json(data: Sequence[Mapping[str, Any]]) -> "Space":
        """Read what ``to_json`` returned."""
        return Space(tuple(Group(**{**entry, "menu": tuple(entry["menu"])}) for entry in data))


def quantizable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the layers whose weight can be quantized: convolutions, linear layers and embeddings.

    A weight that several layers share is listed once, under the first one's name. An embedding that
    is tied to a linear layer goes under the linear layer's; one that changes its weight as it reads
    (``max_norm``), or has other gradients than the loss's (``sparse``, ``scale_grad_by_freq``),
    stays in floating point.

    Returns:
        Layer name to module, in the order of registration.
    """
    return {name: sharers[0] for name, sharers in sharing_layers(model).items()}


def sharing_layers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Find the same layers, each at the head of all those that share its weight."""
    multiplied = {id(_weight(m)) for m in model.modules() if isinstance(m, _LAYERS)}
    first: dict[int, str] = {}
    layers: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS) or (
            _is_plain_embedding(module) and id(_weight(module)) not in multiplied
        ):
            layers.setdefault(first.setdefault(id(_weight(module)), name), []).append(module)
    return layers


def _weight(module: nn.Module) -> Tensor:
    if parametrize.is_parametrized(module, "weight"):
        # ``module.weight`` is then a passing value, whose id a later one may receive.
        return module.get_parameter("parametrizations.weight.original")
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _is_plain_embedding(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Embedding)
        and module.max_norm is None
        and not module.sparse
        and not module.scale_grad_by_freq
    )


def unquantizable_weights(model: nn.Module) -> dict[str, int]:
    """Count, by name, the matrices that no quantizable layer owns: they stay in floating point.

    Recurrent and attention weights, say. Vectors, which are biases and normalizations, are not
    among them.
    """
    quantizable = {
        id(parameter)
        for sharers in sharing_layers(model).values()
        for layer in sharers
        for parameter in layer.parameters()
    }
    return {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and id(parameter) not in quantizable
    }


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
