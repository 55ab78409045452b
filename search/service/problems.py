"""Refusals as problem documents (RFC 9457): every one names what is wrong, and where."""

import json
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from search.config import SearchConfig
from search.config_file import mistakes
from search.service.policy import PolicyError
from search.service.record import StateError
from search.service.store import KeyReusedError, NoSearchError, SearchActiveError
from search.service.tokens import TokenRefusedError

__all__ = ["Mistake", "Problem", "answer_with_problems", "problem"]

_MEDIA = "application/problem+json"
_SHOWN = 80


class Mistake(BaseModel):
    """One thing that is wrong with a request."""

    field: str = Field(description="Dotted path in the body, or name of the parameter or header.")
    detail: str


class Problem(BaseModel):
    """Why a request was refused (RFC 9457)."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    errors: list[Mistake] = []


def problem(
    status: int,
    detail: str,
    mistakes: Sequence[Mistake] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a refusal.

    Args:
        status: Of HTTP.
        detail: What is wrong, and what would be right.
        mistakes: The same by fields.
        headers: More headers.
    """
    document = Problem(
        title=HTTPStatus(status).phrase, status=status, detail=detail, errors=list(mistakes)
    )
    # ASCII, for what was sent may hold characters that no encoding has.
    text = json.dumps(document.model_dump())
    return Response(text, status, dict(headers or {}), _MEDIA)


def answer_with_problems(app: FastAPI) -> None:
    """Let an application answer every refusal and failure of its own with a problem document."""

    @app.exception_handler(RequestValidationError)
    def wrong(_: Request, error: RequestValidationError) -> Response:
        found = [_found(one, error.body) for one in error.errors()]
        fields = ", ".join(dict.fromkeys(mistake.field for mistake in found))
        return problem(422, f"the request is wrong in {fields}", found)

    @app.exception_handler(HTTPException)
    def refused(_: Request, error: HTTPException) -> Response:
        return problem(error.status_code, error.detail, headers=error.headers)

    @app.exception_handler(NoSearchError)
    def absent(_: Request, __: NoSearchError) -> Response:
        return problem(404, "there is no such search, or it is somebody else's")

    @app.exception_handler(PolicyError)
    def forbidden(_: Request, error: PolicyError) -> Response:
        found = Mistake(field=error.field, detail=str(error))
        return problem(403, f"{error.field} {error}", [found])

    @app.exception_handler(KeyReusedError)
    def reused(_: Request, error: KeyReusedError) -> Response:
        found = Mistake(field="Idempotency-Key", detail=f"must be new for a new search: {error}")
        return problem(422, f"{found.field} {found.detail}", [found])

    @app.exception_handler(StateError)
    def conflicting(_: Request, error: StateError) -> Response:
        return problem(409, str(error))

    @app.exception_handler(SearchActiveError)
    def active(_: Request, __: SearchActiveError) -> Response:
        return problem(409, "a search must have ended to be deleted: cancel it first")

    @app.exception_handler(TokenRefusedError)
    def unknown(_: Request, error: TokenRefusedError) -> Response:
        challenge = {"WWW-Authenticate": 'Bearer realm="hawq"'}
        return problem(401, f"{error}: send Authorization: Bearer TOKEN", headers=challenge)

    @app.exception_handler(Exception)
    def broken(_: Request, __: Exception) -> Response:
        return problem(500, "the service failed; its log says why")


def _found(error: Mapping[str, Any], body: object) -> Mistake:
    """Return what one of FastAPI's errors stands for, in the words of the command line."""
    place, *path = error["loc"]
    if place != "body":
        detail = error["msg"]
        if error["type"] == "string_pattern_mismatch":
            detail = f"must match {error['ctx']['pattern']}, got {str(error['input'])[:_SHOWN]!r}"
        return Mistake(field=".".join(map(str, path)), detail=detail)
    if not isinstance(body, dict):
        return Mistake(field="body", detail=f"must be a config as JSON: {error['msg']}")
    try:
        SearchConfig.model_validate(body)
    except ValidationError as refused:
        lines = mistakes(refused, SearchConfig)
        for one, line in zip(refused.errors(), lines, strict=True):
            if list(one["loc"]) == path:
                return _mistake(".".join(map(str, path)), line)
    return Mistake(field=".".join(map(str, path)) or "body", detail=error["msg"])


def _mistake(path: str, line: str) -> Mistake:
    """Take a line of the command line's apart, which may name the field by itself."""
    if path:
        return Mistake(field=path, detail=line.removeprefix(f"{path}: "))
    named = re.match(r"([a-z_]+(?:\.\w+)*): ", line)
    return Mistake(field=named[1] if named else "body", detail=line[named.end() if named else 0 :])
