"""What an allocation costs: exact integers, with their unit in the name.

Weight bits and activation memory are separable tables (group × width) that add up. Bit operations
and latency are functions of a weight's and an activation's bits together, and the peak of the
activation memory is a maximum: a ``Cost`` holds all of these, so that none is forced into a table.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hawq.allocation import Allocation
from hawq.space import PREFIX, Kind, Space

__all__ = [
    "FLOAT_BITS",
    "Cost",
    "Operation",
    "Pair",
    "activation_bits",
    "average_bits",
    "bit_operations",
    "bops",
    "compression",
    "latency",
    "map_bits",
    "mib",
    "num_elements",
    "peak_activation_bits",
    "scale_bits",
    "separable",
    "total",
    "weight_bits",
]

FLOAT_BITS = 32
_BITS_PER_MIB = 8 << 20

Table = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A cost that depends on the widths of two groups together.

    Attributes:
        first: Index of one group in the space.
        second: Index of the other one.
        table: Shape (B, B), rows the width of ``first``, columns that of ``second``.
    """

    first: int
    second: int
    table: Table


@dataclass(frozen=True, slots=True, eq=False)
class Cost:
    """The largest of S sums over the groups, plus what pairs of groups cost together.

    S is 1 but for a peak, where each step of a schedule is one sum.

    Attributes:
        name: What it is, with its unit: ``weight_bits``, ``latency_ns``.
        steps: Cost of group l at width b in step s, shape (S, L, B), S ≥ 1.
        pairs: Costs of two groups together, in every step.
    """

    name: str
    steps: Table
    pairs: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        tables = [self.steps, *(pair.table for pair in self.pairs)]
        if self.steps.ndim != 3 or not len(self.steps):
            raise ValueError(f"{self.name}: steps must be S × L × B, got {self.steps.shape}")
        if any(not np.issubdtype(table.dtype, np.integer) for table in tables):
            raise ValueError(f"{self.name}: costs must be integers, got {self.steps.dtype}")
        if any((table < 0).any() for table in tables):
            raise ValueError(f"{self.name}: costs must not be negative")
        num_groups, num_widths = self.steps.shape[1:]
        for pair in self.pairs:
            inside = 0 <= min(pair.first, pair.second) <= max(pair.first, pair.second) < num_groups
            if pair.table.shape != (num_widths, num_widths) or not inside:
                raise ValueError(
                    f"{self.name}: a pair must be two of {num_groups} groups with a table of "
                    f"{num_widths} × {num_widths}, got {(pair.first, pair.second)} with "
                    f"{pair.table.shape}"
                )

    def of(self, space: Space, allocation: Allocation) -> int:
        """Return what an allocation costs."""
        choice = allocation.choice(space)
        sums = self.steps[:, np.arange(len(space)), choice].sum(1)
        together = sum(int(p.table[choice[p.first], choice[p.second]]) for p in self.pairs)
        return int(sums.max()) + together


@dataclass(frozen=True, slots=True)
class Operation:
    """One product of a layer's weights with a tensor that it reads.

    Attributes:
        weight: Name of the weight's group.
        activation: Name of the tensor's group, or its bits where they are not searched.
        macs: Multiply-accumulates for one example.
    """

    weight: str
    activation: str | int
    macs: int


def separable(name: str, table: Table) -> Cost:
    """Make a cost of one table, shape (L, B), that adds up."""
    return Cost(name, table[None])


def weight_bits(space: Space) -> Table:
    """Bits that each weight group's elements take at each width, shape (L, B).

    The papers' figure: weights only, without scales, biases and batch-norm. ``scale_bits`` and
    ``map_bits`` are what an honest file holds besides.
    """
    return _element_bits(space, "weights")


def activation_bits(space: Space) -> Table:
    """Bits of one example that each activation group takes at each width, shape (L, B).

    Their sum is Σ b·|a| (Dong et al., 2020), all tensors of a forward pass at once.
    """
    return _element_bits(space, "activations")


def scale_bits(space: Space, num_scales: Sequence[int], bits: int = 16) -> Table:
    """Bits of the scales that each group's quantizer stores, shape (L, B).

    A pruned group, of 0 bits, has none.

    Args:
        space: The groups.
        num_scales: Scales of each group: 1 for a tensor or a channel, O for a layer with one for
            each of its O output channels, 0 for a group whose scale is not stored.
        bits: Of one scale: 16 or 32.
    """
    counts = np.array(num_scales, np.int64)
    if counts.shape != (len(space),) or (counts < 0).any() or bits < 0:
        raise ValueError(
            f"num_scales must be {len(space)} counts of scales of at least 0 bits, "
            f"got shape {counts.shape} and {bits} bits"
        )
    return np.outer(counts * bits, np.array(space.widths) > 0)


def map_bits(space: Space, max_widths: int | None = None) -> Table:
    """Bits that say which width each channel has, shape (L, B): ⌈log₂ m⌉ for one of m widths.

    A layer's or a tensor's one width is part of the file's description, not counted here.

    Args:
        space: The groups; channels are those with a name like ``w:LAYER[3]``.
        max_widths: Distinct widths that a layer may use, where that is fewer than the menu has.
    """
    options = [len(group.menu) if group.name.endswith("]") else 1 for group in space.groups]
    if max_widths is not None:
        options = [min(m, max_widths) for m in options]
    bits = np.array([(m - 1).bit_length() for m in options], np.int64)
    return np.repeat(bits[:, None], len(space.widths), 1)


def peak_activation_bits(space: Space, schedule: Sequence[Collection[str]]) -> Cost:
    """The most bits of activations alive at once: max over the steps of Σ b·|a|.

    Args:
        space: The groups.
        schedule: For each step, the activation groups that are alive together: usually what a
            layer reads and writes, and what a later one still needs.
    """
    rows = _rows(space, (name for alive in schedule for name in alive), "a:")
    steps = np.zeros((len(schedule), len(space), len(space.widths)), np.int64)
    table = activation_bits(space)
    for step, alive in zip(steps, schedule, strict=True):
        members = [rows[name] for name in alive]
        step[members] = table[members]
    return Cost("peak_activation_bits", steps)


def bit_operations(space: Space, operations: Sequence[Operation]) -> Cost:
    """Σ MACs · weight bits · activation bits (Yao et al., 2021), one example's."""
    widths = np.array(space.widths, np.int64)
    weights = _rows(space, (op.weight for op in operations), "w:")
    tensors = _rows(space, (op.activation for op in operations), "a:")
    table = np.zeros((len(space), len(widths)), np.int64)
    pairs = []
    for op in operations:
        if isinstance(op.activation, int):
            table[weights[op.weight]] += op.macs * op.activation * widths
        else:
            product = op.macs * np.outer(widths, widths)
            pairs.append(Pair(weights[op.weight], tensors[op.activation], product))
    return Cost("bops", table[None], tuple(pairs))


def latency(
    space: Space,
    operations: Iterable[Operation],
    table_ns: Mapping[str, Mapping[int | tuple[int, int], int]],
) -> Cost:
    """Add up measured latencies of layers, in nanoseconds.

    Args:
        space: The groups.
        operations: Which layer reads which tensor; their MACs do not matter here.
        table_ns: For each layer, without ``w:``, nanoseconds by (weight bits, activation bits),
            or by weight bits alone. A layer whose tensor is tied to its weight needs equal bits
            only.

    Raises:
        ValueError: If the table lacks a layer or a width that the space allows, naming it, if it
            holds anything but whole nanoseconds, or if a layer of several tensors is listed by
            both widths.
    """
    reads = {(op.weight, op.activation) for op in operations}
    weights = _rows(space, (weight for weight, _ in reads), "w:")
    tensors = _rows(space, (tensor for _, tensor in reads), "a:")
    table = np.zeros((len(space), len(space.widths)), np.int64)
    allowed = space.allowed()
    pairs = []
    for name, row in sorted(weights.items(), key=lambda item: item[1]):
        layer = name[2:]
        by_bits = table_ns.get(layer, {})
        read = [tensor for weight, tensor in reads if weight == name]
        columns = np.flatnonzero(allowed[row])
        by_both = any(isinstance(key, tuple) for key in by_bits)
        if by_both and len(read) > 1:
            raise ValueError(f"latency of {layer} must be by weight bits, for it reads {read}")
        if not by_both:
            table[row, columns] = [_ns(by_bits, layer, space.widths[c]) for c in columns]
        elif isinstance(read[0], int):
            keys = [(space.widths[c], read[0]) for c in columns]
            table[row, columns] = [_ns(by_bits, layer, key) for key in keys]
        else:
            other = tensors[read[0]]
            tied = _tied(space, row, other)
            product = np.zeros((len(space.widths),) * 2, np.int64)
            for i in columns:
                for j in np.flatnonzero(allowed[other]):
                    if i == j or not tied:
                        key = (space.widths[i], space.widths[j])
                        product[i, j] = _ns(by_bits, layer, key)
            pairs.append(Pair(row, other, product))
    return Cost("latency_ns", table[None], tuple(pairs))


def total(table: Table, space: Space, allocation: Allocation) -> int:
    """Sum a table, shape (L, B), over an allocation."""
    return int(table[np.arange(len(space)), allocation.choice(space)].sum())


def bops(macs: Sequence[int], weight_bits: Sequence[int], activation_bits: Sequence[int]) -> int:
    """Bit operations of one example: Σ MACs · weight bits · activation bits (Yao et al., 2021)."""
    layers = zip(macs, weight_bits, activation_bits, strict=True)
    return sum(m * w * a for m, w, a in layers)


def compression(space: Space, bits: int, of: Kind = "weights") -> float:
    """How many times smaller than 32-bit floats ``bits`` bits are for this space's weights.

    With ``of="activations"`` for its activations: 32·Σ|a| / Σ b·|a|.
    """
    return FLOAT_BITS * num_elements(space, of) / bits


def average_bits(space: Space, bits: int, of: Kind = "weights") -> float:
    """Bits per weight, or per activation."""
    return bits / num_elements(space, of)


def mib(bits: int) -> float:
    """Convert bits to MiB (2²⁰ bytes)."""
    return bits / _BITS_PER_MIB


def _element_bits(space: Space, kind: Kind) -> Table:
    counted = [g.num_elements * g.name.startswith(PREFIX[kind]) for g in space.groups]
    return np.outer(np.array(counted, np.int64), np.array(space.widths, np.int64))


def num_elements(space: Space, kind: Kind) -> int:
    return sum(g.num_elements for g in space.groups if g.name.startswith(PREFIX[kind]))


def _rows(space: Space, names: Iterable[str | int], prefix: str) -> dict[str, int]:
    """Index of each group that is named; bits in the place of a name are passed over."""
    index = {name: i for i, name in enumerate(space.names)}
    rows = {}
    for name in names:
        if isinstance(name, int):
            continue
        if name not in index or not name.startswith(prefix):
            raise ValueError(f"a cost must name a group {prefix}… of the space, got {name!r}")
        rows[name] = index[name]
    return rows


def _tied(space: Space, first: int, second: int) -> bool:
    tie = space.groups[first].tie
    return tie is not None and tie == space.groups[second].tie


def _ns(
    by_bits: Mapping[int | tuple[int, int], int], layer: str, key: int | tuple[int, int]
) -> int:
    found = by_bits.get(key)
    if found is None:
        raise ValueError(f"the latency table must hold layer {layer} at {key} bits, got none")
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise ValueError(f"latency of {layer} at {key} bits must be whole ns, got {found!r}")
    return found
