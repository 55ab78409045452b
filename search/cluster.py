"""The door to Ray: the one place that starts it or joins it."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.job_config import JobConfig

from search.errors import InputError

__all__ = ["connected", "num_workers", "refuse_unreachable"]

_REACH_SECONDS = 5.0


@contextmanager
def connected(
    address: str | None, *, dashboard: bool, about: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Join a cluster, or start Ray on this machine; leave it afterwards.

    Args:
        address: ``host:port``, ``ray://host:port``, ``auto``, or None for this machine.
        dashboard: Whether a local Ray gets the dashboard.
        about: What is done there, for those who watch the cluster's jobs: names to values.

    Yields:
        Where to watch, in words.

    Raises:
        InputError: If nothing answers at the address.
    """
    if ray.is_initialized():  # someone else's, such as a test's: leave it running
        yield "Ray was up already"
        return
    # Tune would turn Ctrl-C into a normal end; ours leaves a run that resumes.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Tune's older output falls silent when asked to; its new one prints banners all the same.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Trials find relative paths, of a detector's config or of one's own factory, where we do.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # Else every worker without a GPU warns about a change of CUDA_VISIBLE_DEVICES to come.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray asks for a token by default and says so at length; the line that we yield is shorter.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    refuse_unreachable(address)
    try:
        context = ray.init(
            address=address or "local",
            include_dashboard=dashboard if address is None else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
            job_config=JobConfig(metadata=dict(about or {})),
        )
    except (ConnectionError, RuntimeError, TimeoutError) as error:
        raise InputError(
            f"ray.address: a Ray cluster must answer at {address or 'this machine'}, "
            f"got {str(error).strip().splitlines()[0]}"
        ) from error
    try:
        yield _watch(context.dashboard_url)
    finally:
        ray.shutdown()


def _watch(url: str | None) -> str:
    if not url:
        return "Ray is up, without a dashboard"
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    asked = os.environ.get("RAY_AUTH_MODE") != "disabled" and token.exists()
    return f"Ray dashboard: http://{url}" + (f" (token: {token})" if asked else "")


def num_workers(wanted: int | None, cpus: float, gpus: float) -> int:
    """Return how many workers to start: as asked, or as many as the cluster holds."""
    if wanted is not None:
        return wanted
    resources = ray.cluster_resources()
    fit = resources.get("CPU", 1.0) / cpus
    if gpus:
        fit = min(fit, resources.get("GPU", 0.0) / gpus)
    return max(1, int(fit))


def refuse_unreachable(address: str | None) -> None:
    """Refuse an address at which nothing listens, without Ray's long wait.

    Raises:
        InputError: If so.
    """
    if address is None or address == "auto":
        return
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not separator or not port.isdigit():
        raise InputError(
            f"ray.address: must be HOST:PORT, ray://HOST:PORT or auto, got {address!r}"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"ray.address: a Ray cluster must answer at {address}, "
            f"got {getattr(error, 'strerror', None) or error}: "
            "check the address, or leave it out to run on this machine"
        ) from error
