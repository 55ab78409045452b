"""A horizontal axis of counts, which has whole numbers on it however few they are."""

import plotly.graph_objects as go

__all__ = ["show_counts"]

_FEW = 12


def show_counts(figure: go.Figure, first: float, last: float) -> None:
    """Give a figure a horizontal axis from one count to another.

    Args:
        figure: The figure.
        first: The lowest.
        last: The highest.
    """
    # Plotly would put halves between few counts, or the same whole number again and again.
    step = 1 if last - first <= _FEW else None
    room = max(0.5, 0.02 * (last - first))
    figure.update_xaxes(range=[first - room, last + room], tickformat="d", dtick=step)
