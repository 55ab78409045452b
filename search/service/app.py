"""The application: the REST interface at /v1, described by /v1/openapi.json."""

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from anyio import to_thread
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from search.service.doors import Doors
from search.service.guard import Guard, Rate
from search.service.pages import router as pages
from search.service.policy import Policy
from search.service.problems import answer_with_problems
from search.service.routes import router
from search.service.store import Store
from search.service.supervisor import Supervisor
from search.service.tokens import Tokens

__all__ = ["Settings", "create_app"]

# One thread of Python runs at a time. With forty, each small wait for the disk is a wait for all
# the others, too: the longest hundredth of the answers took three times as long.
_THREADS = 4
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True)
class Settings:
    """How the service meets those who ask.

    Attributes:
        policy: What a config may name.
        login: Whether tokens are asked for; without, everybody is admin.
        body_bytes: That a request's body may have.
        per_second: Requests of one address, in the long run.
        burst: The same after a pause.
    """

    policy: Policy = field(default_factory=Policy)
    login: bool = True
    body_bytes: int = 1 << 20
    per_second: float = 20
    burst: int = 100


def create_app(store: Store, settings: Settings, supervisor: Supervisor | None = None) -> FastAPI:
    """Build the application.

    Args:
        store: The searches.
        settings: How it meets those who ask.
        supervisor: Looks after the searches, for as long as the application runs; None: nobody.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        store.reindex()
        if supervisor is not None:
            supervisor.start()
        to_thread.current_default_thread_limiter().total_tokens = _THREADS
        gc.freeze()  # to look through all that was imported would hold up requests for 0.2 s
        yield
        if supervisor is not None:
            supervisor.close()
        store.close()

    app = FastAPI(
        title="hawq-search",
        version="1",
        lifespan=lifespan,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # its page would load its scripts from elsewhere
        redoc_url=None,
    )
    app.add_middleware(
        Guard,
        rate=Rate(settings.per_second, settings.burst),
        body_bytes=settings.body_bytes,
        hosts=() if settings.login else _LOOPBACK,
    )
    answer_with_problems(app)
    tokens = Tokens(store.engine) if settings.login else None
    app.state.doors = Doors(store, tokens, settings.policy)
    app.include_router(router)
    app.include_router(pages)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _described(app: FastAPI) -> dict[str, Any]:
    """Describe the interface; refusals are problem documents."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description="Submit, watch, cancel and resume searches.",
            routes=app.routes,
        )
        for operations in schema["paths"].values():
            for operation in operations.values():
                for code, response in operation["responses"].items():
                    content = response.get("content", {})
                    if code.startswith("4") and "application/json" in content:
                        content["application/problem+json"] = content.pop("application/json")
        app.openapi_schema = schema
    return app.openapi_schema
