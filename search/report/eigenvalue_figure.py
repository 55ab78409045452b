"""The figures of blocks' top eigenvalues: λ block by block, and S = λ / n in descending order."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from search.artefacts import BlockEigenvalue
from search.quantities import significant
from search.report.canvas import WARNING, canvas
from search.report.marks_figure import Marks, marks_figure
from search.report.named_axis import error_bars, show_names

__all__ = ["by_sensitivity", "eigenvalues", "order"]

_RESIDUAL = "± residual"
_BOTH = "± residual and data"


def eigenvalues(blocks: Sequence[BlockEigenvalue]) -> go.Figure:
    """Draw λ of every block as a bar, with its residual and its error over the examples."""
    figure = canvas("Block, in the network's order", "Top eigenvalue λ (loss / weight²)")
    figure.update_layout(showlegend=True)
    names = [escape(block.block) for block in blocks]
    values = [block.eigenvalue for block in blocks]
    figure.add_bar(
        name="λ",
        x=names,
        y=values,
        marker={"color": ["#8fb5d6" if value >= 0 else WARNING for value in values]},
        text=[_words(block) for block in blocks],
        textposition="none",
        hovertemplate="%{x}<br>%{text}<extra></extra>",
    )
    for name, errors, width, color in (
        (_BOTH, [_both(block) for block in blocks], 1.5, "#0b3d6e"),
        (_RESIDUAL, [block.residual for block in blocks], 5, "#0b3d6e"),
    ):
        bars = error_bars(names, values, errors, legend=name, color=color, width=width)
        figure.add_trace(bars)
    figure.update_layout(bargap=0.35)
    show_names(figure, names)
    figure.update_yaxes(rangemode="tozero")
    return figure


def order(blocks: Sequence[BlockEigenvalue]) -> go.Figure:
    """Draw S = λ / n of every block, the largest first, on a logarithmic axis."""
    ranked = by_sensitivity(blocks)
    marks = Marks(
        names=[block.block for block in ranked],
        values=[block.eigenvalue / block.n for block in ranked],
        inner=[block.residual / block.n for block in ranked],
        outer=[_both(block) / block.n for block in ranked],
        words=[
            f"S {significant(block.eigenvalue / block.n)}<br>{_words(block)}" for block in ranked
        ],
    )
    return marks_figure(
        marks,
        x="Block, in descending order of S",
        y="S = λ / n (loss / weight²)",
        value="S = λ / n",
        inner=_RESIDUAL,
        outer=_BOTH,
    )


def by_sensitivity(blocks: Sequence[BlockEigenvalue]) -> list[BlockEigenvalue]:
    """Sort blocks as HAWQ does: by S = λ / n, the largest first."""
    return sorted(blocks, key=lambda block: -block.eigenvalue / block.n)


def _both(block: BlockEigenvalue) -> float:
    return block.residual + block.data_error  # a bound and a standard error: no root of squares


def _words(block: BlockEigenvalue) -> str:
    return (
        f"λ {significant(block.eigenvalue)}<br>residual {significant(block.residual)}"
        f"<br>data error {significant(block.data_error)}"
    )
