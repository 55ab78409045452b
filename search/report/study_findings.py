"""What a study found, in words and as a table."""

from dataclasses import dataclass

from search.artefacts import StudyArtefact, StudyTrial, Summary
from search.quantities import counted, mib, percent

__all__ = ["StudyRow", "recipe_chosen", "study_rows"]


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A trial of the study.

    Attributes:
        number: In Optuna's study.
        cells: Values of the parameters, in the order of ``names``.
        score: Its last on the search split; a dash where it has none.
        epochs: How many it trained.
        end: How it ended: the reason where it did not finish.
        seconds: Of training.
        mark: ``chosen``, ``on the front`` or nothing.
    """

    number: int
    cells: tuple[str, ...]
    score: str
    epochs: int
    end: str
    seconds: float
    mark: str


def recipe_chosen(summary: Summary) -> str:
    """Say which recipe a study chose and from how many trials; empty without a study."""
    study = summary.study
    if study is None:
        return ""
    whose = f"{study.method}’s candidate" if study.method else "all candidates"
    chosen = ", ".join(
        f"{name} {_said(value)}" for name, value in study.parameters.items() if name != "candidate"
    )
    return (
        f"All candidates were trained with what a study of {counted(len(study.trials), 'trial')} "
        f"({study.sampler.upper()}, {counted(study.epochs, 'epoch')} each, of {whose}) found best "
        f"on the search split: {chosen} (trial {study.chosen})."
    )


def study_rows(study: StudyArtefact) -> tuple[list[str], list[StudyRow]]:
    """Lay out the trials, the best first.

    Returns:
        The headings of the parameters, and a row a trial.
    """
    names = list(study.trials[0].parameters)
    headings = [*names, *(["stored MiB"] if study.sampler == "nsga2" else [])]
    order = sorted(study.trials, key=lambda t: (t.status != "finished", -(t.search_score or 0.0)))
    return headings, [_row(study, trial, names) for trial in order]


def _row(study: StudyArtefact, trial: StudyTrial, names: list[str]) -> StudyRow:
    size = [] if trial.stored_bits is None else [f"{mib(trial.stored_bits):.4g}"]
    on_front = "on the front" if trial.number in study.front else ""
    return StudyRow(
        number=trial.number,
        cells=(*(_said(trial.parameters[name]) for name in names), *size),
        score="—" if trial.search_score is None else percent(trial.search_score),
        epochs=max(0, len(trial.epochs) - 1),
        end=trial.reason or trial.status,
        seconds=trial.seconds,
        mark="chosen" if trial.number == study.chosen else on_front,
    )


def _said(value: str | float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
