"""What the interface tells of searches."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from search.events import Event
from search.service.record import Record, SearchFolder, State
from search.service.store import Page, Store

__all__ = [
    "Artefact",
    "CallerView",
    "Health",
    "SearchPage",
    "SearchView",
    "artefacts_of",
    "page_view",
    "view",
]


class _View(BaseModel):
    model_config = ConfigDict(frozen=True)


class SearchView(_View):
    """A search, as those see it who may."""

    id: str
    name: str
    owner: str
    state: State
    reason: str = Field(description="Why it is in this state, where that is worth a word.")
    log_end: str = Field(description="The last lines of a failed search's log.")
    submitted: float = Field(description="Seconds since the epoch.")
    changed: float = Field(description="When the state changed, in seconds since the epoch.")
    attempt: int = Field(description="Number of the latest attempt; 0: none yet.")
    cpus: float = Field(description="That it cannot do without.")
    gpus: float = Field(description="That it cannot do without.")
    latest: Event | None = Field(description="What its driver told last.")


_OF_RECORD = tuple(name for name in SearchView.model_fields if name in Record.model_fields)


class SearchPage(_View):
    """Some searches, the latest first."""

    searches: list[SearchView]
    after: str | None = Field(description="To ask for what follows; null at the end.")


class Artefact(_View):
    """A file of a run."""

    path: str
    size: int = Field(description="Bytes.")
    modified: float = Field(description="Seconds since the epoch.")


class CallerView(_View):
    """Who asks."""

    name: str
    is_admin: bool


class Health(_View):
    """That the service answers, and looks after searches."""

    status: str


def view(store: Store, record: Record) -> SearchView:
    """Show a search, and what the driver of its latest attempt told last."""
    told = {name: getattr(record, name) for name in _OF_RECORD}
    heartbeat = store.heartbeat(record.id) if record.attempt else None
    latest = heartbeat.latest if heartbeat and heartbeat.attempt == record.attempt else None
    # Both were checked when they were read: a list has hundreds of them.
    return SearchView.model_construct(**told, latest=latest)


def page_view(store: Store, page: Page) -> SearchPage:
    """Show some searches."""
    return SearchPage(searches=[view(store, record) for record in page.records], after=page.after)


def artefacts_of(folder: SearchFolder) -> list[Artefact]:
    """List a run's files, without locks, temporary ones and Ray's own.

    A link counts as what it leads to, as ``best`` does, unless that is elsewhere.
    """
    return sorted(_files(folder.run, folder.run.resolve()), key=lambda found: found.path)


def _files(folder: Path, run: Path, inside: str = "") -> Iterator[Artefact]:
    try:
        entries = list(folder.iterdir())
    except FileNotFoundError:  # nothing there yet, or a link was moved on in this moment
        return
    for path in entries:
        name = f"{inside}{path.name}"
        # What best leads to has names of its own, which come and go.
        is_odd = path.name.startswith((".", "best.")) or path.suffix == ".lock"
        if is_odd or name == "tune":
            continue
        if path.is_symlink() and (inside or path.resolve().parent != run):
            continue
        if path.is_dir():
            yield from _files(path, run, f"{name}/")
        elif path.is_file():
            with suppress(FileNotFoundError):  # a run that goes on replaces files
                status = path.stat()
                yield Artefact(path=name, size=status.st_size, modified=status.st_mtime)
