"""Traces under way: what one look at the batches tells, how estimates settle, how sure they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from hawq.curvature import TraceEstimate, UnitSums
from hawq.curvature.estimate import summarize
from search.events import Event
from search.quantities import significant
from search.report.canvas import FAINT, LABEL, canvas, logarithmic
from search.report.named_axis import show_names
from search.report.palette import Look, looks
from search.service.pages.count_axis import show_counts
from search.unit_file import read_units

__all__ = ["Units", "convergence", "first_look", "relative_errors", "units_so_far"]

_MAX_UNITS_BYTES = 16 << 20
_MAX_ROUNDS = 12
_MAX_LINES = 5
_INK, _BAR, _BAR_ERROR = "#1f2933", "#8fb5d6", "#0b3d6e"


@dataclass(frozen=True, slots=True)
class Units:
    """The units that an estimation has done by now.

    Attributes:
        sites: Names of the first groups: layers, or activation tensors; empty where none is known.
        sums: Of the units, in the order of their indices.
    """

    sites: tuple[str, ...]
    sums: tuple[UnitSums, ...]


def units_so_far(path: Path) -> Units:
    """Read an estimation's file of units; of one too large to be read every few seconds, none."""
    if not path.exists() or path.stat().st_size > _MAX_UNITS_BYTES:
        return Units((), ())
    return Units(*read_units(path))


def first_look(units: Units, noun: str) -> go.Figure | None:
    """Draw each site's share of the sum of all traces, of the batches that are back.

    Args:
        units: What is done.
        noun: For a site: ``layer``.

    Returns:
        The figure; None before two batches are back, and where no site has a name.
    """
    once = tuple({unit.batch: unit for unit in reversed(units.sums)}.values())[::-1]
    found = _estimate(once) if units.sites else None
    if found is None:
        return None
    sites = slice(0, len(units.sites))
    total = float(found.trace[sites].sum()) or 1.0
    shares, errors = 100 * found.trace[sites] / total, 100 * found.share_probe_error[sites]
    names = [escape(name) for name in units.sites]
    figure = canvas(f"{noun.capitalize()}, in order", "Share of all traces (%)")
    figure.add_bar(
        x=names,
        y=shares.tolist(),
        marker={"color": _BAR},
        error_y={"array": errors.tolist(), "thickness": 1.5, "width": 3, "color": _BAR_ERROR},
        text=[
            f"{significant(s)} ± {significant(e)} %" for s, e in zip(shares, errors, strict=True)
        ],
        textposition="none",
        hovertemplate="%{x}<br>%{text}<extra></extra>",
    )
    show_names(figure, names)
    figure.update_layout(bargap=0.35)
    return figure


def convergence(units: Units) -> go.Figure | None:
    """Draw the largest traces as they settle, with their probe errors, round by round.

    Batches differ, for examples are drawn by their importance: only a round that has been through
    all of them is an estimate.

    Returns:
        The figure; None where there are fewer than two rounds, and where no site has a name.
    """
    settled = _rounds(units.sums) if units.sites else []
    if len(settled) < 2:
        return None
    named = units.sites
    largest = np.argsort(-settled[-1].trace[: len(named)])[:_MAX_LINES]
    figure = canvas("Probes on every example", "Hessian trace")
    shown = looks([named[i] for i in largest])
    for i in largest:
        figure.add_trace(_settling(named[i], shown[named[i]], settled, int(i)))
    positive = [v for trace in figure.data for v in trace.y if v > 0]
    if positive:
        figure.update_yaxes(logarithmic(min(positive) / 1.6, 1.6 * max(positive)))
    figure.update_layout(showlegend=True)
    figure.update_xaxes(tickvals=[found.num_probes for found in settled])
    return figure


def _rounds(units: Sequence[UnitSums]) -> list[TraceEstimate]:
    """Estimate after every round that has been through all batches."""
    num = 1 + max((unit.batch for unit in units), default=-1)
    ends = _spread(len(units) // max(num, 1))
    return [found for end in ends if (found := _estimate(units[: end * num])) is not None]


def _estimate(units: Sequence[UnitSums]) -> TraceEstimate | None:
    """Add units up; None where they are too few, with a gap among them, or not finite."""
    if not units:
        return None
    try:
        return summarize(units, ["a group"] * (units[0].sums.shape[1] - 1))
    except ValueError:
        return None


def _spread(rounds: int) -> list[int]:
    """Choose some of so many rounds, evenly, the last among them."""
    num = min(rounds, _MAX_ROUNDS)
    return [round(part * rounds / num) for part in range(1, num + 1)]


def _settling(name: str, look: Look, settled: Sequence[TraceEstimate], i: int) -> go.Scatter:
    return go.Scatter(
        name=escape(name),
        x=[found.num_probes for found in settled],
        y=[float(found.trace[i]) for found in settled],
        error_y={"array": [float(found.probe_error[i]) for found in settled], "width": 3},
        mode="lines+markers",
        line={"color": look.color, "width": 1.6},
        marker={"color": look.color, "symbol": look.symbol, "size": 7},
        text=[escape(name)] * len(settled),
        hovertemplate="%{text}<br>%{y:.3~g} ± %{error_y.array:.2~g}<br>%{x} probes<extra></extra>",
    )


def relative_errors(events: Sequence[Event], rtol: float) -> go.Figure | None:
    """Draw the largest probe error, relative to its trace, as the curvature goes on.

    Args:
        events: Of the run.
        rtol: What it is to come below.
    """
    known = [
        (event.done or 0.0, event.measures["relative_error"])
        for event in events
        if event.stage == "curvature" and event.measures and "relative_error" in event.measures
    ]
    # Activations come after the weights, and begin again.
    begins = [i for i in range(1, len(known)) if known[i][0] < known[i - 1][0]]
    pairs = [(done, error) for done, error in known[max(begins, default=0) :] if error > 0]
    if len(pairs) < 2:
        return None
    figure = canvas("Units of work done", "Largest relative probe error")
    figure.add_scatter(
        x=[done for done, _ in pairs],
        y=[error for _, error in pairs],
        mode="lines+markers",
        line={"color": _INK, "width": 1.6},
        marker={"size": 5},
        hovertemplate="%{y:.3~g} after %{x}<extra></extra>",
    )
    figure.add_hline(y=rtol, line={"color": FAINT, "width": 1, "dash": "dot"})
    errors = [error for _, error in pairs]
    figure.update_yaxes(logarithmic(min(rtol, *errors) / 1.6, 1.3 * max(rtol, *errors)))
    figure.add_annotation(
        text=f"tolerance {rtol:g}",
        font=LABEL,
        x=0,
        xref="x domain",
        xanchor="left",
        y=math.log10(rtol),  # a line of a logarithmic axis is placed by its value, a text is not
        yanchor="top",
        showarrow=False,
    )
    show_counts(figure, min(done for done, _ in pairs), max(done for done, _ in pairs))
    figure.update_layout(height=340)
    return figure
