"""Observes searches and acts on what is decided, again and again."""

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from search.service.launcher import Launcher, Seen, UnreachableError
from search.service.reconcile import (
    Action,
    Launch,
    Limits,
    Observation,
    Retry,
    Settle,
    Stop,
    Wait,
    decide,
)
from search.service.record import Record
from search.service.store import NoSearchError, Store

__all__ = ["Capacity", "Supervisor"]

_log = logging.getLogger("hawq.service")

_PERIOD_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Capacity:
    """What searches may take together.

    Attributes:
        searches: At once; others are queued.
        cpus: That they cannot do without, together; None: no matter.
        gpus: The same.
    """

    searches: int = 1
    cpus: float | None = None
    gpus: float | None = None

    def fits(self, running: Sequence[Record], record: Record) -> bool:
        """Tell whether one more search may begin."""
        if len(running) >= self.searches:
            return False
        taken = [*running, record]
        return (self.cpus is None or sum(one.cpus for one in taken) <= self.cpus) and (
            self.gpus is None or sum(one.gpus for one in taken) <= self.gpus
        )


class Supervisor:
    """Brings about what the records of a store want.

    Args:
        store: The searches.
        launcher: What runs them.
        limits: How patient to be.
        capacity: How many searches at once.
    """

    def __init__(
        self, store: Store, launcher: Launcher, limits: Limits, capacity: Capacity
    ) -> None:
        self._store, self._launcher = store, launcher
        self._limits, self._capacity = limits, capacity
        self._beats: dict[str, tuple[tuple[int, int], float]] = {}
        self._stillborn: dict[str, Seen] = {}
        self._complaints: dict[str, str] = {}
        self._is_away = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)

    def start(self) -> None:
        """Begin, in a thread."""
        self._thread.start()

    def close(self) -> None:
        """Stop, and queue again what ends with the service, as if it had not been begun."""
        self._stopped.set()
        self._thread.join()
        self._launcher.close()
        if self._launcher.outlives_service:
            return
        for record in self._store.active():
            outcome = self._store.folder(record.id).outcome()
            if record.state == "running" and (outcome is None or outcome.attempt < record.attempt):
                self._change(record, state="queued", reason="the service was stopped")

    def turn(self) -> None:
        """Look at every search once, the oldest first, and act."""
        jobs = self._jobs()
        active = self._store.active()
        running = [record for record in active if record.state != "queued"]
        is_full = False
        for record in active:
            # Who waits for room is not overtaken by a smaller one: else it might wait for ever.
            fits = not is_full and self._capacity.fits(running, record)
            try:
                seen = self._observe(record, jobs, fits)
                if self._complaints.pop(record.id, None):
                    self._change(record, reason="")
                action = decide(record, seen, self._limits)
                self._act(record, action, seen)
            except UnreachableError as error:
                _log.warning("search %s: %s", record.id, error)
            except NoSearchError:  # deleted meanwhile
                continue
            except ValueError as error:  # another version wrote its folder; the others go on
                self._complain(record, f"it cannot be looked after: {error}")
                continue
            if record.state == "queued" and seen.now >= record.not_before:
                is_full = is_full or not fits
                running.append(record)

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    self.turn()
                except (OSError, SQLAlchemyError):  # storage may come back
                    _log.exception("the supervisor could not finish its turn")
                self._stopped.wait(_PERIOD_SECONDS)
        finally:
            if not self._stopped.is_set():
                # A service that looks after nothing must not look alive.
                os.kill(os.getpid(), signal.SIGTERM)

    def _jobs(self) -> Mapping[str, Seen] | None:
        """Return what is seen of attempts; None if nothing is, which is logged when it begins."""
        try:
            jobs = self._launcher.seen()
        except UnreachableError as error:
            if not self._is_away:
                _log.warning("%s", error)
            self._is_away = True
            return None
        self._is_away = False
        return jobs

    def _observe(self, record: Record, jobs: Mapping[str, Seen] | None, fits: bool) -> Observation:
        folder = self._store.folder(record.id)
        seen = Seen("unknown") if jobs is None else jobs.get(record.attempt_id, Seen("absent"))
        seen = self._stillborn.get(record.attempt_id, seen)
        heartbeat = folder.heartbeat()
        is_latest = heartbeat is not None and heartbeat.attempt == record.attempt
        return Observation(
            now=time.time(),
            job=seen.job,
            outcome=folder.outcome(),
            has_begun=is_latest,
            silent_seconds=self._silence(record, heartbeat.beat if heartbeat and is_latest else 0),
            stages=heartbeat.stages if heartbeat else 0,
            fits=fits,
            said=seen.said,
        )

    def _silence(self, record: Record, beat: int) -> float:
        """Return the seconds since this process saw the latest attempt's heartbeat change."""
        now = time.monotonic()
        latest, since = self._beats.get(record.id, ((-1, -1), now))
        if latest != (record.attempt, beat):
            since = now
            self._beats[record.id] = ((record.attempt, beat), since)
        return now - since

    def _act(self, record: Record, action: Action, seen: Observation) -> None:
        match action:
            case Launch():
                self._launch(record)
            case Stop():
                self._launcher.stop(record.attempt_id)
            case Retry(reason, failures, not_before):
                self._stillborn.pop(record.attempt_id, None)
                self._change(
                    record,
                    state="queued",
                    reason=f"attempt {record.attempt} is lost ({reason}); another one follows",
                    failures=failures,
                    not_before=not_before,
                    stages=max(seen.stages, record.stages),
                )
                self._launcher.stop(record.attempt_id)
            case Settle(state, reason):
                folder = self._store.folder(record.id)
                end = folder.log_end(record.attempt) if state == "failed" else ""
                self._change(record, state=state, reason=reason, log_end=end)
                self._beats.pop(record.id, None)
                self._stillborn.pop(record.attempt_id, None)
                if state == "failed":
                    self._launcher.stop(record.attempt_id)
            case Wait(reason):
                self._change(record, reason=reason)

    def _complain(self, record: Record, reason: str) -> None:
        """Say why a search is left alone, once for as long as the reason is the same."""
        if self._complaints.get(record.id) == reason:
            return
        self._complaints[record.id] = reason
        _log.warning("search %s: %s", record.id, reason)
        with suppress(NoSearchError, ValueError):  # its record may be what cannot be read
            self._change(record, reason=reason)

    def _launch(self, record: Record) -> None:
        # Written first: an attempt that nobody knows of must not run.
        started = self._change(record, state="running", reason="", attempt=record.attempt + 1)
        if started.attempt == record.attempt:  # cancelled in this moment
            return
        try:
            self._launcher.launch(started, self._store.folder(started.id))
        except UnreachableError as error:
            self._stillborn[started.attempt_id] = Seen("ended", str(error))

    def _change(self, record: Record, **new: object) -> Record:
        """Change a record, unless somebody else has moved it on meanwhile."""

        def how(current: Record) -> Record:
            if (current.state, current.attempt) != (record.state, record.attempt):
                return current
            if new.get("state", record.state) != record.state:
                _log.info("search %s, attempt %d: %s", record.id, record.attempt, _told(new))
            return current.model_copy(update=new)

        return self._store.change(record.id, how)


def _told(new: Mapping[str, object]) -> str:
    return ": ".join(str(new[key]) for key in ("state", "reason") if new.get(key))
