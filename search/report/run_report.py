"""The report in a run's folder: of its summary, and of the eigenvalues that were traced there."""

from pathlib import Path

from pydantic import ValidationError

from search.artefacts import Summary
from search.errors import InputError
from search.folder import write_atomically
from search.report.page import render
from search.traced import EigenvalueDocument

__all__ = ["rewrite_report", "write_report"]


def write_report(folder: Path, summary: Summary) -> Path:
    """Write a run's report, with ``eigenvalues.json`` in it where the folder holds one.

    Returns:
        Where the report is.

    Raises:
        InputError: If ``eigenvalues.json`` is not what this version writes.
    """
    path = folder / "report.html"
    write_atomically(path, render(summary, _eigenvalues(folder / "eigenvalues.json")))
    return path


def rewrite_report(folder: Path) -> Path | None:
    """Write the report of a finished run again.

    Returns:
        Where the report is; None where no run of this version has finished in the folder.
    """
    try:
        summary = Summary.model_validate_json((folder / "summary.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
    return write_report(folder, summary)


def _eigenvalues(path: Path) -> EigenvalueDocument | None:
    if not path.exists():
        return None
    try:
        return EigenvalueDocument.model_validate_json(path.read_bytes())
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(
            f"{path} must be what hawq trace --estimator eigenvalue of this version writes, got "
            f"another form of {where or 'it'}: delete it, or trace again"
        ) from error
