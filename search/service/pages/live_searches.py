"""Searches under way: what agents and samplers have tried, and the best so far."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path

import plotly.graph_objects as go

from search.report.canvas import canvas
from search.report.palette import Look
from search.service.pages.count_axis import show_counts

__all__ = ["Learned", "learning_curves", "read_learned"]


@dataclass(frozen=True, slots=True)
class Learned:
    """The scores of one search, in their order; each is in [0, 1], or −Ω."""

    method: str
    budget: str
    seed: int
    scores: tuple[float, ...]


def read_learned(run: Path, budgets: Sequence[str]) -> list[Learned]:
    """Read the scores of every search of a run, as far as it is.

    Args:
        run: The folder.
        budgets: The labels of the config's budgets, in order.
    """
    found = []
    for path in sorted((run / "searches").glob("*-*-*/evaluations.jsonl")):
        method, index, seed = path.parent.name.rsplit("-", 2)
        lines = path.read_text(encoding="utf-8").split("\n")[1:-1]
        scores = tuple(json.loads(line)["score"] for line in lines)
        if scores and int(index) < len(budgets):
            found.append(Learned(method, budgets[int(index)], int(seed), scores))
    return found


def learning_curves(
    learned: Sequence[Learned], look: Mapping[str, Look], name: str
) -> dict[str, go.Figure]:
    """Draw each search's scores as faint marks and the best so far as a line, by budget.

    Args:
        learned: The searches.
        look: Of their methods.
        name: Of the score.
    """
    drawn: dict[str, go.Figure] = {}
    for budget in dict.fromkeys(one.budget for one in learned):
        figure = drawn[budget] = canvas("Allocations scored", escape(name))
        figure.update_layout(height=340)
        show_counts(figure, 1, max(len(one.scores) for one in learned if one.budget == budget))
        for one in learned:
            if one.budget == budget:
                _draw_learned(figure, one, look[one.method])
    return drawn


def _draw_learned(figure: go.Figure, one: Learned, look: Look) -> None:
    label = escape(f"{one.method}, seed {one.seed}")
    x = list(range(1, len(one.scores) + 1))
    figure.add_scatter(
        meta=one.method,
        x=x,
        y=one.scores,
        mode="markers",
        marker={"color": look.color, "symbol": look.symbol, "size": 6, "opacity": 0.6},
        hoverinfo="skip",
    )
    figure.add_scatter(
        meta=one.method,
        x=x,
        y=list(accumulate(one.scores, max)),
        mode="lines",
        line={"color": look.color, "width": 2, "dash": look.dash, "shape": "hv"},
        text=[label] * len(x),
        hovertemplate="%{text}<br>best of %{x}: %{y:.4~f}<extra></extra>",
    )
