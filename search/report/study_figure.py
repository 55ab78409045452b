"""The figures of a study: what its trials scored, over each parameter and over the size."""

from html import escape
from typing import Any

import plotly.graph_objects as go

from search.artefacts import StudyArtefact, StudyTrial, Summary
from search.quantities import mib
from search.report.canvas import WARNING, canvas, logarithmic

__all__ = ["study_figures"]

_SCORED, _PRUNED, _CHOSEN = "#0072B2", "#9aa5b1", "#D55E00"


def study_figures(summary: Summary) -> dict[str, go.Figure]:
    """Draw the scores of a study's trials, by what is on the horizontal axis; none without one.

    Logarithmic where the config asks for that. A trial that was stopped early or failed is drawn
    at its last score, where it has one.
    """
    study = summary.study
    if study is None:
        return {}
    y = f"{escape(summary.model.score_name)} on the search split (%)"
    space = summary.config["study"]["space"]
    figures = {}
    if study.sampler == "nsga2":
        figures["Stored size"] = _figure(study, "Weights, stored (MiB)", y, _size)
    for name in study.trials[0].parameters:
        if name == "candidate":
            continue
        allowed = space.get(name)
        figures[name] = figure = _figure(study, escape(name), y, lambda t, n=name: t.parameters[n])
        if isinstance(allowed, dict) and allowed["log"]:
            figure.update_xaxes(logarithmic(allowed["low"] / 1.2, 1.2 * allowed["high"]))
    return figures


def _size(trial: StudyTrial) -> float:
    assert trial.stored_bits is not None
    return mib(trial.stored_bits)


def _figure(study: StudyArtefact, x: str, y: str, value: Any) -> go.Figure:
    figure = canvas(x, y)
    figure.update_layout(height=340)
    groups = {
        "finished": (_SCORED, "circle"),
        "stopped": (_PRUNED, "circle-open"),
        "failed": (WARNING, "x-thin-open"),
    }
    for status, (color, symbol) in groups.items():
        trials = [t for t in study.trials if t.status == status and t.number != study.chosen]
        figure.add_trace(_marks(trials, value, color, symbol, 8))
    chosen = [t for t in study.trials if t.number == study.chosen]
    figure.add_trace(_marks(chosen, value, _CHOSEN, "star", 14))
    if x.startswith("Weights"):
        by_number = {t.number: t for t in study.trials}
        front = [by_number[number] for number in study.front]
        figure.add_scatter(
            x=[value(t) for t in front],
            y=[100 * (t.search_score or 0.0) for t in front],
            mode="lines",
            line={"shape": "hv", "color": _PRUNED, "width": 1},
            hoverinfo="skip",
        )
    return figure


def _marks(trials: list[StudyTrial], value: Any, color: str, symbol: str, size: int) -> go.Scatter:
    drawn = [trial for trial in trials if trial.search_score is not None]
    return go.Scatter(
        x=[value(trial) for trial in drawn],
        y=[100 * (trial.search_score or 0.0) for trial in drawn],
        mode="markers",
        marker={"color": color, "symbol": symbol, "size": size, "line": {"color": color}},
        text=[escape(f"trial {t.number}, {t.status}, {len(t.epochs) - 1} epochs") for t in drawn],
        hovertemplate="%{text}<br>%{x}<br>%{y:.2f} %<extra></extra>",
    )
