"""The report in a run's folder: of its summary, and of what else was left there to be shown."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from search.artefacts import Summary
from search.errors import InputError, other_form
from search.folder import write_atomically
from search.pictured import PICTURES_FILE, PicturesDocument
from search.report.page import render
from search.traced import EigenvalueDocument

__all__ = ["rewrite_report", "write_report"]

_Document = TypeVar("_Document", bound=BaseModel)


def write_report(folder: Path, summary: Summary) -> Path:
    """Write a run's report, with ``eigenvalues.json`` and ``pictures.json`` in it where they are.

    Returns:
        Where the report is.

    Raises:
        InputError: If one of these is not what this version writes.
    """
    path = folder / "report.html"
    write_atomically(
        path,
        render(
            summary,
            _read(
                folder / "eigenvalues.json", EigenvalueDocument, "hawq trace --estimator eigenvalue"
            ),
            _read(folder / PICTURES_FILE, PicturesDocument, "hawq run"),
        ),
    )
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


def _read(path: Path, document: type[_Document], command: str) -> _Document | None:
    if not path.exists():
        return None
    try:
        return document.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path} must be what {command} of this version writes, got {other_form(error)}: "
            "delete it, or run that again"
        ) from error
