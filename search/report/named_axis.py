"""A horizontal axis of names, and error bars over it."""

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

__all__ = ["error_bars", "make_room", "show_names"]

# In pixels: a phone’s width, a letter of an axis, and what figures have for names as they are.
_NARROW, _LETTER, _ROOM = 320, 7, 112


def show_names(figure: go.Figure, names: Sequence[str]) -> None:
    """Give a figure's horizontal axis these names, escaped for plotly, in this order."""
    figure.update_xaxes(
        type="category",
        categoryarray=names,
        range=[-0.6, len(names) - 0.4],
        tickangle=-90,
        dtick=1,
        title_standoff=8,
    )


def make_room(figures: Mapping[str, go.Figure], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Give the figures room for names on their axes; return their least widths and heights.

    Figures without names, the surfaces, stay as they are.
    """
    sizes = {}
    for id_, figure in figures.items():
        width = _NARROW
        if figure.layout.xaxis.tickangle is not None:
            room = max(0, _LETTER * max(len(name) for name in names) - _ROOM)
            figure.update_layout(height=figure.layout.height + room)
            width = max(width, 110 + 17 * len(names))
        sizes[id_] = (width, figure.layout.height)
    return sizes


def error_bars(
    names: Sequence[str],
    values: Sequence[float],
    errors: Sequence[float],
    *,
    legend: str,
    color: str,
    width: float,
    floor: float = -math.inf,
) -> go.Scatter:
    """Draw error bars as lines, cut below a floor, where they may go on to minus infinity."""
    x: list[str | None] = []
    y: list[float | None] = []
    for name, value, error in zip(names, values, errors, strict=True):
        if value + error > floor:
            x += [name, name, None]
            y += [max(value - error, floor / 2), value + error, None]
    return go.Scatter(
        name=legend,
        x=x,
        y=y,
        mode="lines",
        line={"color": color, "width": width},
        hoverinfo="skip",
    )
