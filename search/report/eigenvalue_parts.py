"""What the report and the page of eigenvalues show alike: λ of every block, the loss around two."""

import math

import plotly.graph_objects as go

from search.report.eigenvalue_figure import eigenvalues
from search.report.surface_figure import Surface, surfaces
from search.traced import EigenvalueDocument

__all__ = ["block_figures", "has_holes"]


def block_figures(found: EigenvalueDocument) -> dict[str, go.Figure]:
    """Draw the eigenvalues and the surfaces, by the ids of their elements."""
    drawn = surfaces(
        [
            Surface(s.block, (s.eigenvalues[0], s.eigenvalues[1]), s.offsets, s.losses)
            for s in found.surfaces
        ]
    )
    return {
        "eigenvalues-figure": eigenvalues(found.blocks),
        **{f"surface-figure-{i}": figure for i, figure in enumerate(drawn.values())},
    }


def has_holes(found: EigenvalueDocument) -> bool:
    """Say whether the loss overflows somewhere on the surfaces."""
    losses = [loss for surface in found.surfaces for row in surface.losses for loss in row]
    return not all(map(math.isfinite, losses))
