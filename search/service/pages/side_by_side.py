"""Several searches: what the methods of each have found, in one table and one figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from statistics import fmean

import plotly.graph_objects as go

from search.artefacts import (
    Candidate,
    CandidatesArtefact,
    ModelArtefact,
    Score,
    TestArtefact,
)
from search.errors import InputError
from search.quantities import mib, percent, plus_minus, significant
from search.report.canvas import canvas
from search.report.palette import looks
from search.service.pages.live_trials import read_scored
from search.service.pages.panels import artefact
from search.service.record import Record, SearchFolder

__all__ = ["Cell", "Found", "Row", "found_by", "front_figure", "rows"]


@dataclass(frozen=True, slots=True)
class Cell:
    """What a method of a search found under a budget, as text; empty where it found nothing."""

    score: str = ""
    size: str = ""
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A method, with a cell a search."""

    method: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A search's candidates with their scores.

    Attributes:
        record: Of the search.
        candidates: None before there are any.
        tested: On the test split, by the candidate's key.
        scored: On the search split, mean of the finished trainings, by the candidate's key.
        unquantized: The network's own score: on the test split, else on the search split.
        score_name: Of the score.
        trouble: Why something could not be read; empty else.
    """

    record: Record
    candidates: tuple[Candidate, ...]
    tested: dict[str, Score]
    scored: dict[str, float]
    unquantized: float | None
    score_name: str
    trouble: str = ""

    @property
    def title(self) -> str:
        """The search's name, and the beginning of its id."""
        return f"{self.record.name} ({self.record.id[:4]})"

    def score(self, candidate: Candidate) -> tuple[float, float | None] | None:
        """Return a candidate's score and standard error; the test split's, if there is one."""
        tested = self.tested.get(candidate.key)
        if tested is not None:
            return tested.score, tested.standard_error
        score = self.scored.get(candidate.key)
        return None if score is None else (score, None)


def found_by(record: Record, folder: SearchFolder) -> Found:
    """Read what a search has found by now."""
    try:
        model = artefact(folder.run, "model", ModelArtefact)
        chosen = artefact(folder.run, "candidates", CandidatesArtefact)
        test = artefact(folder.run, "test", TestArtefact)
    except InputError as error:
        return Found(record, (), {}, {}, None, "score", str(error))
    candidates = tuple(chosen.candidates) if chosen else ()
    trained = [one for one in read_scored(folder.run) if one.is_finished]
    scored = {}
    for candidate in candidates:
        scores = [one.score for one in trained if one.digest in candidate.digests]
        if scores:
            scored[candidate.key] = fmean(scores)
    full = test.unquantized.score if test else model.search_score if model else None
    name = model.score_name if model else "score"
    return Found(record, candidates, test.scores if test else {}, scored, full, name)


def rows(found: Sequence[Found]) -> dict[str, list[Row]]:
    """Arrange what every method found, by budget, a cell a search."""
    arranged: dict[str, list[Row]] = {}
    for budget, method in dict.fromkeys((c.budget, c.method) for f in found for c in f.candidates):
        best = _best(found, budget)
        cells = tuple(_cell(one, budget, method, best) for one in found)
        arranged.setdefault(budget, []).append(Row(method, cells))
    return arranged


def _best(found: Sequence[Found], budget: str) -> float:
    """Return the highest score under a budget, of what was tested."""
    scores = [
        one.tested[c.key].score
        for one in found
        for c in one.candidates
        if c.budget == budget and c.key in one.tested
    ]
    return max(scores, default=float("inf"))


def _cell(found: Found, budget: str, method: str, best: float) -> Cell:
    for candidate in found.candidates:
        if (candidate.budget, candidate.method) == (budget, method):
            size = f"{significant(mib(candidate.weight_bits))} MiB"
            scored = found.score(candidate)
            if scored is None:
                return Cell("", size)
            score, error = scored
            if error is None:
                return Cell(f"{percent(score)} % so far", size)
            return Cell(f"{plus_minus(percent(score), error)} %", size, score >= best)
    return Cell()


def front_figure(found: Sequence[Found]) -> go.Figure:
    """Draw score against size, a look a search, with the candidates that no other beats joined."""
    names = dict.fromkeys(one.score_name for one in found)
    figure = canvas("Weights (MiB)", f"{escape(' or '.join(names))} (%)")
    shown = looks([one.record.id for one in found])
    for one in found:
        points = [
            (mib(c.weight_bits), 100 * scored[0], 100 * (scored[1] or 0.0), c)
            for c in one.candidates
            if (scored := one.score(c)) is not None
        ]
        if not points:
            continue
        look = shown[one.record.id]
        front = _front([(size, score) for size, score, _, _ in points])
        figure.add_scatter(
            meta=one.record.id,
            x=[size for size, _ in front],
            y=[score for _, score in front],
            mode="lines",
            line={"color": look.color, "width": 1.4, "dash": look.dash, "shape": "hv"},
            hoverinfo="skip",
        )
        figure.add_scatter(
            meta=one.record.id,
            x=[point[0] for point in points],
            y=[point[1] for point in points],
            error_y={"array": [point[2] for point in points], "width": 4, "thickness": 1.2},
            mode="markers",
            marker={"color": look.color, "symbol": look.symbol, "size": 10},
            text=[escape(f"{one.title}: {c.method}, {c.budget}") for *_, c in points],
            hovertemplate="%{text}<br>%{x:.3~g} MiB<br>%{y:.2f} %<extra></extra>",
        )
    return figure


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in size and score, smallest first."""
    ordered = sorted(set(points), key=lambda point: (point[0], -point[1]))
    kept = ordered[:1]
    for point in ordered[1:]:
        if point[1] > kept[-1][1]:
            kept.append(point)
    assert all(a[1] < b[1] for a, b in pairwise(kept))
    return kept
