"""The figure of bits: a row a candidate, a column a layer."""

from collections.abc import Sequence
from html import escape
from statistics import fmean

import plotly.graph_objects as go

from hawq.allocation import by_owner
from hawq.space import PREFIX, Kind
from search.artefacts import Candidate
from search.report.canvas import canvas
from search.report.named_axis import show_names
from search.report.palette import width_color

__all__ = ["heat_map"]


def heat_map(candidates: Sequence[Candidate], of: Kind) -> go.Figure | None:
    """Draw the bits of every layer (or activation tensor), a row a candidate.

    Channels of one layer are shown together, as their mean.
    """
    chosen = [by_owner(candidate.bits) for candidate in candidates]
    prefix = PREFIX[of]
    owners = [
        owner
        for owner in dict.fromkeys(o for row in chosen for o in row)
        if owner.startswith(prefix)
    ]
    if not owners:
        return None
    bits = [[_mean(row.get(owner)) for owner in owners] for row in chosen]
    names = [escape(owner.removeprefix(prefix)) for owner in owners]
    budgets = {candidate.budget for candidate in candidates}
    rows = [
        escape(c.method if len(budgets) == 1 else f"{c.method}, {c.budget}") for c in candidates
    ]
    figure = canvas("", "")
    figure.add_heatmap(
        x=names,
        y=rows,
        z=bits,
        zmin=1,
        zmax=8,
        colorscale=[[(b - 1) / 7, width_color(b)] for b in range(1, 9)],
        showscale=False,
        xgap=1,
        ygap=1,
        hovertemplate="%{x}<br>%{y}<br>%{z:.3~g} bits<extra></extra>",
    )
    cells = [
        (name, row, b)
        for row, found in zip(rows, bits, strict=True)
        for name, b in zip(names, found, strict=True)
        if b is not None
    ]
    figure.add_scatter(
        x=[name for name, _, _ in cells],
        y=[row for _, row, _ in cells],
        text=[f"{b:.2g}" for *_, b in cells],
        mode="text",
        # On the darker half of the widths' shades.
        textfont={"size": 11, "color": ["#ffffff" if b > 4.5 else "#10243a" for *_, b in cells]},
        hoverinfo="skip",
    )
    show_names(figure, names)
    figure.update_yaxes(autorange="reversed", ticks="", type="category")
    room = 7 * max(len(name) for name in names)
    figure.update_layout(height=60 + room + 26 * len(rows), minreducedheight=20)
    return figure


def _mean(bits: int | tuple[int, ...] | None) -> float | None:
    if bits is None:
        return None
    return fmean(bits) if isinstance(bits, tuple) else float(bits)
