"""What to do about a search: a pure function of its record and of what is seen of it.

Two witnesses tell whether an attempt lives: what started it (Ray's list of jobs, or a table of
processes), and its heartbeat in the store. The first may lag by minutes, or be gone with its
cluster; the second may be late where storage is slow. An attempt is lost when the first says so
and nothing speaks against it, or when the second has been silent for long.
"""

from dataclasses import dataclass
from typing import Literal

from search.service.record import Outcome, Record

__all__ = ["Action", "Job", "Launch", "Limits", "Observation", "Retry", "Settle", "Stop", "Wait"]
__all__ += ["decide"]

Job = Literal["unknown", "absent", "pending", "running", "ended"]


@dataclass(frozen=True, slots=True)
class Limits:
    """How patient the service is.

    Attributes:
        attempts: That may be lost one after the other without a stage finished in between.
        backoff_seconds: Before the second of these; it doubles with each.
        longest_backoff_seconds: At most.
        silent_seconds: Without a heartbeat, until a running attempt counts as lost.
        starting_seconds: The same before its first: it reads much from storage that may be slow.
        absent_seconds: The same of an attempt that Ray does not know.
    """

    attempts: int = 5
    backoff_seconds: float = 5
    longest_backoff_seconds: float = 300
    silent_seconds: float = 120
    starting_seconds: float = 900
    absent_seconds: float = 30

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"attempts must be at least 1, got {self.attempts}")

    def backoff(self, failures: int) -> float:
        """Return the seconds to wait after so many failures, 1 or more."""
        # An exponent of hundreds would be no float any more.
        doubled = self.backoff_seconds * 2.0 ** min(failures - 1, 64)
        return min(doubled, self.longest_backoff_seconds)


@dataclass(frozen=True, slots=True)
class Observation:
    """What is seen of a search.

    Attributes:
        now: Seconds since the epoch.
        job: What whoever started the latest attempt says of it: ``unknown`` if it does not
            answer, ``absent`` if it has never heard of it.
        outcome: How the latest attempt ended, by its own word; None: it has not said.
        has_begun: Whether its latest attempt has given a sign of life.
        silent_seconds: Since its heartbeat last changed, or since it was launched.
        stages: That its latest attempt came past.
        fits: Whether there is room for one more search of this size.
        said: What else is known of a job that ended: its exit code, Ray's message.
    """

    now: float
    job: Job = "absent"
    outcome: Outcome | None = None
    has_begun: bool = True
    silent_seconds: float = 0
    stages: int = 0
    fits: bool = True
    said: str = ""


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing; ``reason`` is for people."""

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Launch:
    """Begin the next attempt."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop the attempt, and look again."""


@dataclass(frozen=True, slots=True)
class Retry:
    """The attempt is lost: queue the search again, and stop what may be left of it.

    Attributes:
        reason: Why it is lost.
        failures: Attempts that are lost by now, since a stage was last finished.
        not_before: When the next may begin.
    """

    reason: str
    failures: int
    not_before: float


@dataclass(frozen=True, slots=True)
class Settle:
    """The search has ended; stop what may be left of it."""

    state: Literal["succeeded", "failed", "cancelled"]
    reason: str = ""


Action = Wait | Launch | Stop | Retry | Settle


def decide(record: Record, seen: Observation, limits: Limits) -> Action:
    """Decide what to do about a search now.

    Args:
        record: How far it is.
        seen: What is seen of it.
        limits: How patient to be.
    """
    match record.state:
        case "queued":
            return _begin(record, seen)
        case "running":
            return _watch(record, seen, limits)
        case "cancelling":
            return _cancel(record, seen, limits)
    return Wait(record.reason)


def _begin(record: Record, seen: Observation) -> Action:
    if seen.now < record.not_before:
        return Wait(record.reason)
    if seen.job == "unknown":
        return Wait("waits for Ray to answer")
    return Launch() if seen.fits else Wait("waits for other searches")


def _watch(record: Record, seen: Observation, limits: Limits) -> Action:
    if seen.outcome is not None and seen.outcome.attempt == record.attempt:
        ended: Literal["succeeded", "failed"] = (
            "succeeded" if seen.outcome.ended == "succeeded" else "failed"
        )
        return Settle(ended, seen.outcome.reason)
    lost = _lost(seen, limits)
    if lost is None:
        return Wait("waits for Ray to start it" if seen.job == "pending" else "")
    failures = 1 if seen.stages > record.stages else record.failures + 1
    if failures >= limits.attempts:
        return Settle("failed", f"{lost}; {failures} attempts were lost one after the other")
    return Retry(lost, failures, seen.now + limits.backoff(failures))


def _cancel(record: Record, seen: Observation, limits: Limits) -> Action:
    outcome = seen.outcome
    if outcome and outcome.attempt == record.attempt and outcome.ended == "succeeded":
        return Settle("succeeded")  # it was faster
    if seen.job in {"absent", "ended"}:
        return Settle("cancelled")
    # A driver ends by itself when it reads that its search is cancelled.
    if seen.job == "unknown" and seen.silent_seconds >= limits.absent_seconds:
        return Settle("cancelled", "Ray did not answer")
    return Stop()


def _lost(seen: Observation, limits: Limits) -> str | None:
    """Say why an attempt must be taken as lost; None if it need not."""
    silent = f"no sign of life for {seen.silent_seconds:.0f} s"
    if seen.job == "ended":
        return seen.said or "its driver ended without a word"
    if seen.job == "absent" and seen.silent_seconds >= limits.absent_seconds:
        return f"what ran it was restarted; {silent}"
    # Ray may be out of reach of the service alone: that is no reason to stop what goes on.
    patience = limits.silent_seconds if seen.has_begun else limits.starting_seconds
    if seen.job in {"running", "unknown"} and seen.silent_seconds >= patience:
        return silent
    return None
