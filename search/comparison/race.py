"""What the searches' scores say: which search ends highest, and where the Hessian stands.

Only over enough seeds. A comparison of few is not reported as a tie: nothing is claimed.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from search.comparison.document import ComparisonDocument
from search.comparison.families import warm_twin
from search.comparison.phrases import few, sides
from search.comparison.progress import evaluations_to_reach
from search.comparison.scale import Scale
from search.comparison.standings import Standing, hessian_beside
from search.comparison.statistics import MIN_SEEDS, Interval, median_lead, search_differences
from search.quantities import listed

__all__ = ["beside_the_hessian", "between_searches", "warm_starts"]

_SEED = 0


def between_searches(document: ComparisonDocument, found: Sequence[Standing]) -> list[str]:
    """Say under each budget which search ends highest, and from which it is told apart.

    Holm's correction is over all pairs of one budget, of all budgets together.
    """
    searches = [s for s in found if s.searches]
    enough = [s for s in searches if len(s.searches) >= MIN_SEEDS]
    pairs = [pair for pair in combinations(enough, 2) if pair[0].budget == pair[1].budget]
    tested = search_differences([(a.final, b.final) for a, b in pairs], _SEED)
    told_apart = {
        pair for pair, difference in zip(pairs, tested, strict=True) if difference.is_told
    }
    leads = []
    for budget in dict.fromkeys(s.budget for pair in pairs for s in pair):
        mine = [s for s in enough if s.budget == budget]
        leader = max(mine, key=lambda s: s.median)
        others = [s for s in mine if s is not leader]
        below = [s for s in others if {(s, leader), (leader, s)} & told_apart]
        words = {
            "above": [s.method for s in below],
            "not told apart from": [s.method for s in others if s not in below],
        }
        parts = [f"{said} {listed(names)}" for said, names in words.items() if names]
        leads.append(
            f"At {budget} the searches of {leader.method} end highest, at "
            f"{Scale(document.fidelity).score(leader.median)} in the median: {', '.join(parts)}."
        )
    unclaimed = list(dict.fromkeys(s.method for s in searches if s not in enough))
    if unclaimed:
        leads.append(
            f"Nothing is claimed of the searches of {listed(unclaimed)}: fewer than {MIN_SEEDS} "
            "seeds."
        )
    return leads


def beside_the_hessian(document: ComparisonDocument, found: Sequence[Standing]) -> list[str]:
    """Say how the median search of each method scores beside the Hessian's choice."""
    scale = Scale(document.fidelity)
    leads: dict[tuple[str, str], dict[str, Interval]] = {}
    for s in found:
        beside = hessian_beside(found, s)
        lead = median_lead(s.final, beside.median, _SEED) if s.searches and beside else None
        if beside is not None and lead is not None:
            leads.setdefault((s.budget, beside.method), {})[s.method] = lead
    return [
        f"At {budget}, beside {method} by score: "
        f"{'; '.join(sides(mine, lambda lead: scale.difference(lead.value)))}."
        for (budget, method), mine in leads.items()
    ]


def warm_starts(found: Sequence[Standing]) -> list[str]:
    """Say how many evaluations the Hessian's choices save a search that begins with them."""
    by_name = {(s.budget, s.method): s for s in found}
    told = []
    for cold in found:
        warm = by_name.get((cold.budget, warm_twin(cold.method)))
        if warm is None or min(len(cold.searches), len(warm.searches)) < MIN_SEEDS:
            continue
        nums = [search.num_starts for search in warm.searches]
        if min(nums) == 0:
            continue
        started = [
            max(scored.score for scored in search.evaluations[: search.num_starts])
            for search in warm.searches
        ]
        needed = evaluations_to_reach(
            [[scored.score for scored in search.evaluations] for search in cold.searches],
            float(np.median(started)),
        )
        start = few(float(np.median(nums)))
        reached = f"what {warm.method} has after {start} from the Hessian"
        if needed is None:
            told.append(
                f"At {cold.budget} {cold.method} does not reach, in {few(cold.evaluations)} "
                f"evaluations, {reached}."
            )
        else:
            told.append(
                f"At {cold.budget} {cold.method} takes {few(needed)} evaluations for {reached}."
            )
    return told
