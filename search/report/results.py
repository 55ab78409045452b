"""What became of each candidate: its trials and its score, joined by what was trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from search.artefacts import (
    BudgetLimit,
    Candidate,
    CandidatesArtefact,
    Score,
    SeededTrial,
    Summary,
    TrialsArtefact,
)

__all__ = [
    "BudgetResults",
    "Result",
    "choices_by_budget",
    "methods",
    "num_seeds",
    "results_by_budget",
]


@dataclass(frozen=True, slots=True)
class Result:
    """A candidate with what was measured of it.

    Attributes:
        candidate: What the method chose.
        trials: Its fine-tunings, seed by seed; empty if there was none.
        test: Its score on the test split; None if it was not scored.
        twins: Other methods that chose exactly this under this budget.
        elsewhere: ``METHOD at BUDGET`` for those that chose it under another budget.
        is_best: Whether no candidate of its budget has a higher test score. Never true where
            there is nothing to compare with.
    """

    candidate: Candidate
    trials: tuple[SeededTrial, ...]
    test: Score | None
    twins: tuple[str, ...]
    elsewhere: tuple[str, ...]
    is_best: bool

    @property
    def names(self) -> str:
        """The method and its twins: ``hawq-v2 = exact``."""
        return " = ".join([self.candidate.method, *self.twins])

    @property
    def search_score(self) -> float | None:
        """The last epochs' mean score on the search split, where there is one.

        It is of the trainings that finished, or of all where none did.
        """
        kept = [t for t in self.trials if t.status == "finished"] or self.trials
        scores = [score for trial in kept if (score := trial.search_score) is not None]
        return fmean(scores) if scores else None

    @property
    def trouble(self) -> str:
        """What trainings did instead of finishing: ``failed``, ``1 of 3 failed``; else empty."""
        odd = [trial.status for trial in self.trials if trial.status != "finished"]
        if len(set(odd)) == 1 and len(odd) == len(self.trials):
            return odd[0]
        return ", ".join(
            f"{odd.count(status)} of {len(self.trials)} {status}" for status in dict.fromkeys(odd)
        )


@dataclass(frozen=True, slots=True)
class BudgetResults:
    """The results of one budget, in the artefact's order, and the methods that found nothing."""

    budget: BudgetLimit
    results: tuple[Result, ...]
    without_candidate: tuple[str, ...]


def methods(found: CandidatesArtefact) -> tuple[str, ...]:
    """Name every method once, in order of first appearance."""
    named = [c.method for c in found.candidates] + [f.method for f in found.fronts]
    return tuple(dict.fromkeys(named))


def num_seeds(summary: Summary) -> int:
    """Count the seeds that candidates were trained with, those of the most."""
    return max((len(set(score.seeds)) for score in summary.test.scores.values()), default=0)


def results_by_budget(summary: Summary) -> tuple[BudgetResults, ...]:
    """Join candidates, trials and test scores, budget by budget."""
    return choices_by_budget(summary.candidates, summary.trials, summary.test.scores)


def choices_by_budget(
    found: CandidatesArtefact,
    trials: TrialsArtefact | None = None,
    scores: Mapping[str, Score] | None = None,
) -> tuple[BudgetResults, ...]:
    """Join candidates with what is known of them so far, budget by budget."""
    searched = tuple(dict.fromkeys(c.method for c in found.candidates))
    groups = []
    for budget in found.budgets:
        chosen = [c for c in found.candidates if c.budget == budget.label]
        present = {candidate.method for candidate in chosen}
        groups.append(
            BudgetResults(
                budget,
                tuple(_result(found, c, chosen, trials, scores or {}) for c in chosen),
                tuple(method for method in searched if method not in present),
            )
        )
    return tuple(groups)


def _result(
    found: CandidatesArtefact,
    candidate: Candidate,
    chosen: Sequence[Candidate],
    trials: TrialsArtefact | None,
    tested: Mapping[str, Score],
) -> Result:
    key = candidate.key
    scores = {c.key: tested[c.key].score for c in chosen if c.key in tested}
    equal = [other for other in found.candidates if other.key == key and other is not candidate]
    return Result(
        candidate=candidate,
        trials=tuple(trials.of(candidate)) if trials else (),
        test=tested.get(key),
        twins=tuple(other.method for other in equal if other.budget == candidate.budget),
        elsewhere=tuple(
            f"{other.method} at {other.budget}"
            for other in equal
            if other.budget != candidate.budget
        ),
        is_best=len(scores) > 1 and scores.get(key) == max(scores.values()),
    )
