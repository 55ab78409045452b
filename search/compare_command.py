"""``hawq compare``: ways of searching side by side, in pieces if need be."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from search.comparison.document import ComparisonDocument
from search.comparison.making import compared, restore_searches
from search.config_file import load_config
from search.errors import InputError
from search.events import Event, Listener
from search.folder import write_atomically
from search.pipeline import run

__all__ = ["compare", "is_comparison", "read_comparison"]


def compare(
    path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    force: bool = False,
    kept: Path | None = None,
    view: Listener = lambda _: None,
) -> ComparisonDocument:
    """Run a comparison, or the rest of one.

    Args:
        path: The config; where it has no ``comparison``, the usual one is taken.
        out: The run's folder.
        overrides: ``KEY=VALUE``.
        force: Run again the stages that a changed config invalidates, instead of refusing.
        kept: File that finished searches are written to as they come, and taken from.
        view: Called with every event.

    Raises:
        InputError: If something that was given is wrong.
    """
    config = load_config(path, overrides)
    if config.comparison is None:
        config = load_config(path, [*overrides, "comparison={}"])
    if not config.searching:
        raise InputError(
            f"methods: must name one at least that searches, got {', '.join(config.methods)}"
        )
    if kept is not None and kept.exists():
        budgets = [budget.label for budget in config.budgets]
        restore_searches(out, read_comparison(kept).searches, budgets)

    def keep(event: Event) -> None:
        if kept is not None and event.stage == "searches" and event.kind == "note":
            _write(kept, compared(out, path.stem))

    run(config, out, name=path.stem, force=force, listeners=[view, keep])
    found = compared(out, path.stem)
    if kept is not None:
        _write(kept, found)
    return found


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
        told = str(error).splitlines()
        raise InputError(
            f"{path}: must be a comparison that hawq compare wrote, got {' '.join(told[:2])}"
        ) from error


def _write(path: Path, found: ComparisonDocument) -> None:
    """Write a comparison with a search a line, so that a difference can be read."""
    document = found.model_dump(mode="json")
    searches = [json.dumps(search, ensure_ascii=False) for search in document.pop("searches")]
    rest = json.dumps(document, indent=1, ensure_ascii=False)
    lines = ",\n  ".join(searches)
    write_atomically(path, f'{rest[:-2]},\n "searches": [\n  {lines}\n ]\n}}\n')
