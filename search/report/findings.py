"""What the report claims in words.

A claim compares two candidates on the same test examples. Their scores are correlated, and the
artefacts hold each one's errors but not those of every pair, so a claim rests on a bound that
holds whatever the correlation: the standard error of a difference is at most the sum of both.
"""

from dataclasses import dataclass

from search.artefacts import Score, Summary
from search.report.quantities import count, counted, mib, percent, plus_minus, points, significant
from search.report.results import BudgetResults, Result, methods, results_by_budget

__all__ = ["Verdict", "searched", "verdicts"]

_REFERENCE = "uniform"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one budget's candidates reached.

    Attributes:
        budget: Its label, size and average bits.
        scores: The scores that are compared.
        difference: What their difference does and does not show; empty where there is none.
    """

    budget: str
    scores: str
    difference: str


def searched(summary: Summary) -> str:
    """Say in a sentence or two what was searched, and on what it was measured."""
    model, tables = summary.model, summary.tables
    found, budgets = methods(summary), summary.candidates.budgets
    widths = ", ".join(map(str, tables.widths))
    return (
        f"Bits for the weights of {counted(len(summary.curvature.layers), 'layer')} "
        f"({count(model.num_quantizable)} of {count(model.num_parameters)} parameters), "
        f"from {widths}: {counted(len(found), 'method')} under "
        f"{counted(len(budgets), 'budget')}.{_activations(summary)} Each candidate was fine-tuned "
        f"alike and scored once ({model.score_name}) on "
        f"{counted(summary.test.num_examples, 'test example')}."
    )


def verdicts(summary: Summary) -> list[Verdict]:
    """Compare, under each budget, one method with the reference.

    The method is the one whose candidate is best on the search split, so that the test split
    chooses nothing. The reference is uniform; without it, the runner-up on the search split.
    """
    weights = summary.model.num_quantizable
    return [
        Verdict(
            budget=f"{group.budget.label} ({significant(mib(group.budget.limit_bits))} MiB, "
            f"{significant(group.budget.limit_bits / weights)} bits on average)",
            scores=_scores(group, summary.test.unquantized),
            difference=_difference(group),
        )
        for group in results_by_budget(summary)
    ]


def _activations(summary: Summary) -> str:
    section = summary.config.get("activations")
    if not isinstance(section, dict) or "bits" not in section:
        return ""
    bits = section["bits"]
    return f" Activations {'stay in floating point' if bits is None else f'have {bits} bits'}."


def _scores(group: BudgetResults, unquantized: Score) -> str:
    compared = [
        f"{result.names} {_score(result.test)}"
        for result in _compared(group)
        if result.test is not None
    ]
    if not compared:
        return f"No candidate has a test score; unquantized {_score(unquantized)}."
    return f"On the test split: {'; '.join([*compared, f'unquantized {_score(unquantized)}'])}."


def _difference(group: BudgetResults) -> str:
    scores = [result.test for result in _compared(group) if result.test is not None]
    if len(scores) < 2:
        agreed = len(scores) == 1 and len(group.results) > 1 and not _distinct(group)
        return "Every method chose this same allocation." if agreed else ""
    difference = scores[0].score - scores[1].score
    bound = min(
        scores[0].drop_standard_error + scores[1].drop_standard_error,
        scores[0].standard_error + scores[1].standard_error,
    )
    claim = f"The difference, {points(difference)} points, is"
    if abs(difference) > 2 * bound:
        return f"{claim} outside the error: its standard error is at most {percent(bound)}."
    return (
        f"{claim} inside the error: its standard error can be as large as {percent(bound)}, "
        "and these scores do not tell the two apart."
    )


def _distinct(group: BudgetResults) -> bool:
    return len({result.candidate.digest for result in group.results}) > 1


def _compared(group: BudgetResults) -> list[Result]:
    """Return the leader on the search split and what it is compared with: two, one or none."""
    tested = sorted(
        (result for result in group.results if result.test is not None),
        key=lambda result: (result.candidate.method == _REFERENCE, -(result.search_score or 0)),
    )
    if not tested:
        return []
    leader = tested[0]
    others = [r for r in tested if r.candidate.digest != leader.candidate.digest]
    reference = [r for r in others if r.candidate.method == _REFERENCE]
    return [leader, *(reference or others)[:1]]


def _score(score: Score) -> str:
    return f"{plus_minus(percent(score.score), score.standard_error)}\u00a0%"
