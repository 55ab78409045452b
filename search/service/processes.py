"""Attempts as processes beside the service, on a Ray of this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from search.service.launcher import Seen
from search.service.local_ray import LocalRay
from search.service.record import Record, SearchFolder

__all__ = ["Processes"]

_TERM_SECONDS = 5.0
# Of Ray's workers, unless its own setting says otherwise.
_NICENESS = "15"


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    stopped: float | None = None


class Processes:
    """Runs each attempt in a process that ends with the service.

    Args:
        ray: Where the attempts compute.
        environment: Of the processes.
    """

    outlives_service = False

    def __init__(self, ray: LocalRay, environment: Mapping[str, str]) -> None:
        self._ray, self._environment = ray, dict(environment)
        self._children: dict[str, _Child] = {}

    def launch(self, record: Record, folder: SearchFolder) -> None:
        """Start a record's latest attempt; to start one again that runs does nothing.

        Raises:
            UnreachableError: If Ray does not start.
        """
        if record.attempt_id in self._children:
            return
        # An attempt yields to the service, as its workers do, so that this answers beside it.
        command = ["nice", "-n", self._environment.get("RAY_worker_niceness", _NICENESS)]
        command += [sys.executable, "-m", "search.service.driver"]
        process = subprocess.Popen(
            [*command, str(folder.path), str(record.attempt), self._ray.address()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment,
            start_new_session=True,
        )
        self._children[record.attempt_id] = _Child(process)

    def stop(self, attempt: str) -> None:
        """Ask an attempt to end, and a few seconds later make it."""
        child = self._children.get(attempt)
        if child is None or child.process.poll() is not None:
            return
        if child.stopped is None:
            child.stopped = time.monotonic()
            child.process.terminate()
        elif time.monotonic() - child.stopped > _TERM_SECONDS:
            os.killpg(child.process.pid, signal.SIGKILL)

    def seen(self) -> Mapping[str, Seen]:
        """Return what is known of attempts, by their ids."""
        return {attempt: _seen(child.process.poll()) for attempt, child in self._children.items()}

    def close(self) -> None:
        """Stop all attempts, and Ray."""
        deadline = time.monotonic() + _TERM_SECONDS + 1
        while any(child.process.poll() is None for child in self._children.values()):
            for attempt in self._children:
                self.stop(attempt)
            time.sleep(0.1)
            if time.monotonic() > deadline + _TERM_SECONDS:
                break
        self._ray.close()


def _seen(code: int | None) -> Seen:
    if code is None:
        return Seen("running")
    if code < 0:
        return Seen("ended", f"its driver was ended by {signal.Signals(-code).name}")
    return Seen("ended", f"its driver ended with exit code {code}")
