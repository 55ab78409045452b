"""How the channels of each site differ, in numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from search.report.sites import Sites
from search.traced import TraceGroup

__all__ = ["Spread", "spreads"]


@dataclass(frozen=True, slots=True)
class Spread:
    """How the channels of one site differ.

    Attributes:
        name: The site's.
        num: Channels.
        num_low: Those whose trace is zero or negative.
        smallest: Average trace.
        median: Of the average traces.
        largest: Average trace.
        error: Median of both errors together, relative; None where all traces are zero.
    """

    name: str
    num: int
    num_low: int
    smallest: float
    median: float
    largest: float
    error: float | None


def spreads(sites: Sites) -> list[Spread]:
    """Describe every site's channels, of which it must have some."""
    return [_spread(*pair) for pair in zip(sites.groups, sites.channels, strict=True)]


def _spread(site: TraceGroup, members: Sequence[TraceGroup]) -> Spread:
    averages = [channel.trace / channel.n for channel in members]
    errors = [
        math.hypot(channel.probe_error, channel.data_error) / abs(channel.trace)
        for channel in members
        if channel.trace
    ]
    return Spread(
        name=site.group,
        num=len(members),
        num_low=sum(average <= 0 for average in averages),
        smallest=min(averages),
        median=median(averages),
        largest=max(averages),
        error=median(errors) if errors else None,
    )
