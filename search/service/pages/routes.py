"""What is shown at which address, and where forms go; all but the look is the API's."""

import time
from importlib.resources import files
from typing import Annotated, Literal, get_args
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request
from plotly.offline import get_plotlyjs_version
from sse_starlette import EventSourceResponse
from starlette.responses import FileResponse, RedirectResponse, Response

from search.errors import InputError
from search.report.palette import looks
from search.service import routes as api
from search.service.doors import Inside
from search.service.pages.panels import drawing
from search.service.pages.rendering import PageRoute, figures_json, page
from search.service.pages.side_by_side import found_by, front_figure, rows
from search.service.pages.stages import events_of, stage_names, stages_of_run, warnings_of
from search.service.pages.visitors import (
    Form,
    Owned,
    SentHere,
    Visitor,
    forget,
    remember,
)
from search.service.record import ENDED, Record, State
from search.service.tokens import TokenRefusedError
from search.service.views import artefacts_of, page_view, view

__all__ = ["router"]

_STATES = get_args(State)
_PAGE = 25
_MOST_COMPARED = 8
_MOST_WARNINGS = 5
# Of a run's files those that people ask for; the others are below "All files".
_FIRST = (
    *("report.html", "comparison.html", "summary.json", "config.yaml"),
    *("best/model.safetensors", "best/allocation.json"),
)
_PARTS = {"pages.css": "text/css", "pages.js": "text/javascript"}
_PLOTLY_VERSION = get_plotlyjs_version()

router = APIRouter(route_class=PageRoute, include_in_schema=False)


@router.get("/")
def start() -> Response:
    """Lead to the list."""
    return RedirectResponse("/searches", 303)


@router.get("/pages/plotly.min.js")
def plotly() -> Response:
    """Return the plotly.js of the installed plotly; the address has its version."""
    path = files("plotly").joinpath("package_data/plotly.min.js")
    kept = {"Cache-Control": "public, max-age=31536000, immutable"}
    return FileResponse(str(path), media_type="text/javascript", headers=kept)


@router.get("/pages/{name}")
def part(name: str) -> Response:
    """Return the style or the script of the pages."""
    if name not in _PARTS:
        return page("refusal", 404, words="There is no such file.")
    text = files("search.service.pages").joinpath(name).read_text(encoding="utf-8")
    return Response(text, media_type=_PARTS[name], headers={"Cache-Control": "no-cache"})


@router.get("/login")
def login(inside: Inside) -> Response:
    """Ask for a token."""
    return RedirectResponse("/searches", 303) if inside.tokens is None else page("login", wrong="")


@router.post("/login", dependencies=[SentHere])
def enter(request: Request, inside: Inside, form: Form) -> Response:
    """Take a token, if it is good."""
    if inside.tokens is None:
        return RedirectResponse("/searches", 303)
    secret = form.get("token", "").strip()
    try:
        inside.tokens.caller(secret)
    except TokenRefusedError as error:
        return page("login", 401, wrong=str(error))
    response = RedirectResponse("/searches", 303)
    remember(request, response, secret)
    return response


@router.post("/logout", dependencies=[SentHere])
def leave() -> Response:
    """Forget the token."""
    response = RedirectResponse("/login", 303)
    forget(response)
    return response


@router.get("/searches")
def searches(
    inside: Inside,
    visitor: Visitor,
    state: Annotated[State | Literal[""], Query()] = "",
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """List searches, the latest first."""
    owner = None if visitor.is_admin else visitor.name
    found = page_view(
        inside.store, inside.store.page(owner=owner, state=state or None, after=after, limit=_PAGE)
    )
    kept = {"state": state} if state else {}
    return page(
        "list",
        visitor=visitor,
        has_login=inside.tokens is not None,
        searches=found.searches,
        now=time.time(),
        states=_STATES,
        state=state,
        is_later=after is not None,
        following=urlencode(kept | {"after": found.after}) if found.after else None,
        ended=ENDED,
    )


@router.get("/searches/{search}")
def one_search(record: Owned, inside: Inside, visitor: Visitor) -> Response:
    """Show a search, live."""
    folder = inside.store.folder(record.id)
    seen = folder.events.stat().st_size if folder.events.exists() else 0
    events, drawn = events_of(folder.events), drawing(folder)
    files_there = artefacts_of(folder)
    return page(
        "search",
        visitor=visitor,
        has_login=inside.tokens is not None,
        search=view(inside.store, record),
        seen=seen,
        now=time.time(),
        has_ended=record.has_ended,
        is_resumable=record.state in {"failed", "cancelled"},
        stages=stages_of_run(
            stage_names(folder.config()),
            events,
            is_running=record.state in {"running", "cancelling"},
        ),
        warnings=warnings_of(events)[-_MOST_WARNINGS:],
        drawn=drawn,
        looks=drawn.looks,
        figures=figures_json({panel.id: panel.figure for panel in drawn.panels}),
        plotly_version=_PLOTLY_VERSION,
        log=folder.log_end(record.attempt) if record.attempt else "",
        first=[one for name in _FIRST for one in files_there if one.path == name],
        others=[one for one in files_there if one.path not in _FIRST],
    )


@router.get("/searches/{search}/events")
def events(
    request: Request, record: Owned, inside: Inside, after: Annotated[int, Query(ge=0)] = 0
) -> EventSourceResponse:
    """Stream what happens, as the API does."""
    last = request.headers.get("last-event-id", "")
    return api.events(record, inside.store, int(last) if last.isdecimal() else after)


@router.get("/searches/{search}/log")
def log(record: Owned, inside: Inside) -> Response:
    """Return the latest attempt's log, as the API does."""
    return api.logs(record, inside.store, None, 10_000, False)


@router.get("/searches/{search}/files/{path:path}")
def download(record: Owned, inside: Inside, path: str) -> Response:
    """Return a file of the run, as the API does."""
    return api.artefact(record, inside.store, path)


@router.post("/searches/{search}/cancel", dependencies=[SentHere])
def cancel(record: Owned, inside: Inside) -> Response:
    """Cancel a search."""
    inside.store.change(record.id, Record.cancelled)
    return RedirectResponse(f"/searches/{record.id}", 303)


@router.post("/searches/{search}/resume", dependencies=[SentHere])
def resume(record: Owned, inside: Inside) -> Response:
    """Let a search go on."""
    inside.store.change(record.id, Record.resumed)
    return RedirectResponse(f"/searches/{record.id}", 303)


@router.post("/searches/{search}/delete", dependencies=[SentHere])
def delete(record: Owned, inside: Inside) -> Response:
    """Delete a search."""
    inside.store.delete(record.id)
    return RedirectResponse("/searches", 303)


@router.get("/compare")
def compare(
    inside: Inside, visitor: Visitor, search: Annotated[list[str], Query(default_factory=list)]
) -> Response:
    """Show several searches side by side."""
    chosen = list(dict.fromkeys(search))
    if not 2 <= len(chosen) <= _MOST_COMPARED:
        raise InputError(
            f"A comparison must be of 2 to {_MOST_COMPARED} searches, got {len(chosen)}: go back "
            "and tick some."
        )
    found = []
    for one in chosen:
        record = inside.owned(one, visitor)
        found.append(found_by(record, inside.store.folder(record.id)))
    return page(
        "compare",
        visitor=visitor,
        has_login=inside.tokens is not None,
        found=found,
        rows=rows(found),
        shown=looks([one.record.id for one in found]),
        score_names=list(dict.fromkeys(one.score_name for one in found if one.candidates)),
        figures=figures_json({"fronts": front_figure(found)}),
        plotly_version=_PLOTLY_VERSION,
    )
