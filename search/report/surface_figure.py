"""The loss around the weights, one figure a block, all on one scale of colours.

Contours rather than a relief: two can be compared, read off and printed, and need no WebGL.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go

from search.quantities import significant
from search.report.canvas import canvas

__all__ = ["Surface", "surfaces"]

_COLORS = [[0, "#f3f7fb"], [0.5, "#6aa3d0"], [1, "#083568"]]
_NUM_LEVELS = 14


@dataclass(frozen=True, slots=True)
class Surface:
    """The loss along a block's two top eigenvectors, which have length 1.

    Attributes:
        block: Its name.
        eigenvalues: Of the first and the second eigenvector, in loss per squared weight.
        offsets: Distances from the weights along each, increasing, zero in the middle.
        losses: Rows along the first eigenvector, columns along the second; may overflow.
    """

    block: str
    eigenvalues: tuple[float, float]
    offsets: Sequence[float]
    losses: Sequence[Sequence[float]]


def surfaces(found: Sequence[Surface]) -> dict[str, go.Figure]:
    """Draw each block's loss as contours over the two directions.

    Colours are logarithmic where every loss is positive, and linear otherwise. Where a loss is
    infinite or NaN, there is a hole.

    Returns:
        Block name to figure, in the order given.
    """
    finite = [x for s in found for row in s.losses for x in row if math.isfinite(x)]
    is_logarithmic = min(finite, default=0.0) > 0
    level = math.log10 if is_logarithmic else float
    low, high = (level(pick(finite, default=1.0)) for pick in (min, max))
    figures = {}
    for surface in found:
        first, second = surface.eigenvalues
        figure = canvas(
            f"Along eigenvector 1, λ = {significant(first)}",
            f"Along eigenvector 2, λ = {significant(second)}",
        )
        columns = list(zip(*surface.losses, strict=True))  # plotly's rows go up the vertical axis
        figure.add_contour(
            name=escape(surface.block),
            x=list(surface.offsets),
            y=list(surface.offsets),
            z=[[level(x) if math.isfinite(x) else None for x in row] for row in columns],
            zmin=low,
            zmax=high,
            contours={"start": low, "end": high, "size": (high - low) / _NUM_LEVELS or 1.0},
            colorscale=_COLORS,
            line={"color": "white", "width": 0.5},
            colorbar={
                "title": {"text": "Loss", "side": "right"},
                "thickness": 12,
                "outlinewidth": 0,
                **(_ticks(low, high) if is_logarithmic else {}),
            },
            text=[[significant(x) for x in row] for row in columns],
            hovertemplate="%{x:.3~g} along 1, %{y:.3~g} along 2<br>loss %{text}<extra></extra>",
        )
        figure.add_scatter(
            name="the weights themselves",
            x=[0],
            y=[0],
            mode="markers",
            marker={"symbol": "cross-thin", "size": 10, "line": {"color": "#d55e00", "width": 2}},
            hoverinfo="skip",
        )
        figure.update_xaxes(range=[surface.offsets[0], surface.offsets[-1]])
        figure.update_yaxes(range=[surface.offsets[0], surface.offsets[-1]])
        figure.update_layout(height=340)
        figures[surface.block] = figure
    return figures


def _ticks(low: float, high: float) -> dict[str, list[float] | list[str]]:
    """Label decades between two logarithms, with 2 and 5 where they are few, or only the ends."""
    values = [
        digit * 10.0**decade
        for decade in range(math.floor(low), math.ceil(high) + 1)
        for digit in ((1, 2, 5) if high - low < 3 else (1,))
        if low <= math.log10(digit) + decade <= high
    ]
    values = values if len(values) > 1 else [10**low, 10**high]
    return {
        "tickvals": [math.log10(value) for value in values],
        "ticktext": [f"{value:.3g}" for value in values],
    }
