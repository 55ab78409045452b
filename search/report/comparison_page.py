"""The page of a comparison: the verdict, the table, and the figures that they rest on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import yaml

from search.comparison.document import ComparisonDocument
from search.comparison.finals import finalist_leads, written
from search.comparison.scale import Scale
from search.comparison.standings import Standing, standings
from search.comparison.table import rows
from search.comparison.trust import trust
from search.comparison.verdict import verdict
from search.folder import write_atomically
from search.report.comparison_curves import by_cost, by_evaluations
from search.report.comparison_finals import agreement, finalists
from search.report.comparison_findings import (
    compared,
    comparison_caveats,
    cost_said,
    evaluations_said,
    finalists_said,
    shares_said,
)
from search.report.comparison_fronts import covered, size_and_score
from search.report.comparison_looks import comparison_looks
from search.report.template import fill

__all__ = ["render_comparison", "write_comparison_page"]


@dataclass(frozen=True, slots=True)
class _Panel:
    """A figure of one budget with what is said of it."""

    id: str
    budget: str
    said: str
    height: int


def write_comparison_page(folder: Path, document: ComparisonDocument) -> Path:
    """Write a comparison's page, ``comparison.html``.

    Args:
        folder: Of the run.
        document: The comparison.

    Returns:
        Where the page is.
    """
    path = folder / "comparison.html"
    write_atomically(path, render_comparison(document))
    return path


def render_comparison(document: ComparisonDocument) -> str:
    """Write a comparison as one HTML page.

    It loads nothing and depends on the document alone: equal documents give equal pages. What is
    missing is said to be.

    Args:
        document: The comparison.

    Returns:
        HTML to be written as UTF-8.
    """
    found, scale = standings(document), Scale(document.fidelity)
    look = comparison_looks(list(dict.fromkeys(s.method for s in found)))
    budgets = {
        budget: [s for s in found if s.budget == budget]
        for budget in dict.fromkeys(s.budget for s in found)
    }
    searched = {b: mine for b, mine in budgets.items() if any(s.searches for s in mine)}
    tested = {b: mine for b, mine in budgets.items() if any(s.finalist for s in mine)}
    figures: dict[str, go.Figure] = {}
    panels = {
        "evaluations": _panels(
            "evaluations",
            {b: by_evaluations(mine, scale, look) for b, mine in searched.items()},
            [evaluations_said(mine, scale) for mine in searched.values()],
            figures,
        ),
        "cost": _panels(
            "cost",
            {b: by_cost(mine, scale, look) for b, mine in searched.items()},
            [cost_said(mine, scale) for mine in searched.values()],
            figures,
        ),
        "finalists": _panels(
            "finalists",
            {b: finalists(mine, look, document.score_name) for b, mine in tested.items()},
            [finalists_said(mine) for mine in tested.values()],
            figures,
        ),
    }
    shares = covered(found) if len(budgets) > 1 else []
    if len(budgets) > 1:
        figures["front-figure"] = size_and_score(found, scale, look)
    if document.agreement:
        figures["agreement-figure"] = agreement(document.agreement, scale, document.score_name)
    return fill(
        "comparison.html",
        figures,
        document=document,
        compared=compared(document, found),
        verdict=verdict(document),
        caveats=comparison_caveats(document, found),
        looks=look,
        unit=scale.unit,
        rows={budget: [r for r in rows(document) if r.budget == budget] for budget in budgets},
        panels=panels,
        has_front=len(budgets) > 1,
        shares=shares,
        shares_said=shares_said(shares),
        trust=trust(document),
        differences=_differences(document, found),
        config=yaml.safe_dump(document.config, sort_keys=False, allow_unicode=True),
    )


def _panels(
    name: str,
    drawn: dict[str, go.Figure],
    said: Sequence[str],
    figures: dict[str, go.Figure],
) -> list[_Panel]:
    """Add a section's figures to those of the page, and return their places."""
    places = []
    for i, ((budget, figure), words) in enumerate(zip(drawn.items(), said, strict=True)):
        figures[f"{name}-figure-{i}"] = figure
        places.append(_Panel(f"{name}-figure-{i}", budget, words, figure.layout.height))
    return places


def _differences(
    document: ComparisonDocument, found: Sequence[Standing]
) -> list[tuple[str, str, str, str, str]]:
    """Lay out the finalists' paired differences: budget, two methods, the lead, what it shows."""
    leads = finalist_leads(document)
    words = {1: "above", 0: "not told apart", -1: "below"}
    tested = [s for s in found if s.finalist is not None]
    return [
        (a.budget, a.method, b.method, written(lead), words[lead.sign])
        for i, a in enumerate(tested)
        for b in tested[:i]
        if (lead := leads.get((a.budget, a.method, b.method))) is not None
    ]
