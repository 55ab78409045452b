"""What a search does, as metrics that Ray offers to Prometheus (``ray_hawq_…``).

All come from events, so that whatever a terminal shows can be plotted, too, and nothing else in
the program knows of metrics.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import ray
from ray.util.metrics import Counter, Gauge

from search.events import Event, Measure

__all__ = ["GAUGES", "Reading", "Telemetry", "readings"]

GAUGES = {
    "done": "Work of a stage that is done, in the stage's own unit",
    "total": "All of the stage's work, in the same unit",
    "running": "1 while a stage runs",
    "attempt": "Number of the attempt; attempts before it were lost, or cancelled",
    "probes": "Random probes on every example",
    "relative_error": "Largest standard error of a trace over the probes, relative to it",
    "evaluations": "Distinct allocations that searches have scored",
    "episodes": "Allocations that searches have proposed",
    "cache_hits": "Proposals whose score was known",
    "reward": "Mean of the latest scores of searches",
    "trials": "Fine-tunings that have ended",
    "best_score": "Best score by now, on the search split",
}
_TAGS = ("search", "stage", "unit")
_COUNTERS = {
    "stages": "Stages that are finished",
    "skipped": "Stages that were found there",
    "warnings": "Warnings",
    "failures": "Stages that failed",
}
_COUNTED = {
    "finished": "stages",
    "skipped": "skipped",
    "warning": "warnings",
    "failed": "failures",
}


@dataclass(frozen=True, slots=True)
class Reading:
    """A value of a metric.

    Attributes:
        metric: Its name, without ``hawq_``.
        value: Its value; of a counter, what is added.
        unit: What is counted, where a stage has its own unit.
    """

    metric: str
    value: float
    unit: str = ""


def readings(event: Event) -> Iterator[Reading]:
    """Yield what an event says of metrics."""
    if event.done is not None:
        yield Reading("done", event.done, event.unit or "")
    if event.total is not None:
        yield Reading("total", event.total, event.unit or "")
    if event.kind in {"started", "finished", "failed"} and event.stage != "report":
        yield Reading("running", float(event.kind == "started"))
    if event.kind in _COUNTED:
        yield Reading(_COUNTED[event.kind], 1)
    measures = event.measures or {}
    for name in get_args(Measure):
        if name in measures:
            yield Reading(name, measures[name])
    if "episodes" in measures and "evaluations" in measures:
        yield Reading("cache_hits", measures["episodes"] - measures["evaluations"])


class Telemetry:
    """A listener that turns events into metrics, for as long as Ray is there.

    Args:
        search: Label of all of them.
        attempt: Number of the attempt.
    """

    def __init__(self, search: str, attempt: int) -> None:
        self._search, self._attempt = search, attempt
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}

    def __call__(self, event: Event) -> None:
        """Hear of an event."""
        if not ray.is_initialized():  # before a search has its cluster nobody could ask
            return
        for reading in [Reading("attempt", self._attempt), *readings(event)]:
            stage = "run" if reading.metric == "attempt" else event.stage
            tags = {"search": self._search, "stage": stage, "unit": reading.unit}
            if reading.metric in GAUGES:
                self._gauge(reading.metric).set(reading.value, tags)
            else:
                self._counter(reading.metric).inc(reading.value, tags)

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"hawq_{name}", GAUGES[name], _TAGS)
        return self._gauges[name]

    def _counter(self, name: str) -> Counter:
        if name not in self._counters:
            self._counters[name] = Counter(f"hawq_{name}", _COUNTERS[name], _TAGS)
        return self._counters[name]
