"""The figure of the Hessian traces, with both of their errors.

What a logarithm cannot show, a trace that is not positive, is drawn at the axis's foot and said
to be there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from search.artefacts import CurvatureArtefact
from search.report.canvas import WARNING, canvas, make_logarithmic
from search.report.quantities import significant

__all__ = ["traces"]


def traces(curvature: CurvatureArtefact) -> go.Figure:
    """Draw each layer's average trace: thick bars probe error, thin bars probes and data."""
    figure = canvas("Layer, in the network's order", "Average Hessian trace (loss / weight²)")
    figure.update_layout(height=520, showlegend=True)
    averages = _averages(curvature)
    figure.add_trace(_bars("probes and data", averages, averages.both, 1.5, "#6aa3d0"))
    figure.add_trace(_bars("probes alone", averages, averages.probe, 5, "#4d8fc4"))
    for is_shown, marker in (
        (True, {"color": "#0b3d6e", "size": 12, "symbol": "line-ew-open", "line": {"width": 2}}),
        (False, {"color": WARNING, "size": 11, "symbol": "triangle-down-open"}),
    ):
        kept = [i for i, value in enumerate(averages.mean) if (value > 0) is is_shown]
        if kept:
            figure.add_scatter(
                name="average trace" if is_shown else "zero or negative: below this axis",
                x=[averages.layers[i] for i in kept],
                y=[averages.mean[i] if is_shown else averages.floor for i in kept],
                mode="markers",
                marker=marker,
                cliponaxis=is_shown,
                text=[averages.words[i] for i in kept],
                hovertemplate="%{x}<br>%{text}<extra></extra>",
            )
    top = max([m + e for m, e in zip(averages.mean, averages.both, strict=True)])
    top = max(top, 10 * averages.floor)
    make_logarithmic(figure, averages.floor / 1.25, 1.4 * top)
    figure.update_xaxes(
        type="category",
        categoryarray=averages.layers,
        range=[-0.6, len(averages.layers) - 0.4],
        tickangle=-90,
        dtick=1,
        title_standoff=8,
    )
    return figure


@dataclass(frozen=True, slots=True)
class _Averages:
    """Traces over numbers of weights, with where a logarithmic axis for them must end."""

    layers: list[str]
    mean: list[float]
    probe: list[float]
    both: list[float]
    words: list[str]
    floor: float


def _averages(curvature: CurvatureArtefact) -> _Averages:
    def over(values: Sequence[float]) -> list[float]:
        return [value / n for value, n in zip(values, curvature.num_elements, strict=True)]

    mean, probe, data = map(over, (curvature.trace, curvature.probe_error, curvature.data_error))
    positive = [value for value in mean if value > 0]
    size = max([abs(value) for value in mean]) or 1.0
    return _Averages(
        layers=[escape(name) for name in curvature.layers],
        mean=mean,
        probe=probe,
        both=[math.hypot(p, d) for p, d in zip(probe, data, strict=True)],
        words=[
            f"average trace {significant(m)}<br>probe error {significant(p)}"
            f"<br>data error {significant(d)}"
            for m, p, d in zip(mean, probe, data, strict=True)
        ],
        floor=min(positive) / 3 if positive else size / 100,
    )


def _bars(
    name: str, averages: _Averages, errors: list[float], width: float, color: str
) -> go.Scatter:
    """Draw error bars as lines, cut below the axis, where they may go on to minus infinity."""
    x: list[str | None] = []
    y: list[float | None] = []
    for layer, value, error in zip(averages.layers, averages.mean, errors, strict=True):
        if value + error > averages.floor:
            x += [layer, layer, None]
            y += [max(value - error, averages.floor / 2), value + error, None]
    return go.Scatter(
        name=f"± one standard error: {name}",
        x=x,
        y=y,
        mode="lines",
        line={"color": color, "width": width},
        hoverinfo="skip",
    )
