"""Figures of how searches go: the best score by evaluations, and by what they cost.

A line is the median of a method's searches, a band holds half of them. What spends no evaluation is
a level line, which begins at its price.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from search.comparison.progress import Band, band, best_at, best_so_far
from search.comparison.scale import Scale
from search.comparison.standings import Standing, spent
from search.report.canvas import canvas, logarithmic
from search.report.comparison_looks import faded
from search.report.palette import Look

__all__ = ["Curve", "by_cost", "by_evaluations", "cost_curve", "evaluation_curve"]

# Points of a line; more would not be told apart.
_NUM_POINTS = 240
_LEAST_COST = 1e-3
# What beginnings may add to the height of a figure of ends.
_MOST_BEGINNING = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """What the searches of a method have found by then.

    Attributes:
        x: Evaluations or core-seconds, shape (T,), rising.
        best: The best scores, each of shape (T,).
    """

    x: NDArray[np.float64]
    best: Band


def evaluation_curve(found: Standing) -> Curve:
    """Return the best scores by evaluation; a search that ended early keeps its best."""
    length = max(len(search.evaluations) for search in found.searches)
    best = [best_so_far([e.score for e in s.evaluations], length) for s in found.searches]
    return Curve(np.arange(1.0, length + 1), band(np.stack(best)))


def cost_curve(found: Standing) -> Curve:
    """Return the best scores by core-seconds, from where every search has a score."""
    costs = [np.maximum(spent(s, found.shared_seconds), _LEAST_COST) for s in found.searches]
    first, last = max(cost[0] for cost in costs), max(cost[-1] for cost in costs)
    # A power's rounding must not leave the costs.
    grid = np.geomspace(first, last, _NUM_POINTS).clip(first, last)
    best = [
        best_at(cost.tolist(), [e.score for e in search.evaluations], grid)
        for cost, search in zip(costs, found.searches, strict=True)
    ]
    return Curve(grid, band(np.stack(best)))


def by_evaluations(found: Sequence[Standing], scale: Scale, looks: Mapping[str, Look]) -> go.Figure:
    """Draw the best score so far against evaluations, for the methods of one budget."""
    figure = canvas("Evaluations", scale.axis)
    curves = {s.method: evaluation_curve(s) for s in found if s.searches}
    last = max([curve.x[-1] for curve in curves.values()], default=2.0)
    levels = {s.method: (1.0, s.median) for s in found if not s.searches}
    _draw(figure, curves, levels, last, scale, looks)
    figure.update_xaxes(range=[1 - 0.03 * last, 1.03 * last])
    return figure


def by_cost(found: Sequence[Standing], scale: Scale, looks: Mapping[str, Look]) -> go.Figure:
    """Draw the best score against core-seconds, for the methods of one budget.

    What costs next to nothing, uniform bits, is drawn from the axis's beginning.
    """
    figure = canvas("Core-seconds", scale.axis)
    curves = {s.method: cost_curve(s) for s in found if s.searches}
    starts = [curve.x[0] for curve in curves.values()]
    starts += [s.core_seconds for s in found if not s.searches and s.shared_seconds > 0]
    low = max(min(starts, default=1.0), _LEAST_COST) / 1.6
    last = max([*starts, *(curve.x[-1] for curve in curves.values())], default=10.0)
    levels = {s.method: (max(s.core_seconds, low), s.median) for s in found if not s.searches}
    _draw(figure, curves, levels, max(last, 2 * low), scale, looks)
    figure.update_xaxes(logarithmic(low, 1.15 * max(last, 2 * low)))
    return figure


def _draw(
    figure: go.Figure,
    curves: Mapping[str, Curve],
    levels: Mapping[str, tuple[float, float]],
    last: float,
    scale: Scale,
    looks: Mapping[str, Look],
) -> None:
    for method, curve in curves.items():
        figure.add_trace(_band(method, curve, scale, looks[method]))
    for method, (start, score) in levels.items():
        figure.add_trace(
            _line(method, np.array([start, last]), np.full(2, score), scale, looks[method])
        )
    for method, curve in curves.items():
        kept = _kept(curve)
        trace = _line(method, curve.x[kept], curve.best.median[kept], scale, looks[method])
        figure.add_trace(trace.update(line={"shape": "hv", "width": 2.2}))
    figure.update_yaxes(range=_focus(curves, [score for _, score in levels.values()], scale))


def _band(method: str, curve: Curve, scale: Scale, look: Look) -> go.Scatter:
    kept = _kept(curve)
    x, low, high = curve.x[kept], curve.best.low[kept], curve.best.high[kept]
    return go.Scatter(
        meta=method,
        x=[*x, *x[::-1]],
        y=[*(scale.factor * high), *(scale.factor * low[::-1])],
        mode="lines",
        line={"width": 0, "color": look.color},
        fill="toself",
        fillcolor=faded(look.color, 0.13),
        hoverinfo="skip",
    )


def _line(
    method: str, x: NDArray[np.float64], y: NDArray[np.float64], scale: Scale, look: Look
) -> go.Scatter:
    """Draw a line with the method's marker at its end."""
    return go.Scatter(
        meta=method,
        x=x.tolist(),
        y=(scale.factor * y).tolist(),
        mode="lines+markers",
        line={"color": look.color, "width": 1.4, "dash": look.dash},
        marker={
            "color": look.color,
            "symbol": look.symbol,
            "size": [0] * (len(x) - 1) + [10],
            "opacity": [0] * (len(x) - 1) + [1],
            "line": {"color": "white", "width": 1},
        },
        cliponaxis=False,
        text=[escape(method)] * len(x),
        hovertemplate="%{text}<br>%{x:,.4~g}: %{y:.4~g}<extra></extra>",
    )


def _kept(curve: Curve) -> NDArray[np.int64]:
    """Return which points are drawn."""
    last = len(curve.x) - 1
    return np.unique(np.linspace(0, last, min(last + 1, _NUM_POINTS)).astype(np.int64))


def _focus(curves: Mapping[str, Curve], levels: Sequence[float], scale: Scale) -> list[float]:
    """Return a range of scores that shows the ends well, and as much of the beginnings as fits."""
    ends = [*levels, *(c.best.median[-1] for c in curves.values())]
    top = max([*ends, *(c.best.high[-1] for c in curves.values())], default=1.0)
    lowest = min(ends, default=0.0)
    early = [c.best.median[len(c.x) // 10] for c in curves.values()]
    height = max(top - lowest, 0.002 * max(abs(top), 0.5))
    low = max(min([lowest, *early]), lowest - _MOST_BEGINNING * height)
    margin = 0.06 * max(top - low, height)
    return [scale.factor * (low - margin), scale.factor * (top + margin)]
