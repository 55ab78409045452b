"""An empty figure in the report's style: its fonts, inks and axes."""

import math
from typing import Any

import plotly.graph_objects as go

__all__ = ["FAINT", "LABEL", "WARNING", "canvas", "logarithmic"]

FAINT, WARNING = "#66727f", "#b42318"
LABEL = {"size": 12, "color": FAINT}
_INK, _GRID = "#1f2933", "#e6e9ee"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def canvas(x: str, y: str) -> go.Figure:
    """Make an empty figure with titled axes in the report's style."""
    axis: dict[str, Any] = {
        "gridcolor": _GRID,
        "linecolor": "#b8c0ca",
        "ticks": "outside",
        "tickcolor": "#b8c0ca",
        "zeroline": False,
        "showline": True,
        "automargin": True,
    }
    return go.Figure(
        layout={
            "template": None,
            "height": 440,
            "font": {"family": _FONT, "size": 13, "color": _INK},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "margin": {"l": 60, "r": 16, "t": 16, "b": 48},
            "legend": {
                "orientation": "h",
                "x": 0,
                "y": 1.02,
                "yanchor": "bottom",
                "tracegroupgap": 0,
            },
            # The page has the legend of methods; a trace names its method in ``meta``.
            "showlegend": False,
            "hovermode": "closest",
            # A finger that scrolls the page must not zoom a figure; the buttons still do.
            "dragmode": False,
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "#b8c0ca", "activecolor": _INK},
            "xaxis": axis | {"title": {"text": x}},
            "yaxis": axis | {"title": {"text": y}},
        }
    )


def logarithmic(low: float, high: float) -> dict[str, Any]:
    """Return what makes an axis logarithmic, between two positive numbers."""
    axis: dict[str, Any] = {"type": "log", "range": [math.log10(low), math.log10(high)]}
    if high > 100 * low:
        return axis | {"exponentformat": "power", "dtick": 1}
    # Between few powers of ten other labels are needed, which plotly would write as bare digits.
    return axis | {"tickformat": "~g"}
