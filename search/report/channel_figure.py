"""The figure of the channels' average traces, a sorted strip of points for each site.

Within its site's strip a point stands at its rank: from left to right from the smallest to the
largest, so that the median is in the middle, and the quartiles are halfway from there. Nothing is
jittered or smoothed. What a logarithm cannot show is at the axis's foot.
"""

import math
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from search.quantities import significant
from search.report.canvas import WARNING, canvas, logarithmic
from search.report.sites import Sites
from search.traced import TraceGroup

__all__ = ["MAX_POINTS", "channels", "num_drawn"]

# So many marks a browser draws, and answers a pointer over, at once.
MAX_POINTS = 3000
_LEAST = 5
_HALF_WIDTH = 0.38


def channels(sites: Sites) -> go.Figure:
    """Draw the channels of all sites; of many, those evenly spaced in rank, and both ends."""
    noun = sites.noun.capitalize()
    figure = canvas(
        f"{noun}; within it, its channels by rank",
        f"Average trace of a channel ({sites.unit})",
    )
    figure.update_layout(height=520, showlegend=True)
    drawn = [_drawn(site, _room(sites)) for site in sites.channels]
    points = [(i + at, channel) for i, site in enumerate(drawn) for at, channel in site]
    positive = [_average(channel) for _, channel in points if channel.trace > 0]
    low = sum(channel.trace <= 0 for _, channel in points)
    floor = min(positive, default=1.0) / (3 if low else 1.3)
    for is_shown, name, marker in (
        (True, "channel", {"color": "#4d8fc4", "size": 4}),
        (
            False,
            "channel, zero or negative: below this axis",
            {"color": WARNING, "size": 6, "symbol": "triangle-down-open"},
        ),
    ):
        kept = [(at, channel) for at, channel in points if (channel.trace > 0) is is_shown]
        if kept:
            figure.add_scatter(
                name=name,
                x=[round(at, 4) for at, _ in kept],
                y=[_average(channel) if is_shown else floor for _, channel in kept],
                mode="markers",
                marker=marker,
                cliponaxis=is_shown,
                text=[_words(channel) for _, channel in kept],
                hovertemplate="%{text}<extra></extra>",
            )
    figure.add_trace(_means(sites))
    figure.update_yaxes(logarithmic(floor / 1.25, 1.4 * max(positive, default=10.0)))
    figure.update_xaxes(
        range=[-0.6, len(sites.groups) - 0.4],
        tickvals=list(range(len(sites.groups))),
        ticktext=[escape(name) for name in sites.layers],
        tickangle=-90,
        showgrid=False,
        title_standoff=8,
    )
    return figure


def num_drawn(sites: Sites) -> int:
    """Count the channels that the figure has points for."""
    return sum(min(len(site), _room(sites)) for site in sites.channels)


def _room(sites: Sites) -> int:
    """Return how many points a site may have."""
    return max(_LEAST, MAX_POINTS // len(sites.groups))


def _drawn(site: Sequence[TraceGroup], room: int) -> list[tuple[float, TraceGroup]]:
    """Choose channels of one site to draw, with their places in its strip."""
    ranked = sorted(site, key=_average)
    last = len(ranked) - 1
    if last < 1:
        return [(0.0, channel) for channel in ranked]
    num = min(room, len(ranked))
    ranks = [round(i * last / (num - 1)) for i in range(num)]
    return [(_HALF_WIDTH * (2 * rank / last - 1), ranked[rank]) for rank in ranks]


def _means(sites: Sites) -> go.Scatter:
    x: list[float | None] = []
    y: list[float | None] = []
    for i, site in enumerate(sites.groups):
        if site.trace > 0:
            x += [i - _HALF_WIDTH, i + _HALF_WIDTH, None]
            y += [_average(site), _average(site), None]
    return go.Scatter(
        name=f"the {sites.noun}'s own average",
        x=x,
        y=y,
        mode="lines",
        line={"color": "#0b3d6e", "width": 2},
        hoverinfo="skip",
    )


def _average(group: TraceGroup) -> float:
    return group.trace / group.n


def _words(channel: TraceGroup) -> str:
    error = math.hypot(channel.probe_error, channel.data_error) / channel.n
    return (
        f"{escape(channel.group)}<br>"
        f"average trace {significant(_average(channel))} ± {significant(error)}"
    )
