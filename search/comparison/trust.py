"""How far scores may be believed: whether they rank allocations as fine-tuning does."""

from collections.abc import Sequence

import numpy as np

from search.comparison.document import ComparisonDocument
from search.comparison.standings import Standing
from search.comparison.statistics import Interval, rank_agreement
from search.quantities import counted

__all__ = ["agreement_of", "is_trusted", "trust", "trust_among_finalists"]

# Below it scores order allocations so unlike fine-tuning that a search learns little of use.
_LEAST_AGREEMENT = 0.6
# Of fewer a high ρ is often chance: independent ranks of five reach 0.6 about one time in six.
_LEAST_ALLOCATIONS = 8
_SEED = 0


def agreement_of(document: ComparisonDocument) -> Interval | None:
    """Return ρ of scores before and after fine-tuning, ranked within budgets; None if undefined."""
    points = document.agreement
    return rank_agreement(
        np.array([point.score for point in points]),
        np.array([point.finetuned for point in points]),
        [point.budget for point in points],
        _SEED,
    )


def is_trusted(document: ComparisonDocument) -> bool:
    """Whether anything may be concluded from scores."""
    if len(document.agreement) < _LEAST_ALLOCATIONS:
        return False
    found = agreement_of(document)
    return found is not None and found.value >= _LEAST_AGREEMENT


def trust(document: ComparisonDocument) -> str:
    """Say in a sentence whether anything may be concluded from scores, and why not."""
    if document.fidelity == "proxy":
        return (
            f"{_trust(document)} They are −Ω, the Hessian’s own measure: its choices are the best, "
            "or nearly, by construction."
        )
    return _trust(document)


def trust_among_finalists(document: ComparisonDocument, found: Sequence[Standing]) -> list[str]:
    """Say whether scores order the finalists, too; nothing of a few.

    Scores may rank allocations of all kinds and not the best ones: those are alike, and what a
    search found was chosen as the highest of many scores, chance included.
    """
    points = {
        (s.budget, s.finalist.digest): (best.score, s.finalist.score)
        for s in found
        if s.finalist
        for best in s.bests
        if best.digest == s.finalist.digest
    }
    if len(points) < _LEAST_ALLOCATIONS:
        return []
    scores, tested = np.array(list(points.values())).T
    rho = rank_agreement(scores, tested, [budget for budget, _ in points], _SEED)
    if rho is None:
        return []
    value, low, high = (_two(x) for x in (rho.value, rho.low, rho.high))
    means = {
        1: "scores order these, too",
        0: "which of them is better, scores do not tell",
        -1: "scores order these the other way round",
    }
    return [
        f"Among the {len(points)} finalists themselves ρ with the tested {document.score_name} is "
        f"{value}, 95 % interval {low} … {high}: {means[rho.sign]}."
    ]


def _trust(document: ComparisonDocument) -> str:
    nothing = "nothing is concluded from them"
    last = f"fine-tuned {document.score_name}"
    num = len(document.agreement)
    over = counted(num, "allocation")
    if num == 0:
        return f"Whether scores follow the {last} was not measured: {nothing}."
    if num < _LEAST_ALLOCATIONS:
        return (
            f"Whether scores follow the {last} was measured on {over}, fewer than "
            f"{_LEAST_ALLOCATIONS}: {nothing}."
        )
    found = agreement_of(document)
    if found is None:
        return (
            f"Whether scores follow the {last} is not known, for over {over} one of "
            f"the two does not vary: {nothing}."
        )
    value, low, high = (_two(x) for x in (found.value, found.low, found.high))
    rho = f"Spearman’s ρ = {value}, 95 % interval {low} … {high}, over {over}"
    if found.value < _LEAST_AGREEMENT:
        return f"Scores do not follow the {last} closely enough ({rho}): {nothing}."
    if found.low < _LEAST_AGREEMENT:
        return (
            f"Scores seem to follow the {last} ({rho}); the interval reaches below "
            f"{_LEAST_AGREEMENT}, so what is said of them is provisional."
        )
    return f"Scores follow the {last} ({rho})."


def _two(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
