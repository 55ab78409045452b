"""One attempt at a search: the pipeline, with a heartbeat, fenced off from other attempts.

    python -m search.service.driver FOLDER ATTEMPT ADDRESS

The pipeline goes on from what earlier attempts left. A driver ends at once when its parent dies,
when a later attempt has begun, or when its search is cancelled or deleted: then it must not
write. Until an earlier driver is gone, it waits.
"""

import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from search.cluster import connected
from search.errors import InputError
from search.events import Event, Listener
from search.pipeline import run
from search.service.record import Heartbeat, Outcome, SearchFolder
from search.terminal import LiveView

__all__ = ["drive", "main"]

_BEAT_SECONDS = 1.0
_FENCED = 75  # EX_TEMPFAIL


class _Heart:
    """Beats in a thread of its own, and stops the process when it is no longer wanted.

    Args:
        folder: The search's.
        attempt: This one.
    """

    def __init__(self, folder: SearchFolder, attempt: int) -> None:
        self._folder, self._attempt = folder, attempt
        self._parent = os.getppid()
        self._stages: set[str] = set()
        self._latest: Event | None = None
        self._beat = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def __enter__(self) -> "_Heart":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
        if event.kind in {"finished", "skipped"}:
            self._stages.add(event.stage)
        self._latest = event

    def _run(self) -> None:
        while True:
            unwanted = self._unwanted()
            if unwanted:
                sys.stderr.write(f"This attempt ends: {unwanted}.\n")
                sys.stderr.flush()
                os._exit(_FENCED)
            self._beat += 1
            self._folder.write(
                Heartbeat(
                    attempt=self._attempt,
                    beat=self._beat,
                    stages=len(self._stages),
                    host=socket.gethostname(),
                    pid=os.getpid(),
                    latest=self._latest,
                )
            )
            if self._stopped.wait(_BEAT_SECONDS):
                return

    def _unwanted(self) -> str:
        if os.getppid() != self._parent:
            return "what started it is gone"
        record = self._folder.record()
        if record is None:
            return "the search was deleted"
        if record.attempt != self._attempt:
            return f"attempt {record.attempt} has begun"
        return "" if record.state == "running" else f"the search is {record.state}"


def drive(folder: SearchFolder, attempt: int, address: str) -> None:
    """Make one attempt at a search, and leave its outcome in the folder.

    Args:
        folder: The search's.
        attempt: Its number.
        address: Of the Ray cluster.
    """
    config = folder.config()
    record = folder.record()
    assert record is not None
    with _Heart(folder, attempt) as heart, _alone(folder), LiveView(Console(width=120)) as view:
        # Connected here, so that a cluster that is gone is an accident, and no mistake of the
        # config's.
        with connected(address, dashboard=False, about=record.labels):
            listeners: list[Listener] = [view, heart]
            try:
                run(config, folder.run, name=record.name, attempt=attempt, listeners=listeners)
            except InputError as error:
                outcome = Outcome(attempt=attempt, ended="refused", reason=str(error))
                sys.stderr.write(f"error: {error}\n")
            else:
                outcome = Outcome(attempt=attempt, ended="succeeded")
        folder.write(outcome)


@contextmanager
def _alone(folder: SearchFolder) -> Iterator[None]:
    """Wait until no other driver is in the folder; meanwhile the heart beats."""
    with folder.driver_lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_BEAT_SECONDS / 4)
        yield


def main() -> None:
    """Make the attempt that the command line names; what is said goes to the attempt's log."""
    path, number, address = sys.argv[1:]
    folder, attempt = SearchFolder(Path(path)), int(number)
    log = folder.log(attempt)
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"The log is {log}\n")
    sys.stdout.flush()
    with log.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        drive(folder, attempt, address)


if __name__ == "__main__":
    main()
