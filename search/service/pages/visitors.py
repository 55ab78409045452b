"""Who asks for a page: the API's own token, in a cookie that no script and no other site can use.

A form acts only if it was sent from a page of the service: the cookie is withheld from requests of
other sites (SameSite=Strict), and the Origin header, which every browser sends with a form, must
name this host. The latter alone protects a service without login.
"""

from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from fastapi import Depends, Request, Response

from search.service.record import Record
from search.service.routes import Doors
from search.service.store import NoSearchError
from search.service.tokens import Caller, TokenRefusedError

__all__ = [
    "ForeignFormError",
    "Form",
    "Inside",
    "Owned",
    "SentHere",
    "Visitor",
    "forget",
    "owned",
    "remember",
]

_COOKIE = "hawq_token"


class ForeignFormError(ValueError):
    """A form was sent from elsewhere."""


def _doors(request: Request) -> Doors:
    found: Doors = request.app.state.doors
    return found


Inside = Annotated[Doors, Depends(_doors)]


def _visitor(request: Request, inside: Inside) -> Caller:
    if inside.tokens is None:
        return Caller("local", True)
    secret = request.cookies.get(_COOKIE)
    if secret is None:
        raise TokenRefusedError("a token must be given, got none")
    return inside.tokens.caller(secret)


Visitor = Annotated[Caller, Depends(_visitor)]


def owned(search: str, inside: Inside, visitor: Visitor) -> Record:
    """Return a search that somebody may see; another one is as if it were not there."""
    record = inside.store.get(search)
    if not visitor.is_admin and record.owner != visitor.name:
        raise NoSearchError(search)  # as the API says it
    return record


Owned = Annotated[Record, Depends(owned)]


def _refuse_foreign(request: Request) -> None:
    origin = request.headers.get("origin", "")
    if urlsplit(origin).netloc != request.headers.get("host") or not origin:
        raise ForeignFormError(f"a form must be sent from the service's own pages, got {origin!r}")


SentHere = Depends(_refuse_foreign)


async def _form(request: Request) -> dict[str, str]:
    body = (await request.body()).decode(errors="replace")
    return {name: values[-1] for name, values in parse_qs(body).items()}


Form = Annotated[dict[str, str], Depends(_form)]


def remember(request: Request, response: Response, secret: str) -> None:
    """Let a browser keep a token until it is closed."""
    response.set_cookie(
        _COOKIE,
        secret,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def forget(response: Response) -> None:
    """Let a browser drop its token."""
    response.delete_cookie(_COOKIE, httponly=True, samesite="strict")
