"""The process that serves: one for each store."""

import fcntl
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvicorn

from search.errors import InputError
from search.service.app import Settings, create_app
from search.service.launcher import Launcher
from search.service.local_ray import LocalRay, with_token
from search.service.processes import Processes
from search.service.ray_jobs import RayJobs
from search.service.reconcile import Limits
from search.service.store import Store
from search.service.supervisor import Capacity, Supervisor
from search.service.tokens import Tokens

__all__ = ["serve"]

_LOOPBACK = {"127.0.0.1", "::1", "localhost"}
# Time for a request that is under way; streams go on for as long as their searches do.
_GRACE_SECONDS = 3


def serve(
    path: Path,
    settings: Settings,
    *,
    host: str,
    port: int,
    database: str | None = None,
    ray_address: str | None = None,
    python: str | None = None,
    limits: Limits | None = None,
    capacity: Capacity | None = None,
) -> None:
    """Serve a store until a signal ends it.

    Args:
        path: The store's folder.
        settings: How those are met who ask.
        host: To listen on.
        port: To listen on.
        database: URL of the index; None: a file in the store.
        ray_address: Of a cluster's dashboard, ``http://host:8265``; None: Ray on this machine.
        python: What starts attempts on the cluster; None: as here.
        limits: How patient to be.
        capacity: How many searches at once.

    Raises:
        InputError: If something that was given is wrong, or another process serves the store.
    """
    if not settings.login and host not in _LOOPBACK:
        raise InputError(
            f"--no-login: must go with a loopback --host (127.0.0.1), got {host}: anybody who "
            "reaches the service could do anything"
        )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(path):
        store = Store(path, database)
        if settings.login and not Tokens(store.engine).all():
            logging.getLogger("hawq.service").warning("there is no token yet: hawq token make NAME")
        launcher, patience = _launcher(store, ray_address, python, limits or Limits())
        supervisor = Supervisor(store, launcher, patience, capacity or Capacity())
        uvicorn.run(
            create_app(store, settings, supervisor),
            host=host,
            port=port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=_GRACE_SECONDS,
        )


def _launcher(
    store: Store, ray_address: str | None, python: str | None, limits: Limits
) -> tuple[Launcher, Limits]:
    if ray_address is not None:
        return RayJobs(ray_address, python or sys.executable), limits
    environment = with_token(os.environ, store.path / "ray.token")
    ray = LocalRay(store.path / "ray.log", environment)
    # A process that this one did not start has ended with the service that did.
    return Processes(ray, environment), replace(limits, absent_seconds=0)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the store for this process.

    Raises:
        InputError: If another one holds it.
    """
    with (path / "service.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--store: {path} must not be served by another process, got one that does"
            ) from error
        yield
