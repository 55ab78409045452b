"""Which version of this program ran: the commit of its checkout, kept in a run's folder.

A run's results are what the program was when it made them, not when it is called again on a
finished folder: commits are noted when stages are made.
"""

import json
import subprocess
from pathlib import Path

from search.events import Event, Listener
from search.folder import write_atomically

__all__ = ["commits", "current_commit", "noting_commits"]

_ROOT = Path(__file__).resolve().parents[1]
_FILE = "commits.json"


def current_commit(root: Path = _ROOT) -> str | None:
    """Return the commit that this program is at; None where it is no git checkout.

    Args:
        root: Of the checkout; the folder that this package is in.

    Returns:
        Its first ten digits, with ``" with uncommitted changes"`` where the packages have any.
    """
    found = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    if found is None:
        return None
    top, commit = found.splitlines()
    if Path(top) != root:  # someone's repository that this program is merely installed in
        return None
    changed = _git(root, "status", "--porcelain", "--", "hawq", "envs", "search")
    return f"{commit[:10]}{' with uncommitted changes' if changed else ''}"


def noting_commits(run: Path) -> Listener:
    """Return a listener that notes the commit in a run's folder whenever a stage is made."""

    def note(event: Event) -> None:
        if event.kind != "started":
            return
        found, now = commits(run), current_commit()
        if now is not None and now not in found:
            write_atomically(run / _FILE, json.dumps([*found, now], indent=1))

    return note


def commits(run: Path) -> list[str]:
    """Return the commits that a run was made at; empty where none was noted."""
    path = run / _FILE
    found: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return found


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return None
    return done.stdout.strip()
