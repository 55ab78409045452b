"""Templates to answers, with the headers that keep a page to itself."""

import json
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse, RedirectResponse, Response

from search import quantities
from search.errors import InputError
from search.service.pages.visitors import ForeignFormError, forget
from search.service.record import StateError
from search.service.store import NoSearchError, SearchActiveError
from search.service.tokens import TokenRefusedError

__all__ = ["PageRoute", "figures_json", "page"]

_HEADERS = {
    # Plotly writes style elements of its own.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    # Without any referrer browsers send no Origin with a form either.
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_REFUSALS: dict[type[Exception], tuple[int, str]] = {
    NoSearchError: (404, "There is no such search, or it is somebody else’s."),
    SearchActiveError: (409, "A search must have ended to be deleted: cancel it first."),
    RequestValidationError: (422, "The address is not one that these pages have."),
}


def page(template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """Answer with one of the package's templates.

    Args:
        template: Name of its file, without the ending; the filters are the report's.
        status: Of HTTP.
        values: What the template shows.
    """
    text = _environment().get_template(f"{template}.html").render(**values)
    return HTMLResponse(text, status, _HEADERS)


def figures_json(figures: dict[str, go.Figure]) -> Markup:
    """Write figures as JSON by their elements' ids, for a script element."""
    # Plotly's JSON escapes every < and >, so that no name in it can end the element.
    parts = (f"{json.dumps(name)}: {figure.to_json()}" for name, figure in figures.items())
    return Markup(f"{{{', '.join(parts)}}}")


class PageRoute(APIRoute):
    """A route whose refusals are pages, too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the handler, with refusals answered."""
        answer = super().get_route_handler()

        async def answered(request: Request) -> Response:
            try:
                return await answer(request)
            except TokenRefusedError:
                response = RedirectResponse("/login", 303)
                forget(response)
                return response
            except tuple(_REFUSALS) as error:
                status, words = _REFUSALS[type(error)]
                return page("refusal", status, words=words)
            except ForeignFormError as error:
                return page("refusal", 403, words=str(error))
            except StateError as error:
                return page("refusal", 409, words=str(error))
            except InputError as error:
                return page("refusal", 422, words=str(error))

        return answered


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(quantities, name) for name in quantities.__all__}
    environment.filters["clock"] = _clock
    environment.filters["bytes"] = _bytes
    return environment


def _source(name: str) -> str | None:
    # Methods look as in a report.
    package = "search.report" if name == "methods.html" else "search.service.pages"
    return files(package).joinpath(name).read_text(encoding="utf-8")


def _clock(seconds: float) -> Markup:
    """Write a time of the epoch to the minute."""
    when = datetime.fromtimestamp(seconds, UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        when.isoformat(timespec="seconds"), when.strftime("%Y-%m-%d %H:%M UTC")
    )


def _bytes(size: int) -> str:
    """Write a file's size: ``312 B``, ``4.1 KiB``."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if value < 1000:
            break
        value, unit = value / 1024, larger
    return f"{value:.3g} {unit}"
