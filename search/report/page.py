"""The report's page: what to say in which order, filled into ``page.html``."""

import numpy as np
import plotly.graph_objects as go
import yaml

from search.artefacts import Summary
from search.pictured import Boxes, PicturesDocument, read_jpeg
from search.report.bits_map import bits_map
from search.report.calibration_findings import trust
from search.report.caveats import caveats
from search.report.cost_columns import cost_columns
from search.report.detection_pictures import DetectionPicture, Panel, detection_pictures
from search.report.eigenvalue_parts import block_figures, has_holes
from search.report.estimators import ESTIMATORS
from search.report.figures import (
    MAX_FRONT_POINTS,
    accuracy_by_size,
    fronts,
    num_hidden,
    training_curves,
)
from search.report.findings import searched, verdicts
from search.report.named_axis import make_room
from search.report.palette import looks
from search.report.results import methods, num_seeds, results_by_budget
from search.report.study_figure import study_figures
from search.report.study_findings import recipe_chosen, study_rows
from search.report.template import fill
from search.report.trace_figure import traces
from search.report.trace_findings import iterated
from search.report.width_figure import channel_widths
from search.searchers import SEARCHERS
from search.traced import EigenvalueDocument

__all__ = ["render"]


def render(
    summary: Summary,
    eigenvalues: EigenvalueDocument | None = None,
    pictures: PicturesDocument | None = None,
) -> str:
    """Write the report of a run as one HTML page.

    The page holds its figures and plotly.js once, loads nothing, and depends on the arguments
    alone: equal summaries give equal pages.

    Args:
        summary: The run.
        eigenvalues: Of the blocks of the network; left out, with a caveat, where they are of other
            weights than the run's.
        pictures: Of a detector.

    Returns:
        HTML to be written as UTF-8.
    """
    shown = eigenvalues
    if shown is not None and shown.weights_sha256 != summary.model.weights_sha256:
        shown = None
    of_blocks = {} if shown is None else block_figures(shown)
    trusted = trust(summary)
    curves = training_curves(summary)
    studied = study_figures(summary)
    headings, rows = study_rows(summary.study) if summary.study else ([], [])
    activation_map = bits_map(summary, "activations")
    widths, width_sizes = channel_widths(summary)
    columns = cost_columns(summary)
    figures = {
        "accuracy-figure": accuracy_by_size(summary),
        "fronts-figure": fronts(summary.candidates),
        **(
            {"activation-fronts-figure": fronts(summary.candidates, "activations")}
            if activation_map
            else {}
        ),
        "traces-figure": traces(summary.curvature),
        **_activation_traces(summary),
        **{f"widths-figure-{i}": figure for i, figure in enumerate(widths.values())},
        **{f"curve-figure-{i}": figure for i, figure in enumerate(curves.values())},
        **{f"study-figure-{i}": figure for i, figure in enumerate(studied.values())},
        **(trusted.figures if trusted else {}),
        **of_blocks,
    }
    return fill(
        "page.html",
        figures,
        summary=summary,
        searched=searched(summary),
        verdicts=verdicts(summary),
        caveats=caveats(summary, eigenvalues),
        groups=results_by_budget(summary),
        looks=looks(methods(summary.candidates)),
        columns=columns,
        headings=[column.heading for column in columns],
        has_evaluations=any(c.evaluations > 1 for c in summary.candidates.candidates),
        map=bits_map(summary),
        activation_map=activation_map,
        widths=list(zip(widths, width_sizes, strict=True)),
        estimator=ESTIMATORS[summary.curvature.estimator],
        estimators=ESTIMATORS,
        trust=trusted,
        pictures=None if pictures is None else detection_pictures(_shown(pictures)),
        eigenvalues=shown,
        iterated=iterated,
        has_holes=has_holes,
        sizes=make_room(of_blocks, [block.block for block in shown.blocks] if shown else []),
        curves=list(curves),
        recipe_chosen=recipe_chosen(summary),
        study_figures=list(studied),
        study_headings=headings,
        study_rows=rows,
        hulls=[f.method for f in summary.candidates.fronts if f.is_hull and f.of == "weights"],
        hidden=num_hidden(summary.candidates),
        num_seeds=num_seeds(summary),
        block_methods=[
            method
            for method in methods(summary.candidates)
            if method in SEARCHERS and SEARCHERS[method].needs_blocks
        ],
        is_thinned=any(len(front.bits) > MAX_FRONT_POINTS for front in summary.candidates.fronts),
        max_front_points=MAX_FRONT_POINTS,
        config=yaml.safe_dump(
            summary.model_dump(mode="json")["config"], sort_keys=False, allow_unicode=True
        ),
    )


def _activation_traces(summary: Summary) -> dict[str, go.Figure]:
    """Draw the traces of the activations, where they are searched."""
    found = summary.curvature.activations
    if found is None:
        return {}
    axis = "Tensor, named after its first reader"
    return {"activation-traces-figure": traces(found, x=axis, unit="loss / activation²")}


def _shown(pictures: PicturesDocument) -> list[DetectionPicture]:
    """Return the pictures of a run as the page draws them."""
    return [
        DetectionPicture(
            read_jpeg(image.jpeg),
            {name: _panel(found) for name, found in image.panels.items()},
            pictures.class_names,
        )
        for image in pictures.images
    ]


def _panel(found: Boxes) -> Panel:
    return Panel(
        np.array(found.boxes, np.float32).reshape(-1, 4),
        np.array(found.labels, np.int64),
        None if found.scores is None else np.array(found.scores, np.float32),
    )
