"""Figures of a run under way: estimates that settle, searches that learn, trials that finish."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate
from pathlib import Path
from statistics import fmean

import numpy as np
import plotly.graph_objects as go
from pydantic import ValidationError

from hawq.allocation import by_owner
from hawq.curvature import TraceEstimate, UnitSums
from hawq.curvature.estimate import summarize
from hawq.space import PREFIX, Kind
from search.artefacts import Candidate, CandidatesArtefact, Trial
from search.events import Event
from search.report.canvas import FAINT, LABEL, canvas, make_logarithmic
from search.report.named_axis import show_names
from search.report.palette import Look, looks, width_color
from search.report.quantities import mib
from search.report.results import methods

__all__ = [
    "Learned",
    "Scored",
    "convergence",
    "heat_map",
    "learning_curves",
    "read_learned",
    "read_scored",
    "read_units",
    "relative_errors",
    "size_and_score",
]

_MAX_UNITS_BYTES = 16 << 20
_MAX_ROUNDS = 12
_MAX_LINES = 5
_INK = "#1f2933"


@dataclass(frozen=True, slots=True)
class Learned:
    """The scores of one search, in their order; each is in [0, 1], or −Ω."""

    method: str
    budget: str
    seed: int
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """A training: its latest score on the search split, and whether it has ended well."""

    digest: str
    score: float
    is_finished: bool
    words: str


def read_units(path: Path) -> list[UnitSums]:
    """Read the units that an estimation has done by now, in the order of their indices.

    None of them where the file is too large to be read every few seconds.
    """
    if not path.exists() or path.stat().st_size > _MAX_UNITS_BYTES:
        return []
    found: dict[int, UnitSums] = {}
    for line in path.read_text(encoding="utf-8").split("\n")[1:-1]:
        unit = json.loads(line)
        found[unit["index"]] = UnitSums(
            unit["batch"],
            unit["num_examples"],
            unit["num_probes"],
            np.array(unit["sums"]),
            float(unit["drawn"]),
        )
    return [found[index] for index in sorted(found)]


def convergence(units: Sequence[UnitSums], names: Sequence[str] | None) -> go.Figure | None:
    """Draw the largest traces as they settle, with their probe errors, round by round.

    Batches differ, for examples are drawn by their importance: only a round that has been through
    all of them is an estimate.

    Args:
        units: In the order of their indices.
        names: Of the first groups; None while nobody has told them, so that they are numbered.

    Returns:
        The figure; None where there are fewer than two rounds.
    """
    settled = _rounds(units)
    if len(settled) < 2:
        return None
    last = settled[-1].trace
    named = names or [f"layer {i} of {len(last)}" for i in range(1, len(last) + 1)]
    largest = np.argsort(-last[: len(named)])[:_MAX_LINES]
    figure = canvas("Probes on every example", "Hessian trace")
    shown = looks([named[i] for i in largest])
    for i in largest:
        figure.add_trace(_settling(named[i], shown[named[i]], settled, int(i)))
    positive = [v for trace in figure.data for v in trace.y if v > 0]
    if positive:
        make_logarithmic(figure, min(positive) / 1.6, 1.6 * max(positive))
    figure.update_layout(showlegend=True)
    figure.update_xaxes(tickvals=[found.num_probes for found in settled])
    return figure


def _rounds(units: Sequence[UnitSums]) -> list[TraceEstimate]:
    """Estimate after every round that has been through all batches."""
    num = 1 + max((unit.batch for unit in units), default=-1)
    found = []
    for end in _spread(len(units) // max(num, 1)):
        try:
            names = ["a group"] * (units[0].sums.shape[1] - 1)
            found.append(summarize(units[: end * num], names))
        except ValueError:  # a gap where a unit is not back yet, or a number that is not finite
            continue
    return found


def _spread(rounds: int) -> list[int]:
    """Choose some of so many rounds, evenly, the last among them."""
    num = min(rounds, _MAX_ROUNDS)
    return [round(part * rounds / num) for part in range(1, num + 1)]


def _settling(name: str, look: Look, settled: Sequence[TraceEstimate], i: int) -> go.Scatter:
    return go.Scatter(
        name=escape(name),
        x=[found.num_probes for found in settled],
        y=[float(found.trace[i]) for found in settled],
        error_y={"array": [float(found.probe_error[i]) for found in settled], "width": 3},
        mode="lines+markers",
        line={"color": look.color, "width": 1.6},
        marker={"color": look.color, "symbol": look.symbol, "size": 7},
        text=[escape(name)] * len(settled),
        hovertemplate="%{text}<br>%{y:.3~g} ± %{error_y.array:.2~g}<br>%{x} probes<extra></extra>",
    )


def relative_errors(events: Sequence[Event], rtol: float) -> go.Figure | None:
    """Draw the largest probe error, relative to its trace, as the curvature goes on.

    Args:
        events: Of the run.
        rtol: What it is to come below.
    """
    known = [
        (event.done, event.measures["relative_error"])
        for event in events
        if event.stage == "curvature" and event.measures and "relative_error" in event.measures
    ]
    # Activations come after the weights, and begin again.
    begins = [i for i in range(1, len(known)) if (known[i][0] or 0) < (known[i - 1][0] or 0)]
    pairs = [(done, error) for done, error in known[max(begins, default=0) :] if error > 0]
    if len(pairs) < 2:
        return None
    figure = canvas("Units of work done", "Largest relative probe error")
    figure.add_scatter(
        x=[done for done, _ in pairs],
        y=[error for _, error in pairs],
        mode="lines+markers",
        line={"color": _INK, "width": 1.6},
        marker={"size": 5},
        hovertemplate="%{y:.3~g} after %{x}<extra></extra>",
    )
    figure.add_hline(
        y=rtol,
        line={"color": FAINT, "width": 1, "dash": "dot"},
        annotation={"text": f"tolerance {rtol:g}", "font": LABEL},
        annotation_position="bottom left",
    )
    errors = [error for _, error in pairs]
    make_logarithmic(figure, min(rtol, *errors) / 1.6, 1.3 * max(rtol, *errors))
    figure.update_layout(height=340)
    return figure


def read_scored(run: Path) -> list[Scored]:
    """Read the trainings of a run: those that ended, and those under way that have a score."""
    found = []
    for folder in sorted((run / "trials").glob("*-*")):
        digest = folder.name.rpartition("-")[0]
        result, progress = folder / "result.json", folder / "progress.json"
        try:
            if result.exists():
                trial = Trial.model_validate_json(result.read_bytes())
                if trial.search_score is not None:
                    is_finished = trial.status == "finished"
                    found.append(Scored(digest, trial.search_score, is_finished, trial.status))
            elif progress.exists():
                told = json.loads(progress.read_bytes())
                if told["score"] is not None:
                    words = f"epoch {told['done']:.3g} of {told['total']}"
                    found.append(Scored(digest, told["score"], False, words))
        except (
            FileNotFoundError,
            ValidationError,
        ):  # deleted in this moment, or of another version
            continue
    return found


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


def heat_map(candidates: Sequence[Candidate], of: Kind) -> go.Figure | None:
    """Draw the bits of every layer (or activation tensor), a row a candidate.

    Channels of one layer are shown together, as their mean.
    """
    chosen = [by_owner(candidate.bits) for candidate in candidates]
    prefix = PREFIX[of]
    owners = [
        owner
        for owner in dict.fromkeys(o for row in chosen for o in row)
        if owner.startswith(prefix)
    ]
    if not owners:
        return None
    bits = [[_mean(row.get(owner)) for owner in owners] for row in chosen]
    names = [escape(owner.removeprefix(prefix)) for owner in owners]
    budgets = {candidate.budget for candidate in candidates}
    rows = [
        escape(c.method if len(budgets) == 1 else f"{c.method}, {c.budget}") for c in candidates
    ]
    figure = canvas("", "")
    figure.add_heatmap(
        x=names,
        y=rows,
        z=bits,
        zmin=1,
        zmax=8,
        colorscale=[[(b - 1) / 7, width_color(b)] for b in range(1, 9)],
        showscale=False,
        xgap=1,
        ygap=1,
        hovertemplate="%{x}<br>%{y}<br>%{z:.3~g} bits<extra></extra>",
    )
    cells = [
        (name, row, b)
        for row, found in zip(rows, bits, strict=True)
        for name, b in zip(names, found, strict=True)
        if b is not None
    ]
    figure.add_scatter(
        x=[name for name, _, _ in cells],
        y=[row for _, row, _ in cells],
        text=[f"{b:.2g}" for *_, b in cells],
        mode="text",
        # On the darker half of the widths' shades.
        textfont={"size": 11, "color": ["#ffffff" if b > 4.5 else "#10243a" for *_, b in cells]},
        hoverinfo="skip",
    )
    show_names(figure, names)
    figure.update_yaxes(autorange="reversed", ticks="", type="category")
    room = 7 * max(len(name) for name in names)
    figure.update_layout(height=60 + room + 26 * len(rows), minreducedheight=20)
    return figure


def _mean(bits: int | tuple[int, ...] | None) -> float | None:
    if bits is None:
        return None
    return fmean(bits) if isinstance(bits, tuple) else float(bits)


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
        figure.update_xaxes(tickformat="d")
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
