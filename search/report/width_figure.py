"""The figures of channels' widths: for each layer and tensor the share of its channels at each."""

from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go

from hawq.allocation import by_owner
from hawq.space import PREFIX
from search.artefacts import Candidate, Summary
from search.report.canvas import FAINT, LABEL, canvas
from search.report.named_axis import make_room, show_names
from search.report.palette import width_color
from search.report.results import results_by_budget

__all__ = ["channel_widths"]


def channel_widths(summary: Summary) -> tuple[dict[str, go.Figure], list[tuple[int, int]]]:
    """Draw the choices that give every channel its own width, one figure for each.

    Returns:
        The figures, by method and budget in words, and the least width and height of each. None
        where no candidate has channels.
    """
    figures: dict[str, go.Figure] = {}
    sizes = []
    for group in results_by_budget(summary):
        seen: set[str] = set()
        for result in group.results:
            candidate = result.candidate
            if candidate.granularity == "channel" and candidate.digest not in seen:
                seen.add(candidate.digest)
                label = f"{result.names}, {group.budget.label}"
                figures[label] = figure = _widths(candidate)
                names = list(figure.layout.xaxis.categoryarray)
                sizes.append(make_room({label: figure}, names)[label])
    return figures, sizes


def _widths(candidate: Candidate) -> go.Figure:
    """Stack the shares of a candidate's channels, the layers first and then the tensors."""
    found = {
        name: bits for name, bits in by_owner(candidate.bits).items() if isinstance(bits, tuple)
    }
    figure = canvas("Layer, in the network's order", "Share of the channels (%)")
    names = [escape(name[2:]) for name in found]
    for width in sorted(set(candidate.bits.values())):
        figure.add_trace(_share(names, found, width))
    figure.update_layout(
        height=440,
        barmode="stack",
        bargap=0.25,
        showlegend=True,
        legend={"traceorder": "normal", "y": 1.09},
    )
    show_names(figure, names)
    figure.update_yaxes(range=[0, 100], showgrid=False)
    num_layers = sum(name.startswith(PREFIX["weights"]) for name in found)
    if 0 < num_layers < len(found):
        figure.update_xaxes(title_text="Layer, then tensor")
        _divide(figure, num_layers)
    return figure


def _share(names: Sequence[str], found: Mapping[str, tuple[int, ...]], width: int) -> go.Bar:
    counts = [bits.count(width) for bits in found.values()]
    what = "pruned" if width == 0 else f"{width} bit{'' if width == 1 else 's'}"
    return go.Bar(
        name=what,
        x=names,
        y=[100 * n / len(bits) for n, bits in zip(counts, found.values(), strict=True)],
        marker={"color": width_color(width), "line": {"color": "#9aa5b1", "width": 0.5}},
        text=[
            f"{n} of {len(bits)} channels: {what}"
            for n, bits in zip(counts, found.values(), strict=True)
        ],
        textposition="none",
        hovertemplate="%{x}<br>%{text}<extra></extra>",
    )


def _divide(figure: go.Figure, num_layers: int) -> None:
    """Mark where the layers end and the tensors begin."""
    at = num_layers - 0.5
    figure.add_vline(x=at, line={"color": FAINT, "width": 1, "dash": "dot"})
    for text, anchor, shift in (("weights", "right", -6), ("activations", "left", 6)):
        figure.add_annotation(
            x=at,
            y=1,
            yref="paper",
            yanchor="bottom",
            text=text,
            font=LABEL,
            xanchor=anchor,
            xshift=shift,
            showarrow=False,
        )
