"""The figures of how far Ω can be trusted: measured against predicted, and pairs of groups."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from hawq.space import PREFIX, Kind
from search.artefacts import (
    CalibrationArtefact,
    Candidate,
    CandidateIncrease,
    GroupIncrease,
    Interactions,
    Summary,
)
from search.calibration.agreement import is_clear
from search.quantities import significant, with_error
from search.report.canvas import FAINT, canvas, logarithmic
from search.report.named_axis import show_names
from search.report.palette import Look, looks
from search.report.results import methods

__all__ = ["increases", "is_drawn", "matrix"]

_MARKS: dict[Kind, tuple[str, str]] = {
    "weights": ("circle", "#6aa3d0"),
    "activations": ("diamond", "#a07cc0"),
}
_DIVERGING = [[0, "#2166ac"], [0.5, "#f7f7f7"], [1, "#b2182b"]]


def is_drawn(found: GroupIncrease | CandidateIncrease) -> bool:
    """Whether logarithmic axes can show it."""
    return found.predicted > 0 and found.increase > 0


def increases(calibration: CalibrationArtefact, summary: Summary) -> go.Figure:
    """Draw measured against predicted increases of the loss, with the diagonal.

    Hollow marks are within two standard errors of nothing; large ones are whole candidates.
    """
    figure = canvas("Predicted increase of the loss, Ω/2", "Measured increase of the loss")
    figure.update_layout(height=520, showlegend=True)
    choices = [c for c in calibration.choices if is_drawn(c)]
    candidates = [c for c in calibration.candidates if is_drawn(c)]
    shown: list[GroupIncrease | CandidateIncrease] = [*choices, *candidates]
    across = _range([found.predicted for found in shown])
    up = _range([found.increase for found in shown])
    ends = [min(across[0], up[0]), max(across[1], up[1])]
    figure.add_scatter(
        name="measured = predicted",
        x=ends,
        y=ends,
        mode="lines",
        line={"color": FAINT, "width": 1, "dash": "dash"},
        hoverinfo="skip",
    )
    for kind in _MARKS:
        mine = [c for c in choices if c.group.startswith(PREFIX[kind])]
        if mine:
            figure.add_trace(_choices(kind, mine))
    look = looks(methods(summary.candidates))
    for found in candidates:
        same = [c for c in summary.candidates.candidates if c.digest == found.digest]
        figure.add_trace(_candidate(found, same, look[same[0].method]))
    figure.update_xaxes(logarithmic(*across))
    figure.update_yaxes(logarithmic(*up))
    return figure


def matrix(found: Interactions) -> go.Figure:
    """Draw interactions over the sum of both groups' own increases, in percent.

    Colours end at ±100 %; what cannot be told from nothing is left blank. The layout's width and
    height are the least at which the names are told apart.
    """
    figure = canvas("", "")
    names = [
        escape(f"{group.removeprefix(PREFIX['weights'])}, {bits} bits")
        for group, bits in zip(found.groups, found.bits, strict=True)
    ]
    percent = [[None if v is None else 100 * v for v in row] for row in found.relative]
    reach = max([abs(v) for row in percent for v in row if v is not None], default=1.0)
    reach = min(100.0, reach) or 1.0
    figure.add_heatmap(
        x=names,
        y=names,
        z=percent,
        zmin=-reach,
        zmax=reach,
        xgap=1,
        ygap=1,
        colorscale=_DIVERGING,
        colorbar={
            "title": {"text": "% of the sum", "side": "right"},
            "thickness": 12,
            "outlinewidth": 0,
        },
        hoverongaps=False,
        text=[
            [
                f"{with_error(value, error)} beyond the sum"
                for value, error in zip(*row, strict=True)
            ]
            for row in zip(found.interaction, found.interaction_error, strict=True)
        ],
        hovertemplate="%{x}<br>%{y}<br>%{z:+.0f} %: %{text}<extra></extra>",
    )
    show_names(figure, names)
    figure.update_yaxes(
        type="category", categoryarray=names, range=[len(names) - 0.4, -0.6], dtick=1
    )
    figure.update_xaxes(title=None)
    label = 7 * max(map(len, names))
    figure.update_layout(width=label + 26 * len(names) + 110, height=label + 26 * len(names) + 50)
    return figure


def _choices(kind: Kind, found: Sequence[GroupIncrease]) -> go.Scatter:
    symbol, color = _MARKS[kind]
    clear = [is_clear(c.increase, c.standard_error) for c in found]
    return go.Scatter(
        name=kind,
        x=[c.predicted for c in found],
        y=[c.increase for c in found],
        mode="markers",
        marker={
            "color": color,
            "size": 8,
            "symbol": [symbol if is_full else f"{symbol}-open" for is_full in clear],
        },
        text=[
            f"{escape(c.group.removeprefix(PREFIX['weights']))}, {c.bits} bits<br>{_measured(c)}"
            for c in found
        ],
        hovertemplate="%{text}<extra></extra>",
    )


def _candidate(found: CandidateIncrease, same: Sequence[Candidate], look: Look) -> go.Scatter:
    names = "<br>".join(escape(f"{c.method}, {c.budget}") for c in same)
    return go.Scatter(
        meta=same[0].method,
        showlegend=False,
        x=[found.predicted],
        y=[found.increase],
        mode="markers",
        marker={
            "color": look.color,
            "symbol": look.symbol,
            "size": 15,
            "opacity": 1,
            "line": {"color": "white", "width": 1.5},
        },
        text=[f"{names}<br>{_measured(found)}"],
        hovertemplate="%{text}<extra></extra>",
    )


def _measured(found: GroupIncrease | CandidateIncrease) -> str:
    return (
        f"predicted {significant(found.predicted)}<br>"
        f"measured {with_error(found.increase, found.standard_error)}"
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    return (min(values) / 2, 2 * max(values)) if values else (0.1, 10.0)
