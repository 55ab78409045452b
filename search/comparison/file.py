"""A comparison in a file."""

import json
from pathlib import Path

from pydantic import ValidationError

from search.comparison.document import ComparisonDocument
from search.errors import InputError, other_form
from search.folder import write_atomically

__all__ = ["is_comparison", "read_comparison", "write_comparison"]


def is_comparison(path: Path) -> bool:
    """Whether a file is one of a comparison, by its looks."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "searches" in document


def read_comparison(path: Path) -> ComparisonDocument:
    """Read a comparison.

    Raises:
        InputError: If it is none.
    """
    try:
        return ComparisonDocument.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        told = other_form(error) if isinstance(error, ValidationError) else error.strerror
        raise InputError(
            f"{path}: must be a comparison that hawq compare wrote, got {told}"
        ) from error


def write_comparison(path: Path, found: ComparisonDocument) -> None:
    """Write a comparison with a search a line, so that a difference can be read."""
    document = found.model_dump(mode="json")
    searches = [json.dumps(search, ensure_ascii=False) for search in document.pop("searches")]
    rest = json.dumps(document, indent=1, ensure_ascii=False)
    lines = ",\n  ".join(searches)
    write_atomically(path, f'{rest[:-2]},\n "searches": [\n  {lines}\n ]\n}}\n')
