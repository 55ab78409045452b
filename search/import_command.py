"""``hawq import``: what another program chose, priced by a run's tables."""

from collections.abc import Sequence
from pathlib import Path

from search.allocate_command import read_tables
from search.artefacts import Candidate
from search.imports import priced, read_bits
from search.tables import Tables

__all__ = ["imported"]


def imported(file: Path, run: Path) -> tuple[Candidate, Tables, tuple[str, ...]]:
    """Read bits and price them.

    Args:
        file: What ``search.imports.read_bits`` reads; channels are named ``w:LAYER[c]``.
        run: Folder of a run that came past its tables.

    Returns:
        The allocation, the tables that priced it, and what of the file has no place in them.

    Raises:
        InputError: If the file and the run do not go together.
    """
    artefact = read_tables(run)
    names = [group["name"] for group in artefact.channels.space] if artefact.channels else []
    tables = Tables.of_channels(artefact) if _names_channels(file, names) else Tables.of(artefact)
    assert tables is not None
    given = read_bits(file, tables.space.names)
    return priced(given, tables, file.name), tables, given.left_out


def _names_channels(file: Path, names: Sequence[str]) -> bool:
    """Whether a file is of a run's channels: it names the first one."""
    try:
        return bool(names) and names[0] in file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False  # the reader says what is wrong with it
