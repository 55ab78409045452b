"""What the report claims in words.

A claim compares two candidates on the same test examples and the same seeds, by the error of their
paired difference; one of less than two standard errors is called what it is, inside the error.
"""

from dataclasses import dataclass

from hawq.space import PREFIX, Kind
from search.artefacts import Score, Summary, TestArtefact
from search.quantities import (
    count,
    counted,
    listed,
    mib,
    percent,
    plus_minus,
    points,
    significant,
)
from search.report.results import (
    BudgetResults,
    Result,
    methods,
    num_seeds,
    results_by_budget,
)

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
    model = summary.model
    found, budgets = methods(summary.candidates), summary.candidates.budgets
    return (
        f"Bits for the weights of {counted(len(summary.curvature.layers), 'layer')} "
        f"({count(model.num_quantizable)} of {count(model.num_parameters)} parameters), "
        f"from {_widths(summary, 'weights')}: {counted(len(found), 'method')} under "
        f"{counted(len(budgets), 'budget')}.{_activations(summary)}{_channels(summary)} Each "
        f"candidate was fine-tuned alike, with {counted(num_seeds(summary), 'seed')}, and scored "
        f"once ({model.score_name}) on "
        f"{counted(summary.test.num_examples, 'test example')}."
    )


def verdicts(summary: Summary) -> list[Verdict]:
    """Compare, under each budget, one method with the reference.

    The method is the one whose candidate is best on the search split, so that the test split
    chooses nothing. The reference is uniform; without it, the runner-up on the search split.
    """
    return [
        Verdict(
            budget=_budget(group, summary),
            scores=_scores(group, summary.test.unquantized),
            difference=_difference(group, summary.test),
        )
        for group in results_by_budget(summary)
    ]


def _budget(group: BudgetResults, summary: Summary) -> str:
    """Name a budget, with the sizes that it limits in MiB and in bits on average."""
    sizes = []
    limits, alone = group.budget.limits, "activation_bits" not in group.budget.limits
    if "weight_bits" in limits:
        num, bits = summary.model.num_quantizable, limits["weight_bits"]
        sizes.append(f"{'' if alone else 'weights '}{_size(bits, num)}")
    if "activation_bits" in limits and summary.curvature.activations is not None:
        # Of the tables: a loss may look at fewer regions than a detector then proposes.
        prefix, groups = PREFIX["activations"], summary.tables.space
        num = sum(int(g["num_elements"]) for g in groups if str(g["name"]).startswith(prefix))
        bits = limits["activation_bits"]
        sizes.append(f"activations {_size(bits, num)}")
    return f"{group.budget.label} ({'; '.join(sizes)})" if sizes else group.budget.label


def _size(bits: int, num_elements: int) -> str:
    return f"{significant(mib(bits))} MiB, {significant(bits / num_elements)} bits on average"


def _widths(summary: Summary, of: Kind) -> str:
    """List the widths that some layer or tensor, or a channel of one, may receive."""
    tables = [summary.tables, *([summary.tables.channels] if summary.tables.channels else [])]
    found = {
        bits
        for table in tables
        for group in table.space
        if group["name"].startswith(PREFIX[of])
        for bits in group["menu"]
    }
    return ", ".join(map(str, sorted(found)))


def _channels(summary: Summary) -> str:
    candidates = summary.candidates.candidates
    found = dict.fromkeys(c.method for c in candidates if c.granularity == "channel")
    if not found:
        return ""
    gives = "gives" if len(found) == 1 else "give"
    return f" Of the methods, {listed(list(found))} {gives} every channel bits of its own."


def _activations(summary: Summary) -> str:
    activations = summary.curvature.activations
    if activations is not None:
        tensors = counted(len(activations.layers), "activation tensor")
        return f" With them, those of {tensors}, from {_widths(summary, 'activations')}."
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


def _difference(group: BudgetResults, test: TestArtefact) -> str:
    compared = _compared(group)
    if len(compared) < 2:
        agreed = len(compared) == 1 and len(group.results) > 1 and not _distinct(group)
        return "Every method chose this same allocation." if agreed else ""
    first, second = (result.candidate.key for result in compared)
    try:
        difference, error = test.paired(first, second)
    except KeyError:
        return "No seed is common to both: their difference is not known."
    claim = f"The difference, {points(difference)} ± {percent(error)} points, is"
    if abs(difference) > 2 * error:
        return f"{claim} outside the error."
    return f"{claim} inside the error: these scores do not tell the two apart."


def _distinct(group: BudgetResults) -> bool:
    return len({result.candidate.key for result in group.results}) > 1


def _compared(group: BudgetResults) -> list[Result]:
    """Return the leader on the search split and what it is compared with: two, one or none."""
    tested = sorted(
        (result for result in group.results if result.test is not None),
        key=lambda result: (result.candidate.method == _REFERENCE, -(result.search_score or 0)),
    )
    if not tested:
        return []
    leader = tested[0]
    others = [r for r in tested if r.candidate.key != leader.candidate.key]
    reference = [r for r in others if r.candidate.method == _REFERENCE]
    return [leader, *(reference or others)[:1]]


def _score(score: Score) -> str:
    return f"{plus_minus(percent(score.score), score.standard_error)}\u00a0%"
