"""Who asks for a page: the API's own token, in a cookie that no script and no other site can use.

A form acts only if it was sent from a page of the service: the cookie is withheld from requests of
other sites (SameSite=Strict), and the Origin header, which every browser sends with a form, must
name this host. The latter alone protects a service without login.
"""

from typing import Annotated
from urllib.parse import parse_qs, urlsplit

from fastapi import Depends, Request, Response

from search.service.doors import Inside
from search.service.record import Record
from search.service.tokens import Caller

__all__ = [
    "ForeignFormError",
    "Form",
    "Owned",
    "SentHere",
    "Visitor",
    "forget",
    "remember",
]

_COOKIE = "hawq_token"


class ForeignFormError(ValueError):
    """A form was sent from elsewhere."""


def _visitor(request: Request, inside: Inside) -> Caller:
    return inside.caller(request.cookies.get(_COOKIE))


Visitor = Annotated[Caller, Depends(_visitor)]


def _owned(search: str, inside: Inside, visitor: Visitor) -> Record:
    return inside.owned(search, visitor)


Owned = Annotated[Record, Depends(_owned)]


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
