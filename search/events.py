"""What happened, as it happens: one line of JSON an event, read by terminals, pages and tests."""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

__all__ = ["Event", "EventLog", "Measure", "Measures", "read_events"]

Kind = Literal["started", "progress", "finished", "skipped", "note", "warning", "failed"]
Measure = Literal[
    "probes", "relative_error", "evaluations", "episodes", "reward", "trials", "best_score"
]
Measures = Mapping[Measure, float]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened in a run.

    Attributes:
        time: Seconds since the epoch.
        stage: Stage of the pipeline, or ``"run"`` for the whole.
        kind: ``started``, ``progress``, ``finished`` or ``skipped`` of the stage; a ``note`` or
            ``warning`` about it; ``failed`` with the reason.
        message: In words, for people.
        done: Work done so far, of a progress event.
        total: All of the stage's work, same unit.
        unit: What is counted: ``"probes"``, ``"images"``.
        measures: Numbers that say how it stands, for plots of what goes on.
    """

    time: float
    stage: str
    kind: Kind
    message: str = ""
    done: float | None = None
    total: float | None = None
    unit: str | None = None
    measures: Measures | None = None


Listener = Callable[[Event], None]


class EventLog:
    """Append events to a file and tell listeners.

    Args:
        path: File of JSON lines; each is written whole and flushed.
        listeners: Called with every event, in order.
    """

    def __init__(self, path: Path, listeners: Iterable[Listener] = ()) -> None:
        self._path = path
        self._listeners = tuple(listeners)

    def emit(
        self,
        stage: str,
        kind: Kind,
        message: str = "",
        *,
        done: float | None = None,
        total: float | None = None,
        unit: str | None = None,
        measures: Measures | None = None,
    ) -> None:
        """Record an event now."""
        event = Event(time.time(), stage, kind, message, done, total, unit, measures)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event)) + "\n")
        for listener in self._listeners:
            listener(event)


def read_events(path: Path) -> list[Event]:
    """Read a run's events; a last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [Event(**json.loads(line)) for line in lines]
