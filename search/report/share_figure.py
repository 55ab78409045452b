"""The figure of each site's share of the sum of all traces, which an allocation depends on."""

from html import escape

import plotly.graph_objects as go

from search.quantities import significant
from search.report.canvas import WARNING, canvas
from search.report.named_axis import show_names
from search.report.sites import Sites

__all__ = ["shares"]


def shares(sites: Sites) -> go.Figure:
    """Draw a bar for each site, with one standard error over probes and examples."""
    noun = sites.noun.capitalize()
    figure = canvas(f"{noun}, in the network's order", "Share of Σ trace (%)")
    figure.update_layout(height=440, bargap=0.35)
    names = [escape(name) for name in sites.layers]
    values = [100 * group.share for group in sites.groups]
    errors = [100 * group.share_error for group in sites.groups]
    figure.add_bar(
        x=names,
        y=values,
        marker={"color": ["#8fb5d6" if value >= 0 else WARNING for value in values]},
        error_y={"array": errors, "thickness": 1.5, "width": 3, "color": "#0b3d6e"},
        text=[
            f"{significant(value)} ± {significant(error)} %"
            for value, error in zip(values, errors, strict=True)
        ],
        textposition="none",
        hovertemplate="%{x}<br>%{text}<extra></extra>",
    )
    show_names(figure, names)
    figure.update_yaxes(rangemode="tozero")
    return figure
