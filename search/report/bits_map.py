"""Which layer or tensor got how many bits, as a table of coloured cells.

Channels of one layer are shown together, as their mean where they differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from hawq.allocation import Bits, by_owner
from hawq.space import PREFIX, Kind
from search.artefacts import Candidate, Summary
from search.report.palette import width_color
from search.report.results import results_by_budget

__all__ = ["BitsMap", "Cell", "Column", "MapRow", "bits_map"]


@dataclass(frozen=True, slots=True)
class Column:
    """A layer or tensor: name, share of all elements in percent as text, whether it is pinned."""

    name: str
    share: str
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class Cell:
    """Bits as text, the colours to show them in, and how many channels have which.

    ``histogram`` is ``"2:5 3:11"`` for 5 channels of 2 bits and 11 of 3, empty without channels.
    """

    text: str
    background: str
    ink: str
    histogram: str = ""


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


def bits_map(summary: Summary, of: Kind = "weights") -> BitsMap | None:
    """Arrange every candidate's bits layer by layer, or tensor by tensor.

    Args:
        summary: The run.
        of: Weights, or activations where they are searched.

    Returns:
        The map; None where there is nothing of the kind.
    """
    columns = _columns(summary, of)
    if not columns:
        return None
    groups = []
    for found in results_by_budget(summary):
        rows = []
        for result in found.results:
            bits = by_owner(result.candidate.bits)
            cells = tuple(_cell(bits, f"{PREFIX[of]}{column.name}") for column in columns)
            average = _average(result.candidate, of)
            rows.append(MapRow(result.candidate.method, result.twins, cells, average))
        groups.append((found.budget.label, tuple(rows)))
    return BitsMap(tuple(columns), tuple(groups))


def _columns(summary: Summary, of: Kind) -> list[Column]:
    members = [group for group in summary.tables.space if group["name"].startswith(PREFIX[of])]
    total = sum(group["num_elements"] for group in members)
    return [
        Column(
            group["name"].removeprefix(PREFIX[of]),
            _share(group["num_elements"] / total),
            len(group["menu"]) == 1,
        )
        for group in members
    ]


def _share(part: float) -> str:
    return "<1" if part < 0.0095 else f"{100 * part:.0f}"


def _average(candidate: Candidate, of: Kind) -> float:
    if of == "weights":
        return candidate.average_bits
    return candidate.activation_average_bits or 0.0


def _cell(found: Mapping[str, Bits], owner: str) -> Cell:
    bits = found.get(owner)
    if bits is None:
        return Cell("", "transparent", "inherit")
    channels = bits if isinstance(bits, tuple) else (bits,)
    widths, mean = sorted(set(channels)), fmean(channels)
    return Cell(
        str(widths[0]) if len(widths) == 1 else f"{mean:.1f}",
        width_color(mean),
        "#ffffff" if mean > 4.5 else "#10243a",
        " ".join(f"{b}:{channels.count(b)}" for b in widths) if isinstance(bits, tuple) else "",
    )
