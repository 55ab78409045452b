"""The figures of one search, from what its run's folder holds by now."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import plotly.graph_objects as go
from pydantic import BaseModel, ValidationError

from hawq.space import Kind
from search.artefacts import (
    CandidatesArtefact,
    CurvatureArtefact,
    ModelArtefact,
    Summary,
)
from search.config import SearchConfig
from search.errors import InputError
from search.folder import RunFolder
from search.report.figures import accuracy_by_size, fronts
from search.report.named_axis import make_room
from search.report.palette import Look, looks
from search.report.results import methods
from search.report.trace_figure import traces
from search.service.pages.live_figures import (
    convergence,
    heat_map,
    learning_curves,
    read_learned,
    read_scored,
    read_units,
    relative_errors,
    size_and_score,
)
from search.service.pages.stages import events_of
from search.service.record import SearchFolder

__all__ = ["Drawing", "Panel", "artefact", "drawing"]

_WATCHED = (
    *("events.jsonl", "curvature.units.jsonl", "curvature.json", "candidates.json"),
    *("model.json", "summary.json", "trials/*/*.json", "searches/*/evaluations.jsonl"),
)
_KINDS: tuple[Kind, ...] = ("weights", "activations")

Kept = TypeVar("Kept", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Panel:
    """A figure with what a reader must know.

    Attributes:
        id: Of its element.
        title: A heading.
        note: How to read it.
        figure: Of plotly.
        width: Below which it cannot be read, in pixels.
    """

    id: str
    title: str
    note: str
    figure: go.Figure
    width: int = 280

    @property
    def size(self) -> tuple[int, int]:
        """Least width and height, in pixels."""
        return self.width, int(self.figure.layout.height)


@dataclass(frozen=True, slots=True)
class Drawing:
    """All figures of a search, the looks of its methods, and what could not be read."""

    panels: tuple[Panel, ...]
    looks: Mapping[str, Look]
    troubles: tuple[str, ...]


def drawing(folder: SearchFolder) -> Drawing:
    """Draw what a search has found by now; the same files are not drawn twice."""
    signature = []
    for pattern in _WATCHED:
        for path in sorted(folder.run.glob(pattern)):
            try:
                status = path.stat()
            except FileNotFoundError:  # replaced in this moment
                continue
            signature.append((str(path), status.st_mtime_ns, status.st_size))
    return _drawing(folder.path, tuple(signature))


def artefact(run: Path, stage: str, kind: type[Kept]) -> Kept | None:
    """Read a stage's artefact; None where there is none yet.

    Raises:
        InputError: If it cannot be read.
    """
    folder = RunFolder(run)
    return folder.load(stage, kind)[0] if folder.artefact(stage).exists() else None


@lru_cache(maxsize=32)
def _drawing(path: Path, signature: tuple[tuple[str, int, int], ...]) -> Drawing:
    del signature  # it is there for the cache alone
    folder = SearchFolder(path)
    run, config, troubles = folder.run, folder.config(), []

    def read(stage: str, kind: type[Kept]) -> Kept | None:
        try:
            return artefact(run, stage, kind)
        except InputError as error:
            troubles.append(str(error))
            return None

    model, found = read("model", ModelArtefact), read("candidates", CandidatesArtefact)
    curvature = read("curvature", CurvatureArtefact)
    order = list(methods(found)) if found else []
    look = looks([*order, *(method for method in config.methods if method not in order)])
    score = model.score_name if model else "score"
    panels = [
        *_scores(run, found, model, score),
        *_bits(found),
        *_learning(run, config, look, score),
        *_offers(found),
        *_curvature(folder, config, curvature),
    ]
    return Drawing(tuple(panels), look, tuple(troubles))


def _scores(
    run: Path, found: CandidatesArtefact | None, model: ModelArtefact | None, score: str
) -> Iterator[Panel]:
    if found is None or not found.candidates:
        return
    try:
        summary = Summary.model_validate_json((run / "summary.json").read_bytes())
    except (FileNotFoundError, ValidationError):
        scored = read_scored(run)
        full = None if model is None else model.search_score
        num = sum(one.is_finished for one in scored)
        yield Panel(
            "front",
            "Size and score",
            f"A mark is the fine-tuning of a candidate: open while it goes on, filled when it has "
            f"finished ({num} have). Scores are on the search split.",
            size_and_score(found, scored, full, score),
        )
        return
    yield Panel(
        "front",
        "Size and score",
        "Fine-tuned candidates on the test split, which nothing before has read; bars and band are "
        "± one standard error.",
        accuracy_by_size(summary),
    )


def _bits(found: CandidatesArtefact | None) -> Iterator[Panel]:
    for of in _KINDS:
        figure = heat_map(found.candidates, of) if found else None
        if figure is None:
            continue
        margin = 7 * max(len(row) for row in figure.data[0].y)
        yield Panel(
            f"bits-{of}",
            f"{of.capitalize()}: bits of each layer",
            "A row is a candidate, a column a layer in the network’s order: the darker, the more "
            "bits. Of a layer whose channels differ, their mean.",
            figure,
            max(280, margin + 60 + 24 * len(figure.data[0].x)),
        )


def _learning(
    run: Path, config: SearchConfig, look: Mapping[str, Look], score: str
) -> Iterator[Panel]:
    learned = read_learned(run, [budget.label for budget in config.budgets])
    name = "−Ω" if config.searches.score == "proxy" else f"{score} on the search split"
    for i, (budget, figure) in enumerate(learning_curves(learned, look, name).items()):
        yield Panel(
            f"learning-{i}",
            f"Learning curves, {budget}",
            "What agents and samplers try: a faint mark is an allocation that was scored, the line "
            "the best so far.",
            figure,
        )


def _offers(found: CandidatesArtefact | None) -> Iterator[Panel]:
    if found is None or not found.candidates:
        return
    yield Panel(
        "offers",
        "What methods can offer",
        "Sensitivity Ω, the predicted harm, against size: lines are a method’s front, marks what "
        "it chose under the budgets.",
        fronts(found),
    )


def _curvature(
    folder: SearchFolder, config: SearchConfig, curvature: CurvatureArtefact | None
) -> Iterator[Panel]:
    errors = relative_errors(events_of(folder.events), config.curvature.rtol)
    if errors is not None:
        yield Panel(
            "error",
            "How sure the traces are",
            "The largest error over random probes, relative to its trace, of all that is traced "
            "now: below the tolerance the curvature stops.",
            errors,
        )
    # Which columns are layers, and which channels, is told by what the stage leaves behind.
    units = (
        []
        if config.by_channel and curvature is None
        else read_units(folder.run / "curvature.units.jsonl")
    )
    settling = convergence(units, curvature.layers if curvature else None)
    if settling is not None:
        yield Panel(
            "settling",
            "Traces as they settle",
            "The largest Hessian traces as estimated round by round, ± one standard error over the "
            "random probes.",
            settling,
        )
    if curvature is not None:
        figure = traces(curvature)
        sizes = make_room({"traces": figure}, curvature.layers)
        yield Panel(
            "traces",
            "Hessian traces",
            "The average trace of each layer: the larger, the more its quantization harms.",
            figure,
            sizes["traces"][0],
        )
