"""Figures of what counts: the finalists' accuracies, and whether scores foretell them."""

from collections.abc import Mapping, Sequence
from html import escape

import plotly.graph_objects as go

from search.comparison.document import AgreementPoint
from search.comparison.scale import Scale
from search.comparison.standings import Standing
from search.quantities import percent, plus_minus
from search.report.canvas import canvas
from search.report.palette import Look, looks

__all__ = ["agreement", "finalists"]

# Standard errors on either side of a mean that 95 % of a normal distribution lie within.
_HALF = 1.96


def finalists(found: Sequence[Standing], look: Mapping[str, Look], score_name: str) -> go.Figure:
    """Draw the finalists of one budget, the best on top, with 95 % intervals and single trainings.

    Args:
        found: Methods of the budget; those without a finalist are left out.
        look: Of the methods.
        score_name: What is tested.
    """
    figure = canvas(f"Test {escape(score_name)}, fine-tuned (%)", "")
    drawn = sorted(
        [(s.method, s.finalist) for s in found if s.finalist is not None],
        key=lambda pair: pair[1].score,
    )
    for method, finalist in drawn:
        name, color = escape(method), look[method].color
        figure.add_scatter(
            meta=method,
            x=[100 * score for score in finalist.by_seed],
            y=[name] * len(finalist.by_seed),
            mode="markers",
            marker={"color": color, "symbol": "circle-open", "size": 5},
            hoverinfo="skip",
        )
        figure.add_scatter(
            meta=method,
            x=[100 * finalist.score],
            y=[name],
            error_x={
                "array": [100 * _HALF * finalist.standard_error],
                "width": 5,
                "thickness": 1.4,
                "color": color,
            },
            mode="markers",
            marker={
                "color": color,
                "symbol": look[method].symbol,
                "size": 12,
                "line": {"color": "white", "width": 1},
            },
            text=[f"{name}<br>{plus_minus(percent(finalist.score), finalist.standard_error)} %"],
            hovertemplate="%{text}<extra></extra>",
        )
    names = [escape(method) for method, _ in drawn]
    figure.update_yaxes(
        type="category",
        categoryarray=names,
        categoryorder="array",
        range=[-0.6, len(names) - 0.4],
        dtick=1,
        title=None,
    )
    figure.update_layout(height=110 + 30 * len(names))
    return figure


def agreement(points: Sequence[AgreementPoint], scale: Scale, score_name: str) -> go.Figure:
    """Draw what allocations reach, fine-tuned, against their scores, by budget."""
    figure = canvas(scale.axis, f"Test {escape(score_name)}, fine-tuned (%)")
    by_budget = {budget: [p for p in points if p.budget == budget] for budget in _budgets(points)}
    for budget, look in looks(list(by_budget)).items():
        mine = by_budget[budget]
        figure.add_scatter(
            name=escape(budget) or "allocations",
            x=[scale.factor * p.score for p in mine],
            y=[100 * p.finetuned for p in mine],
            mode="markers",
            marker={
                "color": look.color,
                "symbol": look.symbol,
                "size": 10,
                "line": {"color": "white", "width": 1},
            },
            text=[escape(p.digest) for p in mine],
            hovertemplate="%{text}<br>%{x:.4~g} → %{y:.2f} %<extra></extra>",
        )
    figure.update_layout(showlegend=len(by_budget) > 1, height=340)
    return figure


def _budgets(points: Sequence[AgreementPoint]) -> list[str]:
    return list(dict.fromkeys(point.budget for point in points))
