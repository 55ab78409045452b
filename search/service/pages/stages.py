"""How far each stage of a search is, how fast it goes, and for how long still."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from search.config import SearchConfig
from search.events import Event
from search.pace import Pacemaker
from search.quantities import duration, significant

__all__ = [
    "StageState",
    "StageView",
    "events_of",
    "pace",
    "stage_names",
    "stages_of_run",
    "warnings_of",
]

StageState = Literal["waiting", "running", "finished", "skipped", "failed", "stopped"]

# As in search/pipeline.py, which is not imported here, for it brings Tune and Optuna into the
# service; a test holds the two together.
_STAGES = (
    *("model", "curvature", "tables", "searches", "candidates", "agreement"),
    *("calibration", "study", "trials", "test", "report"),
)
_BEGINNINGS = {("model", "started"), ("model", "skipped")}
_ENDS: dict[str, StageState] = {"finished": "finished", "skipped": "skipped", "failed": "failed"}


@dataclass(frozen=True, slots=True)
class StageView:
    """How a stage stands.

    Attributes:
        name: Of the stage.
        state: Of the stage; ``stopped`` where its search ended before it did.
        message: What it told last, in words.
        latest: Its last event with numbers; None where there is none.
        pace: Rate and time left, empty where they are not known.
    """

    name: str
    state: StageState
    message: str = ""
    latest: Event | None = None
    pace: str = ""


def stage_names(config: SearchConfig) -> tuple[str, ...]:
    """Name the stages of a search, in the pipeline's order, with the report at the end."""
    asked = {
        "searches": bool(config.searching),
        "agreement": config.comparison is not None,
        "study": config.study is not None,
    }
    return tuple(name for name in _STAGES if asked.get(name, True))


def events_of(path: Path) -> list[Event]:
    """Read a run's events, without lines that a kill cut short."""
    if not path.exists():
        return []
    return list(_whole(path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]))


def _whole(lines: Sequence[str]) -> Iterator[Event]:
    for line in lines:
        try:
            yield Event(**json.loads(line))
        except (ValueError, TypeError):
            continue


def warnings_of(events: Sequence[Event]) -> list[str]:
    """Return what the latest attempt warned of or failed by, each once."""
    starts = [i for i, e in enumerate(events) if (e.stage, e.kind) in _BEGINNINGS]
    latest = events[starts[-1] :] if starts else events
    told = [f"{e.stage}: {e.message}" for e in latest if e.kind in {"warning", "failed"}]
    return list(dict.fromkeys(told))


def stages_of_run(
    names: Sequence[str], events: Sequence[Event], *, is_running: bool
) -> list[StageView]:
    """Say how each stage stands, from what happened.

    Args:
        names: Of all stages, in order.
        events: Of all attempts.
        is_running: Whether the search is under way; else a stage cannot be.
    """
    found = []
    for name in names:
        own = [event for event in events if event.stage == name]
        starts = [i for i, event in enumerate(own) if event.kind == "started"]
        found.append(_stage(name, own[starts[-1] :] if starts else own, is_running))
    return found


def _stage(name: str, events: Sequence[Event], is_running: bool) -> StageView:
    told = [event for event in events if event.kind not in {"note", "warning"}]
    if not told:
        return StageView(name, "waiting")
    last = told[-1]
    progress = [event for event in told if event.kind == "progress"]
    latest = progress[-1] if progress else None
    if last.kind in _ENDS:
        message = "" if name == "report" else last.message
        return StageView(name, _ENDS[last.kind], message, latest)
    if not is_running:
        return StageView(name, "stopped", last.message, latest)
    return StageView(name, "running", last.message, latest, pace(progress))


def pace(progress: Sequence[Event]) -> str:
    """Write rate and time left of a stage; empty if it stands still."""
    follow, found = Pacemaker(), None
    for event in progress:
        found = follow(event)
    if found is None:
        return ""
    units = progress[-1].unit or ""
    unit = units.removesuffix("s")
    if found.rate > 1:
        rate = f"{significant(found.rate)} {units} a second"
    else:
        rate = f"{significant(1 / found.rate)} seconds a{_n(unit)} {unit}"
    return f"{rate}, {duration(found.left)} left"


def _n(noun: str) -> str:
    return "n" if noun[:1] in {"a", "e", "i", "o"} else ""
