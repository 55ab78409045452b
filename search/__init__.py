"""Everything with side effects: Ray, Tune, files, the command line; ``search.run`` is all of it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.api import run

__all__ = ["run"]


def __getattr__(name: str) -> object:
    # Torch and Ray take seconds, which `hawq --help` should not wait for.
    if name == "run":
        from search.api import run  # noqa: PLC0415

        return run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
