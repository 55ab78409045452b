"""Trainings under way: of candidates, and of a study that looks for their recipe."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path

import plotly.graph_objects as go
from pydantic import ValidationError

from search.artefacts import CandidatesArtefact, StudyArtefact, StudyTrial, Trial
from search.quantities import mib
from search.report.canvas import FAINT, LABEL, canvas
from search.report.palette import looks
from search.report.results import methods
from search.service.pages.count_axis import show_counts

__all__ = ["Scored", "read_scored", "read_study", "size_and_score", "study_curve"]

_TRIED, _CHOSEN = "#0072B2", "#D55E00"


@dataclass(frozen=True, slots=True)
class Scored:
    """A training: its latest score on the search split, and whether it has ended well."""

    digest: str
    score: float
    is_finished: bool
    words: str


def read_scored(run: Path) -> list[Scored]:
    """Read the trainings of candidates: those that ended, and those under way that have a score."""
    folders = sorted((run / "trials").glob("*-*"))
    found = [_scored(folder, folder.name.rpartition("-")[0]) for folder in folders]
    return [one for one in found if one is not None]


def read_study(run: Path) -> dict[int, Scored]:
    """Read the trainings of a study, likewise, by their numbers."""
    found = {}
    for folder in sorted((run / "study").glob("*-*-*")):
        number, digest, _ = folder.name.split("-")
        scored = _scored(folder, digest)
        if scored is not None:
            found[int(number)] = scored
    return found


def _scored(folder: Path, digest: str) -> Scored | None:
    result, progress = folder / "result.json", folder / "progress.json"
    try:
        if result.exists():
            trial = Trial.model_validate_json(result.read_bytes())
            if trial.search_score is None:
                return None
            return Scored(digest, trial.search_score, trial.status == "finished", trial.status)
        if progress.exists():
            told = json.loads(progress.read_bytes())
            if told["score"] is not None:
                words = f"epoch {told['done']:.3g} of {told['total']}"
                return Scored(digest, told["score"], False, words)
    except (FileNotFoundError, ValidationError):  # deleted in this moment, or of another version
        pass
    return None


def size_and_score(
    found: CandidatesArtefact, scored: Sequence[Scored], unquantized: float | None, name: str
) -> go.Figure:
    """Draw search-split score against size, a mark a training, as they come.

    Args:
        found: The candidates.
        scored: Their trainings.
        unquantized: The network's own score; None where it is not known.
        name: Of the score.
    """
    figure = canvas("Weights (MiB)", f"Search-split {escape(name)} (%)")
    if unquantized is not None:
        figure.add_hline(
            y=100 * unquantized,
            line={"color": FAINT, "width": 1.5},
            annotation={"text": "unquantized", "font": LABEL},
            annotation_position="top left",
        )
    for method, look in looks(methods(found)).items():
        own = [c for c in found.candidates if c.method == method]
        pairs = [(c, s) for c in own for s in scored if s.digest in c.digests]
        if not pairs:
            continue
        kinds = [look.symbol if s.is_finished else f"{look.symbol}-open" for _, s in pairs]
        figure.add_scatter(
            meta=method,
            x=[mib(c.weight_bits) for c, _ in pairs],
            y=[100 * s.score for _, s in pairs],
            mode="markers",
            marker={"color": look.color, "symbol": kinds, "size": 11},
            text=[escape(f"{method}, {c.budget}, {s.words}") for c, s in pairs],
            hovertemplate="%{text}<br>%{x:.3~g} MiB<br>%{y:.2f} %<extra></extra>",
        )
    sizes = [mib(c.weight_bits) for c in found.candidates]
    margin = 0.1 * (max(sizes) - min(sizes)) or 0.1 * max(sizes)
    figure.update_xaxes(range=[min(sizes) - margin, max(sizes) + margin])
    return figure


def study_curve(
    tried: Mapping[int, Scored], found: StudyArtefact | None, *, num_trials: int, name: str
) -> go.Figure:
    """Draw a study's trials as they come, and the best score of those that finished.

    Args:
        tried: By number.
        found: What came out; None before the end.
        num_trials: Of the whole study.
        name: Of the score.
    """
    figure = canvas("Trial of the study", f"Search-split {escape(name)} (%)")
    finished = {number: one for number, one in sorted(tried.items()) if one.is_finished}
    others = {number: one for number, one in tried.items() if not one.is_finished}
    best = accumulate((100 * one.score for one in finished.values()), max)
    figure.add_scatter(
        x=list(finished),
        y=list(best),
        mode="lines",
        line={"color": _TRIED, "width": 2, "shape": "hv"},
        hoverinfo="skip",
    )
    told = {t.number: _parameters(t) for t in found.trials} if found else {}
    for group, symbol in ((finished, "circle"), (others, "circle-open")):
        figure.add_trace(_marks(group, told, {"color": _TRIED, "symbol": symbol, "size": 9}))
    if found and found.chosen in tried:
        chosen = {found.chosen: tried[found.chosen]}
        figure.add_trace(_marks(chosen, told, {"color": _CHOSEN, "symbol": "star", "size": 15}))
    show_counts(figure, 0, max(num_trials - 1, *tried))
    figure.update_layout(height=340)
    return figure


def _marks(
    tried: Mapping[int, Scored], told: Mapping[int, str], marker: Mapping[str, object]
) -> go.Scatter:
    return go.Scatter(
        x=list(tried),
        y=[100 * one.score for one in tried.values()],
        mode="markers",
        marker=dict(marker),
        text=[
            "<br>".join(filter(None, (escape(f"trial {n}, {one.words}"), told.get(n, ""))))
            for n, one in tried.items()
        ],
        hovertemplate="%{text}<br>%{y:.2f} %<extra></extra>",
    )


def _parameters(trial: StudyTrial) -> str:
    return "<br>".join(
        escape(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
        for name, value in trial.parameters.items()
    )
