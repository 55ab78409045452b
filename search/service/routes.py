"""The routes of the interface, each a function of a few lines."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi import Path as InPath
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sse_starlette import EventSourceResponse
from starlette.responses import FileResponse, PlainTextResponse, StreamingResponse

from search.artefacts import Summary
from search.config import SearchConfig
from search.service.doors import Inside
from search.service.problems import Problem, problem
from search.service.record import Record, State, StateError
from search.service.store import NoSearchError, Store
from search.service.streams import follow, follow_events
from search.service.tokens import Caller
from search.service.views import (
    Artefact,
    CallerView,
    Health,
    SearchPage,
    SearchView,
    artefacts_of,
    page_view,
    view,
)

__all__ = ["router"]

_LINE_BYTES = 512
# A report is the work of a run, and must not act as a page of the service.
_SANDBOX = {
    "Content-Security-Policy": "sandbox allow-scripts",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter(prefix="/v1")

_bearer = HTTPBearer(auto_error=False, description="A token, made by hawq token make.")


# What waits for nothing is asynchronous, and what follows from it at once is one function: a
# function that may wait has a thread to itself, which costs more than most of what is done there.
async def _searches(inside: Inside) -> Store:
    return inside.store


Searches = Annotated[Store, Depends(_searches)]


async def _secret(
    given: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> str | None:
    return given.credentials if given else None


Secret = Annotated[str | None, Depends(_secret)]


def _caller(inside: Inside, secret: Secret) -> Caller:
    return inside.caller(secret)


Asking = Annotated[Caller, Depends(_caller)]


def _owned(
    search: Annotated[str, InPath(description="A search's id.")], inside: Inside, secret: Secret
) -> Record:
    return inside.owned(search, inside.caller(secret))


Owned = Annotated[Record, Depends(_owned)]

_Responses = dict[int | str, dict[str, Any]]
_OPEN: _Responses = {code: {"model": Problem} for code in (400, 413, 422, 429)}
_ASKED: _Responses = _OPEN | {401: {"model": Problem}}
_OF_SEARCH: _Responses = _ASKED | {404: {"model": Problem}}
_OF_STATE: _Responses = _OF_SEARCH | {409: {"model": Problem}}

Name = Annotated[str, Query(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]{0,63}$")]


@router.get("/health", responses=_OPEN)
def health() -> Health:
    """Tell that the service answers; needs no token."""
    return Health(status="ok")


@router.get("/me", responses=_ASKED)
def me(asking: Asking) -> CallerView:
    """Tell who asks."""
    return CallerView(name=asking.name, is_admin=asking.is_admin)


@router.post(
    "/searches",
    status_code=201,
    responses=_ASKED
    | {
        200: {"model": SearchView, "description": "It was submitted before."},
        403: {"model": Problem},
    },
)
def submit(
    config: SearchConfig,
    response: Response,
    inside: Inside,
    asking: Asking,
    name: Name = "search",
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern=r"^[!-~]{1,128}$",
            description="Of two submissions with one key, the second is the first.",
        ),
    ] = None,
) -> SearchView:
    """Submit a search; the body is its config."""
    inside.policy.refuse(config)
    record, is_new = inside.store.submit(config, owner=asking.name, name=name, key=idempotency_key)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/v1/searches/{record.id}"
    return view(inside.store, record)


@router.get("/searches", responses=_OF_SEARCH)
def searches(
    inside: Inside,
    asking: Asking,
    state: Annotated[State | None, Query(description="In this state alone.")] = None,
    name: Name | None = None,
    owner: Annotated[
        str | None,
        Query(pattern=r"^[^\x00]{1,64}$", description="Whose; one sees only one's own."),
    ] = None,
    after: Annotated[str | None, Query(max_length=64, description="As a page says.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> SearchPage:
    """List searches, the latest first."""
    if not asking.is_admin:
        owner = asking.name
    if after is not None:
        inside.owned(after, asking)
    page = inside.store.page(owner=owner, state=state, name=name, after=after, limit=limit)
    return page_view(inside.store, page)


@router.get("/searches/{search}", responses=_OF_SEARCH)
def search(record: Owned, store: Searches) -> SearchView:
    """Tell how far a search is."""
    return view(store, record)


@router.get("/searches/{search}/config", responses=_OF_SEARCH)
def config(record: Owned, store: Searches) -> SearchConfig:
    """Return what was submitted."""
    return store.folder(record.id).config()


@router.post("/searches/{search}/cancel", status_code=202, responses=_OF_STATE)
def cancel(record: Owned, store: Searches) -> SearchView:
    """Cancel a search; what is finished is kept."""
    return view(store, store.change(record.id, Record.cancelled))


@router.post("/searches/{search}/resume", status_code=202, responses=_OF_STATE)
def resume(record: Owned, store: Searches) -> SearchView:
    """Let a failed or cancelled search go on from where it was."""
    return view(store, store.change(record.id, Record.resumed))


@router.delete("/searches/{search}", status_code=204, responses=_OF_STATE)
def delete(record: Owned, store: Searches) -> None:
    """Delete a search that has ended, and all that it found."""
    store.delete(record.id)


@router.get("/searches/{search}/logs", responses=_OF_SEARCH, response_class=PlainTextResponse)
def logs(
    record: Owned,
    store: Searches,
    attempt: Annotated[
        int | None, Query(ge=1, le=1 << 31, description="Number; the latest if not given.")
    ] = None,
    tail: Annotated[int, Query(ge=1, le=10_000, description="Lines, at most.")] = 1000,
    follow_on: Annotated[
        bool, Query(alias="follow", description="Go on until the search has ended.")
    ] = False,
) -> Response:
    """Return the end of an attempt's log."""
    number = attempt or record.attempt
    if number > record.attempt:
        return problem(404, f"the latest attempt is {record.attempt}, got {number}")
    path = store.folder(record.id).log(number)
    start, text = _tail(path, tail)
    if not follow_on:
        return PlainTextResponse(text)
    chunks = follow(path, start, lambda: _has_ended(store, record.id))
    return StreamingResponse(chunks, media_type="text/plain; charset=utf-8")


@router.get(
    "/searches/{search}/events",
    responses=_OF_SEARCH | {200: {"content": {"text/event-stream": {}}}},
    response_class=EventSourceResponse,
)
def events(
    record: Owned,
    store: Searches,
    last_event_id: Annotated[
        int, Header(ge=0, le=1 << 53, description="Id of the last event that was seen.")
    ] = 0,
) -> EventSourceResponse:
    """Stream what happens, until the search has ended.

    A message is a line of the run's events.jsonl; the last one is of the event ``end`` and
    holds the search.
    """
    path = store.folder(record.id).events
    stream = follow_events(path, last_event_id, _end(store, record.id))
    return EventSourceResponse(stream, ping=15)


@router.get(
    "/searches/{search}/result",
    response_class=FileResponse,
    responses=_OF_STATE | {200: {"model": Summary}},
)
def result(record: Owned, store: Searches) -> Response:
    """Return what a search found: the run's summary.json."""
    if record.state != "succeeded":
        raise StateError(
            f"a search must have succeeded to have a result, got one that is {record.state}"
        )
    return _file(store.folder(record.id).run / "summary.json")


@router.get("/searches/{search}/artefacts", responses=_OF_SEARCH)
def artefacts(record: Owned, store: Searches) -> list[Artefact]:
    """List the files of a run."""
    return artefacts_of(store.folder(record.id))


@router.get(
    "/searches/{search}/artefacts/{path:path}",
    responses=_OF_SEARCH | {200: {"content": {"application/octet-stream": {}}}},
    response_class=FileResponse,
)
def artefact(
    record: Owned,
    store: Searches,
    path: Annotated[str, InPath(description="As the list says.")],
) -> Response:
    """Download a file of a run."""
    folder = store.folder(record.id)
    # Nothing but a name of the list is ever joined to the folder.
    if path not in {one.path for one in artefacts_of(folder)}:
        return problem(404, "the run has no such file")
    return _file(folder.run / path)


def _file(path: Path) -> Response:
    if not path.is_file():  # it was deleted in this moment, or by hand
        return problem(404, f"the run has no {path.name} any more")
    return FileResponse(path, headers=_SANDBOX)


def _has_ended(store: Store, search: str) -> bool:
    try:
        return store.get(search).has_ended
    except NoSearchError:  # deleted meanwhile
        return True


def _end(store: Store, search: str) -> Callable[[], str | None]:
    def end() -> str | None:
        try:
            record = store.get(search)
        except NoSearchError:
            return "null"
        return view(store, record).model_dump_json() if record.has_ended else None

    return end


def _tail(path: Path, lines: int) -> tuple[int, str]:
    """Return where a file's last lines begin, and their text."""
    if not path.exists():
        return 0, ""
    start = max(0, path.stat().st_size - lines * _LINE_BYTES)
    with path.open("rb") as file:
        file.seek(start)
        content = file.read()
    kept = content.splitlines(keepends=True)[-lines:]
    size = sum(map(len, kept))
    return start + len(content) - size, b"".join(kept).decode(errors="replace")
