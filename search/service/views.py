"""What the interface tells of searches."""

from pydantic import BaseModel, ConfigDict, Field

from search.events import Event
from search.service.record import Record, SearchFolder, State
from search.service.store import NoSearchError, Page, Store

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
    """Show a search."""
    heartbeat = store.folder(record.id).heartbeat()
    latest = heartbeat.latest if heartbeat and heartbeat.attempt == record.attempt else None
    return SearchView.model_validate(record.model_dump() | {"latest": latest})


def page_view(store: Store, page: Page) -> SearchPage:
    """Show some searches; one that is deleted in this moment is left out."""
    found = []
    for record in page.records:
        try:
            found.append(view(store, record))
        except NoSearchError:
            continue
    return SearchPage(searches=found, after=page.after)


def artefacts_of(folder: SearchFolder) -> list[Artefact]:
    """List a run's files, without locks, temporary ones, Ray's own, and links."""
    found = []
    for path in sorted(folder.run.rglob("*")):
        inside = path.relative_to(folder.run)
        hidden = any(part.startswith(".") for part in inside.parts) or path.suffix == ".lock"
        if hidden or inside.parts[0] == "tune" or path.is_symlink() or not path.is_file():
            continue
        try:
            status = path.stat()
        except FileNotFoundError:  # a run that goes on replaces files
            continue
        found.append(Artefact(path=str(inside), size=status.st_size, modified=status.st_mtime))
    return found
