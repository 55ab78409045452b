"""Which layer got how many bits, as a table of coloured cells.

Channels of one layer are shown together, as their mean where they differ.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from search.artefacts import Summary
from search.report.results import results_by_budget

__all__ = ["BitsMap", "Cell", "Column", "MapRow", "bits_map"]

_CHANNEL = re.compile(r"\[\d+\]$")
_FEW, _MANY = (0xF3, 0xF7, 0xFB), (0x08, 0x35, 0x68)


@dataclass(frozen=True, slots=True)
class Column:
    """A layer: its name, its share of all weights in percent as text, and whether it is pinned."""

    name: str
    share: str
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """Bits as text, and the colours to show them in."""

    text: str
    background: str
    ink: str


@dataclass(frozen=True, slots=True)
class MapRow:
    """One candidate."""

    method: str
    twins: tuple[str, ...]
    cells: tuple[Cell, ...]
    average_bits: float


@dataclass(frozen=True, slots=True)
class BitsMap:
    """Columns in the network's order, rows by budget."""

    columns: tuple[Column, ...]
    groups: tuple[tuple[str, tuple[MapRow, ...]], ...]


def bits_map(summary: Summary) -> BitsMap:
    """Arrange every candidate's bits layer by layer."""
    candidates = summary.candidates.candidates
    names = list(dict.fromkeys(_layer(group) for c in candidates for group in c.bits))
    groups = tuple(
        (
            found.budget.label,
            tuple(
                MapRow(
                    result.candidate.method,
                    result.twins,
                    tuple(_cell(result.candidate.bits, name) for name in names),
                    result.candidate.average_bits,
                )
                for result in found.results
            ),
        )
        for found in results_by_budget(summary)
    )
    return BitsMap(tuple(_column(name, summary) for name in names), groups)


def _layer(group: str) -> str:
    """Name the column of a group: ``w:conv1[7]`` is in ``conv1``, ``a:conv1#0`` is its own."""
    return _CHANNEL.sub("", group).removeprefix("w:")


def _column(name: str, summary: Summary) -> Column:
    members = [group for group in summary.tables.space if _layer(group["name"]) == name]
    is_weight = not name.startswith("a:")
    share = 100 * sum(g["num_elements"] for g in members) / summary.model.num_quantizable
    text = "<1" if share < 0.95 else f"{share:.0f}"
    return Column(
        name,
        text if members and is_weight else "",
        bool(members) and all(len(group["menu"]) == 1 for group in members),
    )


def _cell(bits: dict[str, int], name: str) -> Cell:
    chosen = [width for group, width in bits.items() if _layer(group) == name]
    if not chosen:
        return Cell("", "transparent", "inherit")
    mean = fmean(chosen)
    return Cell(
        str(chosen[0]) if len(set(chosen)) == 1 else f"{mean:.1f}",
        _shade((mean - 1) / 7),
        "#ffffff" if mean > 4.5 else "#10243a",
    )


def _shade(part: float) -> str:
    return _hex(few + (many - few) * part for few, many in zip(_FEW, _MANY, strict=True))


def _hex(channels: Iterable[float]) -> str:
    return "#" + "".join(f"{round(min(max(channel, 0), 255)):02x}" for channel in channels)
