"""``hawq front``: a page of what a run's tables offer at every size, without anything measured."""

from pathlib import Path

from search.artefacts import CandidatesArtefact, TablesArtefact
from search.commands.allocate import read_tables
from search.errors import InputError
from search.folder import RunFolder, content_hash, write_atomically
from search.report.front_page import render_fronts
from search.stages.candidates import fronts
from search.tables import Tables

__all__ = ["METHODS", "front_page"]

METHODS = ("hawq-v2", "exact", "channel")


def front_page(run: Path, out: Path | None = None) -> Path:
    """Compute the fronts of a run's tables, and write them as one HTML page.

    What the run chose is marked on them where it has come so far.

    Args:
        run: The run's folder.
        out: HTML file to write; None: ``front.html`` in the run's folder.

    Returns:
        Where the page is.

    Raises:
        InputError: If the folder is no run's, it holds no tables yet, or ``out`` is a folder.
    """
    path = out or run / "front.html"
    if path.is_dir():
        raise InputError(f"--out: must be a file to write, got the folder {path}: add a name")
    artefact = read_tables(run)
    tables, channels = Tables.of(artefact), Tables.of_channels(artefact)
    offered = (*(("hawq-v1",) if tables.blocks else ()), *METHODS)
    chosen, caveat = _chosen(run, artefact)
    found = CandidatesArtefact(
        budgets=chosen.budgets if chosen else [],
        fronts=[front for method in offered for front in fronts(method, tables, channels)],
        candidates=chosen.candidates if chosen else [],
    )
    page = render_fronts(run.resolve().name, found, tables.space, caveat)
    write_atomically(path, page)
    return path


def _chosen(run: Path, tables: TablesArtefact) -> tuple[CandidatesArtefact | None, str]:
    """Read what was chosen from these very tables; else None, and why it is not shown."""
    folder = RunFolder(run)
    inputs = folder.inputs("candidates")
    if inputs is None:
        return None, "The run has no candidates yet: its choices are not marked."
    if inputs.get("tables") != content_hash(tables.model_dump(mode="json")):
        return None, "The run’s candidates are of other tables than these, and are not marked."
    return folder.load("candidates", CandidatesArtefact)[0], ""
