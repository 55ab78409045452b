"""The figures that compare methods.

Plotly reads a small HTML in every label, so names are escaped on their way in. The page has one
legend for all of them: a trace names its method in ``meta``.
"""

from collections.abc import Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from hawq.allocate.front import evenly
from hawq.space import Kind
from search.artefacts import (
    Candidate,
    CandidatesArtefact,
    FrontPoints,
    Score,
    SeededTrial,
    Summary,
)
from search.quantities import counted, mib, percent, plus_minus, points
from search.report.canvas import FAINT, LABEL, canvas, logarithmic
from search.report.palette import Look, looks
from search.report.results import (
    BudgetResults,
    Result,
    choices_by_budget,
    methods,
    results_by_budget,
)

__all__ = [
    "MAX_FRONT_POINTS",
    "accuracy_by_size",
    "fronts",
    "num_hidden",
    "training_curves",
]

MAX_FRONT_POINTS = 1000
_BITS: dict[Kind, str] = {"weights": "weight_bits", "activations": "activation_bits"}


def accuracy_by_size(summary: Summary) -> go.Figure:
    """Draw test score against size, a trace for each method, over the unquantized network's."""
    figure = canvas("Weights (MiB)", f"Test {escape(summary.model.score_name)} (%)")
    groups, full = results_by_budget(summary), summary.test.unquantized
    shown = [r.test for group in groups for r in group.results if r.test]
    reach = [s.score + sign * s.standard_error for s in [*shown, full] for sign in (-1, 1)]
    _draw_unquantized(figure, full)
    order = methods(summary.candidates)
    for method, look in looks(order).items():
        results = [r for g in groups for r in g.results if r.candidate.method == method]
        pairs = [(r, r.test) for r in results if r.test]
        if pairs:
            figure.add_trace(_scored(pairs, look, after=order[order.index(method) + 1 :]))
    _mark_budgets(figure, groups)
    margin = 0.12 * (max(reach) - min(reach)) + 0.002
    figure.update_yaxes(range=[100 * (min(reach) - margin), 100 * (max(reach) + 1.7 * margin)])
    sizes = [mib(r.candidate.weight_bits) for group in groups for r in group.results]
    limits = [mib(bits) for g in groups if (bits := g.budget.weight_bits) is not None]
    figure.update_xaxes(range=_padded([*sizes, *limits]))
    return figure


def fronts(found: CandidatesArtefact, of: Kind = "weights") -> go.Figure:
    """Draw what each method could offer: Ω against size, with what it chose marked.

    Args:
        found: The fronts, and the candidates where there are any.
        of: Weights, or activations where they are searched.
    """
    size = {"weights": "Weights (MiB)", "activations": "Activations of one example (MiB)"}[of]
    figure = canvas(size, f"Sensitivity Ω of all {of}")
    groups = choices_by_budget(found)
    offered = {front.method: front for front in found.fronts if front.of == of}
    order = methods(found)
    for method, look in looks(order).items():
        chosen = [r for g in groups for r in g.results if r.candidate.method == method]
        if method in offered:
            figure.add_trace(_front(offered[method], look))
        if chosen:
            after = order[order.index(method) + 1 :]
            figure.add_trace(_chosen(chosen, look, after, of))
    _mark_budgets(figure, groups, of)
    shown = [omega for trace in figure.data for omega in trace.y if omega] or [1.0]
    figure.update_yaxes(logarithmic(min(shown) / 1.5, 1.5 * max(shown)))
    return figure


def num_hidden(found: CandidatesArtefact) -> int:
    """Count the points of fronts and choices whose Ω is zero, which a logarithm cannot show."""
    shown = [omega for front in found.fronts for omega in front.sensitivity]
    for candidate in found.candidates:
        shown.append(candidate.weight_sensitivity)
        if candidate.activation_sensitivity is not None:
            shown.append(candidate.activation_sensitivity)
    return sum(omega <= 0 for omega in shown)


def _sensitivity(candidate: Candidate, of: Kind) -> float:
    """Return the weights' or the activations' part of a candidate's Ω."""
    if of == "weights":
        return candidate.weight_sensitivity
    return candidate.activation_sensitivity or 0.0


def training_curves(summary: Summary) -> dict[str, go.Figure]:
    """Draw the search score of every trial by epoch, one figure a budget on one scale.

    The trainings of one candidate with several seeds are lines of one look.
    """
    groups, look = results_by_budget(summary), looks(methods(summary.candidates))
    epochs = [epoch for trial in summary.trials.trials for epoch in trial.epochs]
    reach = [100 * epoch.search_score for epoch in epochs] + [100 * summary.model.search_score]
    last = max([epoch.epoch for epoch in epochs], default=1)
    is_several = len(summary.trials.seeds) > 1
    drawn = {}
    for group in groups:
        figure = canvas("Epoch", f"Search-split {escape(summary.model.score_name)} (%)")
        figure.add_hline(
            y=100 * summary.model.search_score,
            line={"color": FAINT, "width": 1, "dash": "dot"},
            annotation={"text": "unquantized", "font": LABEL},
            annotation_position="top left",
        )
        seen: set[tuple[str, int]] = set()
        for result in group.results:
            for trial in result.trials:
                name = f"{result.names}, seed {trial.seed}" if is_several else result.names
                if trial.epochs and (trial.digest, trial.seed) not in seen:
                    method = result.candidate.method
                    figure.add_trace(_curve(trial, name, method, look[method]))
                seen.add((trial.digest, trial.seed))
        margin = 0.08 * (max(reach) - min(reach)) + 0.2
        figure.update_yaxes(range=[min(reach) - margin, max(reach) + 1.5 * margin])
        figure.update_xaxes(range=[-0.03 * last - 0.1, 1.03 * last + 0.1], tickformat="d")
        figure.update_xaxes(nticks=min(last + 1, 10))
        figure.update_layout(height=340)
        drawn[group.budget.label] = figure
    return drawn


def _draw_unquantized(figure: go.Figure, full: Score) -> None:
    low, high = full.score - full.standard_error, full.score + full.standard_error
    figure.add_hrect(
        y0=100 * low, y1=100 * high, fillcolor=FAINT, opacity=0.15, line_width=0, layer="below"
    )
    figure.add_hline(
        y=100 * full.score,
        line={"color": FAINT, "width": 1.5},
        layer="below",
        annotation={
            "text": f"unquantized {plus_minus(percent(full.score), full.standard_error)} %",
            "font": LABEL,
        },
        annotation_position="top left",
    )


def _scored(pairs: list[tuple[Result, Score]], look: Look, after: Sequence[str]) -> go.Scatter:
    return go.Scatter(
        meta=pairs[0][0].candidate.method,
        x=[mib(result.candidate.weight_bits) for result, _ in pairs],
        y=[100 * score.score for _, score in pairs],
        error_y={
            "array": [100 * score.standard_error for _, score in pairs],
            "width": 4,
            "thickness": 1.2,
        },
        mode="lines+markers",
        line={"color": look.color, "width": 1, "dash": "dot"},
        marker={
            "color": look.color,
            "symbol": look.symbol,
            "size": _rings([result for result, _ in pairs], after),
            "opacity": 1,
            "line": {"color": "white", "width": 1},
        },
        text=[
            escape(f"{r.names}, {r.candidate.budget}, {counted(len(set(score.seeds)), 'seed')}")
            for r, score in pairs
        ],
        customdata=[
            [
                percent(score.standard_error),
                plus_minus(points(score.drop), score.drop_standard_error),
            ]
            for _, score in pairs
        ],
        hovertemplate="%{text}<br>%{x:.3~g} MiB<br>%{y:.2f} ± %{customdata[0]} %"
        "<br>drop %{customdata[1]} points<extra></extra>",
    )


def _rings(results: Sequence[Result], after: Sequence[str]) -> list[int]:
    """Size the markers of a method so that it stays visible around those drawn after it."""
    return [10 + 7 * sum(twin in after for twin in result.twins) for result in results]


def _front(front: FrontPoints, look: Look) -> go.Scatter:
    # Zero has no place on a logarithm.
    kept = [
        (front.bits[i], front.sensitivity[i])
        for i in evenly(np.array(front.bits, np.int64), MAX_FRONT_POINTS)
        if front.sensitivity[i] > 0
    ]
    return go.Scatter(
        meta=front.method,
        x=[mib(size) for size, _ in kept],
        y=[omega for _, omega in kept],
        mode="lines",
        line={
            "color": look.color,
            "width": 1.6,
            "dash": look.dash,
            # Between two points of a front the smaller one is the best that fits. Between two of a
            # hull there are others, which the hull is a lower bound of.
            "shape": "linear" if front.is_hull else "hv",
        },
        text=[escape(front.method)] * len(kept),
        hovertemplate="%{text}<br>%{x:.3~g} MiB<br>Ω %{y:.3~g}<extra></extra>",
    )


def _chosen(results: list[Result], look: Look, after: Sequence[str], of: Kind) -> go.Scatter:
    drawn = [result for result in results if _sensitivity(result.candidate, of) > 0]
    return go.Scatter(
        meta=results[0].candidate.method,
        x=[mib(result.candidate.costs[_BITS[of]]) for result in drawn],
        y=[_sensitivity(result.candidate, of) for result in drawn],
        mode="markers",
        marker={
            "color": look.color,
            "symbol": look.symbol,
            "size": _rings(drawn, after),
            "opacity": 1,
            "line": {"color": "white", "width": 1},
        },
        text=[escape(f"{result.names}, {result.candidate.budget}") for result in drawn],
        hovertemplate="%{text}<br>%{x:.3~g} MiB<br>Ω %{y:.3~g}<extra></extra>",
    )


def _curve(trial: SeededTrial, name: str, method: str, look: Look) -> go.Scatter:
    # The last marker of a trial that did not finish is a cross.
    is_end = [trial.status != "finished" and e is trial.epochs[-1] for e in trial.epochs]
    return go.Scatter(
        meta=method,
        x=[epoch.epoch for epoch in trial.epochs],
        y=[100 * epoch.search_score for epoch in trial.epochs],
        mode="lines+markers",
        line={"color": look.color, "width": 1.8, "dash": look.dash},
        marker={
            "color": look.color,
            "size": [13 if end else 6 for end in is_end],
            "symbol": ["x-thin" if end else look.symbol for end in is_end],
            "line": {"color": look.color, "width": [2.5 if end else 0 for end in is_end]},
        },
        text=[escape(f"{name}, {trial.status}")] * len(trial.epochs),
        hovertemplate="%{text}<br>epoch %{x}<br>%{y:.2f} %<extra></extra>",
    )


def _mark_budgets(figure: go.Figure, groups: Sequence[BudgetResults], of: Kind = "weights") -> None:
    for group in groups:
        bits = group.budget.limits.get(_BITS[of])
        if bits is None:
            continue
        figure.add_vline(
            x=mib(bits),
            line={"color": "#9aa5b1", "width": 1, "dash": "dash"},
            layer="below",
            annotation={
                "text": escape(group.budget.label),
                "font": LABEL,
                "textangle": -90,
                "xshift": -2,
            },
            annotation_position="bottom left",
        )


def _padded(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    margin = 0.1 * (high - low) or 0.1 * high
    return [low - margin, high + margin]
