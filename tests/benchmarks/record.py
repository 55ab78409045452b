"""How a benchmark is kept: rows of subject, peer, figure and unit, with what it ran on."""

import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from search.machine import machine, versions

__all__ = ["Row", "record"]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        subject: What was measured.
        peer: What it is compared with; empty for a figure that stands alone.
        figure: The number: of the subject, or the ratio subject / peer.
        unit: Its unit.
    """

    subject: str
    peer: str
    figure: float
    unit: str


def record(name: str, rows: list[Row]) -> Path:
    """Print the rows and write them to build/bench/NAME.json."""
    table = Table(title=f"bench-{name}", box=box.SIMPLE_HEAD)
    for heading in ("subject", "peer", "figure", "unit"):
        table.add_column(heading, justify="right" if heading == "figure" else "left")
    for row in rows:
        table.add_row(row.subject, row.peer, f"{row.figure:.4g}", row.unit)
    Console().print(table)
    facts = {"commit": _commit(), "machine": machine(), "torch": versions()["torch"]}
    path = ROOT / "build" / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([{**asdict(row), **facts} for row in rows], indent=1) + "\n")
    Console().print(f"{path.relative_to(ROOT)}", highlight=False)
    return path


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
