"""A choice: the bits of every group of one space, as an immutable value."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hawq.space import Space

__all__ = ["Allocation", "Bits", "by_group", "by_owner"]

# Of a layer or a tensor, or of each of its channels.
Bits = int | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Allocation:
    """The bits of every group of one space.

    Build it with ``Allocation.of``, which checks menus and ties.

    Attributes:
        names: The groups' names, in the space's order.
        bits: Their bit-widths, same order.
        space: Fingerprint of the space that it belongs to.
    """

    names: tuple[str, ...]
    bits: tuple[int, ...]
    space: str

    @staticmethod
    def of(space: Space, bits: Sequence[int] | Mapping[str, int]) -> "Allocation":
        """Choose bits for a space, in its order or by name.

        Raises:
            ValueError: If a group is missing or unknown, its bits are not on its menu, or tied
                groups differ.
        """
        if isinstance(bits, Mapping):
            odd = set(space.names) ^ set(bits)
            if odd:
                raise ValueError(f"bits must name each group of the space once, got {sorted(odd)}")
            bits = [bits[name] for name in space.names]
        if len(bits) != len(space):
            raise ValueError(f"bits must have {len(space)} entries, got {len(bits)}")
        for group, b in zip(space.groups, bits, strict=True):
            if b not in group.menu:
                raise ValueError(f"{group.name}: bits must be one of {group.menu}, got {b}")
        values = tuple(int(b) for b in bits)
        for members in space.rows():
            if len({values[i] for i in members}) > 1:
                tied = ", ".join(f"{space.names[i]}={values[i]}" for i in members)
                raise ValueError(f"tied groups must receive the same bits, got {tied}")
        return Allocation(space.names, values, space.fingerprint)

    @staticmethod
    def least(space: Space) -> "Allocation":
        """Give every group the least bits that its menu and its tie allow."""
        return Allocation.of(space, _ends(space, 0))

    @staticmethod
    def most(space: Space) -> "Allocation":
        """Give every group the most bits that its menu and its tie allow."""
        return Allocation.of(space, _ends(space, -1))

    @property
    def digest(self) -> str:
        """A hash of the names and bits: equal choices have equal digests."""
        text = json.dumps([self.names, self.bits])
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def __getitem__(self, name: str) -> int:
        return self.bits[self.names.index(name)]

    def choice(self, space: Space) -> NDArray[np.int64]:
        """Return the column of each group in the space's tables, shape (L,).

        Raises:
            ValueError: If this allocation belongs to another space.
        """
        if space.fingerprint != self.space:
            raise ValueError(
                f"the allocation must belong to space {space.fingerprint}, got one of {self.space}"
            )
        return np.searchsorted(space.widths, self.bits).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {"space": self.space, "bits": dict(zip(self.names, self.bits, strict=True))}

    @staticmethod
    def from_json(space: Space, data: Mapping[str, Any]) -> "Allocation":
        """Read what ``to_json`` returned.

        Raises:
            ValueError: If it was made for another space.
        """
        if data["space"] != space.fingerprint:
            raise ValueError(
                f"the allocation must belong to space {space.fingerprint}, "
                f"got one of {data['space']}"
            )
        return Allocation.of(space, data["bits"])


def _ends(space: Space, end: int) -> list[int]:
    bits = [0] * len(space)
    for members in space.rows():
        for i in members:
            bits[i] = space.menu_of(members)[end]
    return bits


def by_owner(bits: Mapping[str, int]) -> dict[str, Bits]:
    """Gather the bits of groups as those of layers and tensors.

    Args:
        bits: Group name to bits; the channels of a layer in order.

    Returns:
        ``w:LAYER`` or ``a:LAYER#i`` to its bits, or to those of its channels.

    Raises:
        ValueError: If channels are missing or out of order.
    """
    gathered: dict[str, Bits] = {}
    for name, b in bits.items():
        owner, bracket, channel = name.partition("[")
        before = gathered.get(owner, ())
        if not bracket:
            gathered[name] = b
        elif isinstance(before, tuple) and channel == f"{len(before)}]":
            gathered[owner] = (*before, b)
        else:
            raise ValueError(f"the channels of {owner} must come in order from 0, got {name}")
    return gathered


def by_group(bits: Mapping[str, int | Sequence[int]]) -> dict[str, int]:
    """Return what ``by_owner`` gathered, group by group."""
    found: dict[str, int] = {}
    for owner, b in bits.items():
        if isinstance(b, int):
            found[owner] = b
        else:
            found |= {f"{owner}[{channel}]": width for channel, width in enumerate(b)}
    return found
