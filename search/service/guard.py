"""What stands before the routes: hosts, rates, and sizes of bodies."""

import time
from collections import OrderedDict
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from search.service.problems import problem

__all__ = ["Guard", "Rate"]

_MOST_CALLERS = 4096


class Rate:
    """So many requests a second, and so many at once after a pause, of each caller.

    Args:
        per_second: In the long run.
        burst: After a pause.
    """

    def __init__(self, per_second: float, burst: int) -> None:
        self._per_second, self._burst = per_second, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, caller: str, now: float) -> float:
        """Count a request, and return the seconds that it is too early; 0: it may pass."""
        left, since = self._left.pop(caller, (float(self._burst), now))
        left = min(self._burst, left + (now - since) * self._per_second)
        passes = left >= 1
        self._left[caller] = (left - passes, now)
        while len(self._left) > _MOST_CALLERS:  # who was not seen for the longest time
            self._left.popitem(last=False)
        return 0.0 if passes else (1 - left) / self._per_second


class Guard:
    """Refuses requests before anything reads them.

    Args:
        app: What is guarded.
        rate: Of each address that requests come from.
        body_bytes: That a request's body may have.
        hosts: That requests may be for; none: any. A page of another site that a browser takes
            for this one by a trick of DNS asks for its own.
    """

    def __init__(
        self, app: ASGIApp, *, rate: Rate, body_bytes: int, hosts: Sequence[str] = ()
    ) -> None:
        self._app, self._rate, self._body_bytes = app, rate, body_bytes
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or let it pass."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = headers.get("host", "").rsplit(":", 1)[0]
        if self._hosts and host not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            refusal = problem(400, f"the Host header must be one of {known}")
            await refusal(scope, receive, send)
            return
        client = scope.get("client")
        wait = self._rate.wait(client[0] if client else "", time.monotonic())
        if wait:
            again = {"Retry-After": str(int(wait) + 1)}
            refusal = problem(429, "there are too many requests: wait", headers=again)
            await refusal(scope, receive, send)
            return
        body = await self._body(headers, receive)
        if body is None:
            refusal = problem(413, f"the body must have at most {self._body_bytes} bytes")
            await refusal(scope, receive, send)
            return
        await self._app(scope, _replayed(body, receive), send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """Read a body; None if it is too large."""
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._body_bytes:
            return None
        body = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self._body_bytes:
                return None
        return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Return what gives a body that was read, then what follows."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
