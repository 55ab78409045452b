"""The figures of one search, from what its run's folder holds by now."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    StudyArtefact,
    Summary,
    TraceArtefact,
)
from search.config import SearchConfig
from search.errors import InputError
from search.events import Event
from search.folder import RunFolder
from search.report.figures import accuracy_by_size, fronts
from search.report.named_axis import make_room
from search.report.palette import Look, looks
from search.report.results import methods
from search.report.trace_figure import traces
from search.service.pages.heat_map import heat_map
from search.service.pages.live_searches import learning_curves, read_learned
from search.service.pages.live_traces import (
    Units,
    convergence,
    first_look,
    relative_errors,
    units_so_far,
)
from search.service.pages.live_trials import (
    read_scored,
    read_study,
    size_and_score,
    study_curve,
)
from search.service.pages.stages import events_of, pace
from search.service.record import SearchFolder

__all__ = ["Drawing", "Panel", "artefact", "drawing"]

_UNITS: Mapping[Kind, str] = {
    "weights": "curvature.units.jsonl",
    "activations": "curvature.activations.units.jsonl",
}
_WATCHED = (
    *("events.jsonl", "model.json", "curvature.json", "candidates.json", "study.json"),
    *("summary.json", *_UNITS.values()),
    *("trials/*/*.json", "study/*/*.json", "searches/*/evaluations.jsonl"),
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
    curvature, study = read("curvature", CurvatureArtefact), read("study", StudyArtefact)
    order = list(methods(found)) if found else []
    look = looks([*order, *(method for method in config.methods if method not in order)])
    score = model.score_name if model else "score"
    panels = [
        *_scores(run, found, model, score),
        *_bits(found),
        *_learning(run, config, look, score),
        *_studied(run, config, study, score),
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
        if not scored:
            return
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


def _studied(
    run: Path, config: SearchConfig, found: StudyArtefact | None, score: str
) -> Iterator[Panel]:
    tried = read_study(run)
    if config.study is None or not tried:
        return
    chosen = " The star is the one whose recipe all candidates get." if found else ""
    yield Panel(
        "study",
        "A recipe for all candidates",
        "A mark is a training with hyper-parameters that the study tried: open while it goes on or "
        "where it was stopped early, filled when it has finished; the line is the best so "
        f"far.{chosen}",
        study_curve(tried, found, num_trials=config.study.trials, name=score),
    )


def _curvature(
    folder: SearchFolder, config: SearchConfig, curvature: CurvatureArtefact | None
) -> Iterator[Panel]:
    told = [e for e in events_of(folder.events) if e.stage == "curvature"]
    units = {of: units_so_far(folder.run / name) for of, name in _UNITS.items()}
    now: Kind = "activations" if units["activations"].sums else "weights"
    for of in _KINDS:
        part = curvature if curvature is None or of == "weights" else curvature.activations
        yield from _traces(of, units[of], part, told if of == now else ())
    errors = relative_errors(told, config.curvature.rtol)
    if errors is not None:
        yield Panel(
            "error",
            "How sure the traces are",
            "The largest error over random probes, relative to its trace, of all that is traced "
            "now: below the tolerance the curvature stops.",
            errors,
        )


def _traces(
    of: Kind, units: Units, found: TraceArtefact | None, told: Sequence[Event]
) -> Iterator[Panel]:
    """Show what is known of the traces of one kind: the more, the longer they are estimated."""
    noun = "layer" if of == "weights" else "activation tensor"
    settling = convergence(units)
    first = None if settling or found else first_look(units, noun)
    if first is not None:
        progress = [event for event in told if event.kind == "progress"]
        yield _sized(
            Panel(
                f"first-{of}",
                f"{of.capitalize()}: a first look",
                f"Each {noun}’s part of the curvature, from {_looked(units, progress)}. Batches "
                "differ: shares move until all are back. Bars are ± one standard error over the "
                "random probes, where the method draws any.",
                first,
            ),
            units.sites,
        )
    if settling is not None:
        yield Panel(
            f"settling-{of}",
            f"{of.capitalize()}: traces as they settle",
            f"The largest Hessian traces of {noun}s as estimated round by round, ± one standard "
            "error over the random probes.",
            settling,
        )
    if found is not None:
        unit = "weight" if of == "weights" else "activation"
        figure = traces(
            found,
            x=f"{noun.capitalize()}, in order",
            unit=f"loss / {unit}²",
        )
        yield _sized(
            Panel(
                f"traces-{of}",
                f"{of.capitalize()}: Hessian traces",
                f"The average trace of each {noun}: the larger, the more its quantization harms.",
                figure,
            ),
            found.layers,
        )


def _looked(units: Units, progress: Sequence[Event]) -> str:
    """Write which batches a first look has been at, of how many, and for how long still."""
    num = len({unit.batch for unit in units.sums})
    last = progress[-1] if progress else None
    if last is None or last.unit != "units" or last.total is None:
        return f"{num} batches of examples that are back"
    if last.measures:  # there is an estimate, which there is not before every batch is back
        return f"one look at each of {num} batches of examples"
    told = f"{num} of {last.total:.0f} batches of examples that are back"
    return ", ".join(filter(None, (told, pace(progress))))


def _sized(panel: Panel, names: Sequence[str]) -> Panel:
    """Give a panel room for names on its horizontal axis."""
    sizes = make_room({panel.id: panel.figure}, names)
    return replace(panel, width=sizes[panel.id][0])
