"""The figure of the average Hessian traces, with both of their errors."""

import math
from collections.abc import Sequence
from typing import Protocol

import plotly.graph_objects as go

from search.quantities import significant
from search.report.marks_figure import Marks, marks_figure

__all__ = ["Curvature", "traces"]


class Curvature(Protocol):
    """Traces of layers, or of whatever else has a name and elements."""

    @property
    def layers(self) -> Sequence[str]:
        """Names."""

    @property
    def num_elements(self) -> Sequence[int]:
        """What each trace is divided by."""

    @property
    def trace(self) -> Sequence[float]:
        """Of the mean loss's Hessian block."""

    @property
    def probe_error(self) -> Sequence[float]:
        """Standard error over the random probes."""

    @property
    def data_error(self) -> Sequence[float]:
        """Standard error over the choice of examples."""


def traces(
    curvature: Curvature, *, x: str = "Layer, in the network's order", unit: str = "loss / weight²"
) -> go.Figure:
    """Draw each layer's average trace: thick bars probe error, thin bars probes and data.

    Args:
        curvature: The traces.
        x: Title of the horizontal axis.
        unit: Of the averages.
    """

    def over(values: Sequence[float]) -> list[float]:
        return [value / n for value, n in zip(values, curvature.num_elements, strict=True)]

    mean, probe, data = map(over, (curvature.trace, curvature.probe_error, curvature.data_error))
    marks = Marks(
        names=curvature.layers,
        values=mean,
        inner=probe,
        outer=[math.hypot(p, d) for p, d in zip(probe, data, strict=True)],
        words=[
            f"average trace {significant(m)}<br>probe error {significant(p)}"
            f"<br>data error {significant(d)}"
            for m, p, d in zip(mean, probe, data, strict=True)
        ],
    )
    return marks_figure(
        marks,
        x=x,
        y=f"Average Hessian trace ({unit})",
        value="average trace",
        inner="± one standard error: probes alone",
        outer="± one standard error: probes and data",
    )
