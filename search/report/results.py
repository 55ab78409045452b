"""What became of each candidate: its trial and its score, joined by the allocation's digest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from search.artefacts import BudgetLimit, Candidate, CandidatesArtefact, Score, Summary, Trial

__all__ = ["BudgetResults", "Result", "choices_by_budget", "methods", "results_by_budget"]


@dataclass(frozen=True, slots=True)
class Result:
    """A candidate with what was measured of it.

    Attributes:
        candidate: What the method chose.
        trial: Its fine-tuning; None if there was none.
        test: Its score on the test split; None if it was not scored.
        twins: Other methods that chose exactly this allocation under this budget.
        elsewhere: ``METHOD at BUDGET`` for those that chose it under another budget.
        is_best: Whether no candidate of its budget has a higher test score. Never true where
            there is nothing to compare with.
    """

    candidate: Candidate
    trial: Trial | None
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
        """The last epoch's score on the search split, where there is one."""
        return self.trial.search_score if self.trial else None


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


def results_by_budget(summary: Summary) -> tuple[BudgetResults, ...]:
    """Join candidates, trials and test scores, budget by budget."""
    return choices_by_budget(summary.candidates, summary.trials.trials, summary.test.scores)


def choices_by_budget(
    found: CandidatesArtefact,
    trials: Sequence[Trial] = (),
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
    trials: Sequence[Trial],
    tested: Mapping[str, Score],
) -> Result:
    digest = candidate.digest
    scores = {c.digest: tested[c.digest].score for c in chosen if c.digest in tested}
    equal = [
        other for other in found.candidates if other.digest == digest and other is not candidate
    ]
    return Result(
        candidate=candidate,
        trial=next((t for t in trials if t.digest == digest), None),
        test=tested.get(digest),
        twins=tuple(other.method for other in equal if other.budget == candidate.budget),
        elsewhere=tuple(
            f"{other.method} at {other.budget}"
            for other in equal
            if other.budget != candidate.budget
        ),
        is_best=len(scores) > 1 and scores.get(digest) == max(scores.values()),
    )
