"""Where each method stands under each budget: what it found, and at what price."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from search.comparison.document import (
    ComparisonDocument,
    Finalist,
    HessianChoice,
    ScoredAllocation,
    SearchRecord,
)
from search.comparison.families import family, is_by_layer, needs_curvature

__all__ = ["Standing", "hessian_beside", "spent", "standings"]


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """A method under a budget.

    Attributes:
        method: Its name.
        budget: Its label.
        searches: One a seed, none of them empty; none for what spends no evaluation.
        choice: What was chosen without evaluations; None for a search.
        shared_seconds: Core-seconds of the curvature, where the method needs it.
        finalist: Its best, fine-tuned and tested; None where there is none.
    """

    method: str
    budget: str
    searches: tuple[SearchRecord, ...]
    choice: HessianChoice | None
    shared_seconds: float
    finalist: Finalist | None

    @property
    def final(self) -> NDArray[np.float64]:
        """The best score of each search, shape (S,), or that of the choice, shape (1,)."""
        return np.array([found.score for found in self.bests])

    @property
    def bests(self) -> tuple[ScoredAllocation, ...]:
        """What has these scores."""
        if self.choice is not None:
            return (self.choice.chosen,)
        return tuple(search.best for search in self.searches)

    @property
    def median(self) -> float:
        """Of the final scores."""
        return float(np.median(self.final))

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """Of the final scores; None for a single one."""
        if len(self.final) == 1:
            return None
        low, high = np.quantile(self.final, [0.25, 0.75]).tolist()
        return low, high

    @property
    def evaluations(self) -> float:
        """Median of the evaluations of a search; 0 for a choice."""
        return _median([len(search.evaluations) for search in self.searches])

    @property
    def episodes(self) -> float:
        """Median of the proposals of a search; 0 for a choice."""
        return _median([search.episodes for search in self.searches])

    @property
    def core_seconds(self) -> float:
        """The price of one allocation: the median search, or the choice, with what it needs."""
        own = [search.cpu_seconds for search in self.searches]
        if self.choice is not None:
            own = [self.choice.cpu_seconds]
        return self.shared_seconds + _median(own)


def standings(document: ComparisonDocument) -> list[Standing]:
    """Gather a comparison by budget, then by method: choices first, then searches.

    Searches that scored nothing are left out.
    """
    finalists = {(found.budget, found.method): found for found in document.finalists}
    choices = {(choice.budget, choice.method): choice for choice in document.hessian}
    searches: dict[tuple[str, str], list[SearchRecord]] = {}
    for search in document.searches:
        if search.evaluations:
            searches.setdefault((search.budget, search.method), []).append(search)
    budgets = [*(c.budget for c in document.hessian), *(s.budget for s in document.searches)]
    order = list(dict.fromkeys(budgets))
    return [
        Standing(
            method=method,
            budget=budget,
            searches=tuple(searches.get((budget, method), ())),
            choice=choices.get((budget, method)),
            shared_seconds=document.curvature_core_seconds if needs_curvature(method) else 0.0,
            finalist=finalists.get((budget, method)),
        )
        for budget, method in sorted([*choices, *searches], key=lambda key: order.index(key[0]))
    ]


def hessian_beside(found: Sequence[Standing], search: Standing) -> Standing | None:
    """Return the Hessian's own choice that a search is compared with; None where there is none.

    It is the one of least Ω under the budget, for which no score was read, among those that give
    bits to the same things, channels or whole layers; else among all of the Hessian's.
    """
    own = [s for s in found if s.budget == search.budget and family(s.method) == "hessian"]
    alike = [s for s in own if is_by_layer(s.method) == is_by_layer(search.method)]
    return min(alike or own, key=lambda s: s.bests[0].sensitivity, default=None)


def spent(search: SearchRecord, shared_seconds: float) -> list[float]:
    """Return the core-seconds that were spent when each evaluation was there.

    A search's core-seconds are spread over its evaluations as its clock went.
    """
    last = search.evaluations[-1].seconds
    share = search.cpu_seconds / last if last > 0 else 0.0
    return [shared_seconds + share * found.seconds for found in search.evaluations]


def _median(values: list[float] | list[int]) -> float:
    return float(np.median(values)) if values else 0.0
