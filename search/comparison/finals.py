"""What the finalists say: accuracy after fine-tuning, paired with the Hessian's choice."""

from collections.abc import Mapping, Sequence

from search.comparison.document import ComparisonDocument
from search.comparison.families import family
from search.comparison.phrases import sides, spread
from search.comparison.scale import accuracy_points
from search.comparison.standings import Standing, hessian_beside
from search.comparison.statistics import Interval
from search.quantities import counted, listed

__all__ = ["accuracy", "finalist_leads", "worth", "written"]

_ZERO = Interval(0.0, 0.0, 0.0)

Leads = Mapping[tuple[str, str, str], Interval]


def finalist_leads(document: ComparisonDocument) -> Leads:
    """Return the paired differences of finalists by budget, first and second, both ways round.

    Of finalists that are one allocation the difference is zero, without an error.
    """
    found: dict[tuple[str, str, str], Interval] = {}
    for d in document.differences:
        found[d.budget, d.first, d.second] = Interval(d.difference, d.low, d.high)
        found[d.budget, d.second, d.first] = Interval(-d.difference, -d.high, -d.low)
    for a in document.finalists:
        for b in document.finalists:
            if (a.budget, a.digest) == (b.budget, b.digest):
                found[a.budget, a.method, b.method] = _ZERO
    return found


def accuracy(document: ComparisonDocument, found: Sequence[Standing]) -> list[str]:
    """Say under each budget whose finalist is above the Hessian's, and whose is not."""
    if not document.finalists:
        return [
            f"No method’s best has been fine-tuned and tested: {document.score_name}, which has "
            "the last word, is not compared."
        ]
    told, judged = [], _judged(document, found)
    for budget, method in dict.fromkeys((s.budget, beside.method) for s, beside, _ in judged):
        mine = {s.method: d for s, b, d in judged if (s.budget, b.method) == (budget, method)}
        known = {name: lead for name, lead in mine.items() if lead is not None}
        same = [name for name, lead in known.items() if lead is _ZERO]
        parts = sides({n: lead for n, lead in known.items() if lead is not _ZERO}, written)
        parts += [f"the same allocation {listed(same)}"] if same else []
        unknown = [name for name in mine if name not in known]
        parts += [f"without a seed in common {listed(unknown)}"] if unknown else []
        told.append(f"Fine-tuned, at {budget}, beside {method}: {'; '.join(parts)}.")
    if not told:
        return ["No finalist has one of the Hessian’s to be compared with."]
    if any(d.num_seeds == 1 for d in document.differences):
        told.append(
            "Some intervals are over images alone, for finalists with one training seed in common: "
            "other seeds may turn them round."
        )
    return told


def worth(document: ComparisonDocument, found: Sequence[Standing]) -> list[str]:
    """Answer whether reinforcement learning gained accuracy, and what that cost."""
    if not any(family(s.method) == "agent" for s in found):
        return []
    judged = [
        (s, beside, lead)
        for s, beside, lead in _judged(document, found)
        if lead is not None and family(s.method) == "agent"
    ]
    if not judged:
        return ["Whether reinforcement learning is worth its price is therefore not answered."]
    agents = [s for s, _, _ in judged]
    num = max(len(s.searches) for s in agents)
    best_of = f" (a finalist is the best of {num})" if num > 1 else ""
    price = (
        f"{spread([s.core_seconds for s in agents])} core-seconds a search{best_of}, beside the "
        f"Hessian’s {spread([beside.core_seconds for _, beside, _ in judged])}"
    )
    won = [(s, lead) for s, _, lead in judged if lead.sign > 0]
    if not won:
        return [
            "Nothing here shows reinforcement learning to be worth its price: no agent’s finalist "
            f"is above the Hessian’s by more than the error, at {price}."
        ]
    gained = [f"{s.method} at {s.budget} ({accuracy_points(lead.value)})" for s, lead in won]
    told = [
        f"Reinforcement learning gained {document.score_name} on the Hessian in {len(won)} of "
        f"{counted(len(judged), 'comparison')}: {listed(gained)}, at {price}."
    ]
    for s, _ in won:
        as_good = _as_good(s, found, finalist_leads(document))
        if as_good:
            told.append(
                f"At {s.budget} {s.method} is not above {listed(as_good)}, without learning, by "
                "more than the error."
            )
    return told


def written(lead: Interval) -> str:
    """Write a difference of accuracies: ``+0.31 points, 95 % interval +0.10 … +0.52``."""
    low, high = (accuracy_points(end).removesuffix(" points") for end in (lead.low, lead.high))
    return f"{accuracy_points(lead.value)}, 95 % interval {low} … {high}"


def _judged(
    document: ComparisonDocument, found: Sequence[Standing]
) -> list[tuple[Standing, Standing, Interval | None]]:
    """Pair each other finalist with the Hessian's; the lead is None without a seed in common."""
    leads = finalist_leads(document)
    judged = []
    for s in found:
        if not s.finalist or family(s.method) == "hessian":
            continue
        beside = hessian_beside(found, s)
        if beside is not None and beside.finalist is not None:
            judged.append((s, beside, leads.get((s.budget, s.method, beside.method))))
    return judged


def _as_good(agent: Standing, found: Sequence[Standing], leads: Leads) -> list[str]:
    return [
        s.method
        for s in found
        if s.budget == agent.budget
        and family(s.method) == "sampler"
        and (lead := leads.get((s.budget, agent.method, s.method))) is not None
        and lead.sign <= 0
    ]
