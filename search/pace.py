"""How fast a stage goes, from what it told of late."""

from collections import deque
from dataclasses import dataclass

from search.events import Event

__all__ = ["Pace", "Pacemaker"]

# Long enough to be steady, short enough to follow a change.
_WINDOW_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Pace:
    """A rate, and what follows from it.

    Attributes:
        rate: Units a second, above 0.
        left: Seconds until all is done.
    """

    rate: float
    left: float


class Pacemaker:
    """Follow one stage's progress.

    A rate is that of the last two minutes, or of the last step where that took longer. It begins
    anew with each count: when another unit is counted, or a count falls, as it does with
    activations after weights.
    """

    def __init__(self) -> None:
        self._told: deque[Event] = deque()

    def __call__(self, event: Event) -> Pace | None:
        """Take in progress; return the pace, None if it stands still or is not known yet."""
        assert event.done is not None
        assert event.total is not None
        last = self._told[-1] if self._told else event
        if event.unit != last.unit or event.done < (last.done or 0):
            self._told.clear()
        self._told.append(event)
        while len(self._told) > 2 and event.time - self._told[0].time > _WINDOW_SECONDS:
            self._told.popleft()
        first = self._told[0]
        seconds, gained = event.time - first.time, event.done - (first.done or 0)
        if gained <= 0 or seconds <= 0:
            return None
        rate = gained / seconds
        return Pace(rate, max(0.0, event.total - event.done) / rate)
