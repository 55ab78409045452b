"""``hawq compare``: ways of searching side by side, in pieces if need be."""

from collections.abc import Sequence
from pathlib import Path

from search.comparison.document import ComparisonDocument
from search.comparison.file import read_comparison, write_comparison
from search.comparison.making import compared, restore_searches
from search.config_file import load_config
from search.errors import InputError
from search.events import Event, Listener
from search.pipeline import run

__all__ = ["compare"]


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
            write_comparison(kept, compared(out, path.stem))

    run(config, out, name=path.stem, force=force, listeners=[view, keep])
    found = read_comparison(out / "comparison.json")
    if kept is not None:
        write_comparison(kept, found)
    return found
