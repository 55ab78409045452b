"""The report's page: what to say in which order, filled into ``page.html``."""

import yaml

from search.artefacts import Summary
from search.report.bits_map import bits_map
from search.report.caveats import caveats
from search.report.estimators import ESTIMATORS
from search.report.figures import (
    MAX_FRONT_POINTS,
    accuracy_by_size,
    fronts,
    training_curves,
)
from search.report.findings import searched, verdicts
from search.report.palette import looks
from search.report.results import methods, results_by_budget
from search.report.template import fill
from search.report.trace_figure import traces

__all__ = ["render"]


def render(summary: Summary) -> str:
    """Write the report of a run as one HTML page.

    The page holds its figures and plotly.js once, loads nothing, and depends on the summary
    alone: equal summaries give equal pages.

    Returns:
        HTML to be written as UTF-8.
    """
    curves = training_curves(summary)
    figures = {
        "accuracy-figure": accuracy_by_size(summary),
        "fronts-figure": fronts(summary),
        "traces-figure": traces(summary.curvature),
        **{f"curve-figure-{i}": figure for i, figure in enumerate(curves.values())},
    }
    return fill(
        "page.html",
        figures,
        summary=summary,
        searched=searched(summary),
        verdicts=verdicts(summary),
        caveats=caveats(summary),
        groups=results_by_budget(summary),
        looks=looks(methods(summary)),
        has_evaluations=any(c.evaluations > 1 for c in summary.candidates.candidates),
        map=bits_map(summary),
        estimator=ESTIMATORS[summary.curvature.estimator],
        curves=list(curves),
        hidden=_hidden_points(summary),
        is_thinned=any(
            len(front.weight_bits) > MAX_FRONT_POINTS for front in summary.candidates.fronts
        ),
        max_front_points=MAX_FRONT_POINTS,
        config=yaml.safe_dump(
            summary.model_dump(mode="json")["config"], sort_keys=False, allow_unicode=True
        ),
    )


def _hidden_points(summary: Summary) -> int:
    """Count the points of the fronts whose Ω is zero, which a logarithm cannot show."""
    candidates = summary.candidates
    offered = [omega for front in candidates.fronts for omega in front.sensitivity]
    chosen = [candidate.sensitivity for candidate in candidates.candidates]
    return sum(omega <= 0 for omega in [*offered, *chosen])
