"""A figure of positive quantities, each with two errors, on a logarithmic axis.

What a logarithm cannot show, a value that is not positive, is drawn at the axis's foot and said
to be there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from search.report.canvas import WARNING, canvas, logarithmic
from search.report.named_axis import error_bars, show_names

__all__ = ["Marks", "marks_figure"]


@dataclass(frozen=True, slots=True)
class Marks:
    """What is drawn, in the order of the axis.

    Attributes:
        names: One each, all different.
        values: To be shown as marks.
        inner: An error of each, a thick bar.
        outer: A larger error, a thin bar.
        words: What is told of each under the pointer, in plotly's HTML.
    """

    names: Sequence[str]
    values: Sequence[float]
    inner: Sequence[float]
    outer: Sequence[float]
    words: Sequence[str]

    @property
    def floor(self) -> float:
        """Where a logarithmic axis may end: below every positive value."""
        positive = [value for value in self.values if value > 0]
        size = max([abs(value) for value in self.values]) or 1.0
        return min(positive) / 3 if positive else size / 100


def marks_figure(marks: Marks, *, x: str, y: str, value: str, inner: str, outer: str) -> go.Figure:
    """Draw marks with thick and thin error bars.

    Args:
        marks: What to draw, at least one.
        x: Title of the horizontal axis.
        y: Title of the vertical axis.
        value: What the legend calls the marks.
        inner: What it calls the thick bars.
        outer: What it calls the thin bars.
    """
    figure = canvas(x, y)
    figure.update_layout(height=520, showlegend=True)
    names, floor = [escape(name) for name in marks.names], marks.floor
    for legend, errors, width, color in (
        (outer, marks.outer, 1.5, "#6aa3d0"),
        (inner, marks.inner, 5, "#4d8fc4"),
    ):
        bars = error_bars(
            names, marks.values, errors, legend=legend, color=color, width=width, floor=floor
        )
        figure.add_trace(bars)
    for is_shown, marker in (
        (True, {"color": "#0b3d6e", "size": 12, "symbol": "line-ew-open", "line": {"width": 2}}),
        (False, {"color": WARNING, "size": 11, "symbol": "triangle-down-open"}),
    ):
        kept = [i for i, number in enumerate(marks.values) if (number > 0) is is_shown]
        if kept:
            figure.add_scatter(
                name=value if is_shown else "zero or negative: below this axis",
                x=[names[i] for i in kept],
                y=[marks.values[i] if is_shown else floor for i in kept],
                mode="markers",
                marker=marker,
                cliponaxis=is_shown,
                text=[marks.words[i] for i in kept],
                hovertemplate="%{x}<br>%{text}<extra></extra>",
            )
    top = max([number + e for number, e in zip(marks.values, marks.outer, strict=True)])
    figure.update_yaxes(logarithmic(floor / 1.25, 1.4 * max(top, 10 * floor)))
    show_names(figure, names)
    return figure
