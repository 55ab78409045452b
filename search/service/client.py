"""The service from outside: what ``hawq submit`` and its sisters ask for."""

import json
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx

from search.config import SearchConfig
from search.errors import InputError
from search.events import Event
from search.service.views import Artefact, SearchPage, SearchView

__all__ = ["Client"]

_TIMEOUT = httpx.Timeout(30.0)
_PINGED = httpx.Timeout(30.0, read=60.0)  # a stream of events is never silent for so long
_SILENCE = httpx.Timeout(30.0, read=None)  # a log may be
_LOST_SECONDS = 2.0


class Client:
    """Asks a service; use it as a context manager.

    Args:
        url: Such as ``http://127.0.0.1:8300``.
        token: As ``hawq token make`` gave it; None where the service asks for none.
        patience_seconds: How long a watched service may be away.
    """

    def __init__(self, url: str, token: str | None, *, patience_seconds: float = 120) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._url, self._patience = url, patience_seconds
        try:
            self._http = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT)
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            raise InputError(
                f"--url: must be such as http://127.0.0.1:8300, got {url!r}"
            ) from error

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def submit(self, config: SearchConfig, *, name: str, key: str | None) -> SearchView:
        """Submit a search."""
        headers = {} if key is None else {"Idempotency-Key": key}
        body = config.model_dump(mode="json")
        found = self._ask("POST", "/v1/searches", params={"name": name}, headers=headers, body=body)
        return SearchView.model_validate(found.json())

    def page(self, **asked: str | int | None) -> SearchPage:
        """List searches; ``state``, ``name``, ``owner``, ``after`` and ``limit`` as the API has."""
        params = {key: value for key, value in asked.items() if value is not None}
        return SearchPage.model_validate(self._ask("GET", "/v1/searches", params=params).json())

    def get(self, search: str) -> SearchView:
        """Return a search."""
        return SearchView.model_validate(self._ask("GET", f"/v1/searches/{_quoted(search)}").json())

    def cancel(self, search: str) -> SearchView:
        """Cancel a search."""
        found = self._ask("POST", f"/v1/searches/{_quoted(search)}/cancel")
        return SearchView.model_validate(found.json())

    def resume(self, search: str) -> SearchView:
        """Let a search go on."""
        found = self._ask("POST", f"/v1/searches/{_quoted(search)}/resume")
        return SearchView.model_validate(found.json())

    def delete(self, search: str) -> None:
        """Delete a search."""
        self._ask("DELETE", f"/v1/searches/{_quoted(search)}")

    def result(self, search: str) -> dict[str, Any]:
        """Return what a search found."""
        found: dict[str, Any] = self._ask("GET", f"/v1/searches/{_quoted(search)}/result").json()
        return found

    def artefacts(self, search: str) -> list[Artefact]:
        """List the files of a run."""
        found = self._ask("GET", f"/v1/searches/{_quoted(search)}/artefacts").json()
        return [Artefact.model_validate(one) for one in found]

    def download(self, search: str, path: str) -> bytes:
        """Return a file of a run."""
        return self._ask("GET", f"/v1/searches/{_quoted(search)}/artefacts/{quote(path)}").content

    def logs(self, search: str, *, attempt: int | None, tail: int, follow: bool) -> Iterator[str]:
        """Yield the end of a log in pieces."""
        params: dict[str, Any] = {"tail": tail, "follow": follow}
        if attempt is not None:
            params["attempt"] = attempt
        path = f"/v1/searches/{_quoted(search)}/logs"
        try:
            with self._http.stream("GET", path, params=params, timeout=_SILENCE) as answer:
                if answer.is_error:
                    answer.read()
                yield from self._checked(answer).iter_text()
        except httpx.TransportError as error:
            raise self._away(error) from error

    def events(self, search: str) -> Iterator[Event | SearchView]:
        """Yield what happens, and at the end the search; a service that comes back is asked again.

        Raises:
            InputError: If it stays away, or refuses.
        """
        seen, away_since = "0", None
        while True:
            try:
                for number, kind, data in self._messages(search, seen):
                    away_since = None
                    if kind == "end":
                        yield SearchView.model_validate_json(data)
                        return
                    seen = number
                    yield Event(**json.loads(data))
            except httpx.TransportError as error:
                now = time.monotonic()
                away_since = away_since or now
                if now - away_since > self._patience:
                    raise self._away(error) from error
            time.sleep(_LOST_SECONDS)

    def _messages(self, search: str, seen: str) -> Iterator[tuple[str, str, str]]:
        """Yield id, kind and data of each message of an event stream."""
        path, headers = f"/v1/searches/{_quoted(search)}/events", {"Last-Event-ID": seen}
        with self._http.stream("GET", path, headers=headers, timeout=_PINGED) as answer:
            if answer.is_error:
                answer.read()
            fields: dict[str, str] = {}
            for line in self._checked(answer).iter_lines():
                name, _, value = line.partition(":")
                if line:
                    fields[name] = value.removeprefix(" ")
                elif "data" in fields:
                    yield fields.get("id", ""), fields.get("event", ""), fields["data"]
                    fields = {}

    def _ask(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
        body: object = None,
    ) -> httpx.Response:
        try:
            answer = self._http.request(method, path, params=params, headers=headers, json=body)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._away(error) from error
        return self._checked(answer)

    def _checked(self, answer: httpx.Response) -> httpx.Response:
        if not answer.is_error:
            return answer
        try:
            problem = answer.json()
            lines = [f"{one['field']}: {one['detail']}" for one in problem.get("errors", [])]
            raise InputError("\n".join(lines) or problem["detail"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--url: {self._url} must be a hawq service, got status {answer.status_code}"
            ) from error

    def _away(self, error: Exception) -> InputError:
        return InputError(
            f"--url: a hawq service must answer at {self._url}, got {error}: start one with hawq "
            "serve, or give another --url (or HAWQ_URL)"
        )


def _quoted(search: str) -> str:
    return quote(search, safe="")
