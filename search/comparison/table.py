"""The table of a comparison: what each method spent, and what it found."""

from collections import Counter
from dataclasses import dataclass

from search.comparison.document import ComparisonDocument
from search.comparison.phrases import few
from search.comparison.scale import Scale
from search.comparison.standings import Standing, standings
from search.quantities import percent, plus_minus, significant

__all__ = ["Row", "machines_said", "rows"]

_NOTHING = "—"


@dataclass(frozen=True, slots=True)
class Row:
    """A method under a budget, as written.

    Attributes:
        budget: Label.
        method: Name.
        seeds: Searches; a dash for what does not search.
        evaluations: Median of a search.
        episodes: Median of a search.
        core_seconds: Median, the curvature included where the method needs it.
        score: Median of the best scores, without its unit.
        quartiles: Of the same; empty for one.
        accuracy: Of the finalist, in percent with its standard error; a dash without one.
    """

    budget: str
    method: str
    seeds: str
    evaluations: str
    episodes: str
    core_seconds: str
    score: str
    quartiles: str
    accuracy: str


def rows(document: ComparisonDocument) -> list[Row]:
    """Lay out a comparison by budget: choices first, then searches."""
    return [_row(found, Scale(document.fidelity)) for found in standings(document)]


def machines_said(document: ComparisonDocument) -> str:
    """Say on which machines searches ran, where that is not one; empty where it is."""
    nums = Counter(search.machine or "not known" for search in document.searches)
    if len(nums) < 2:
        return ""
    ran = "; ".join(f"{name}: {num}" for name, num in nums.most_common())
    return f"Searches ran on different machines ({ran}), which their core-seconds depend on."


def _row(found: Standing, scale: Scale) -> Row:
    quartiles, finalist = found.quartiles, found.finalist
    return Row(
        budget=found.budget,
        method=found.method,
        seeds=str(len(found.searches)) if found.searches else _NOTHING,
        evaluations=few(found.evaluations),
        episodes=few(found.episodes) if found.searches else _NOTHING,
        core_seconds=significant(found.core_seconds),
        score=scale.number(found.median),
        quartiles=" … ".join(map(scale.number, quartiles)) if quartiles else "",
        accuracy=plus_minus(percent(finalist.score), finalist.standard_error)
        if finalist
        else _NOTHING,
    )
