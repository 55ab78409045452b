"""What a comparison's page says beside its figures, and what it warns of."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from search.comparison.document import ComparisonDocument
from search.comparison.families import family
from search.comparison.phrases import few
from search.comparison.scale import Scale
from search.comparison.standings import Standing
from search.comparison.statistics import MIN_SEEDS
from search.comparison.table import machines_said
from search.quantities import counted, listed, percent, plus_minus, significant
from search.report.comparison_curves import Curve, cost_curve, evaluation_curve
from search.report.comparison_fronts import Share

__all__ = [
    "compared",
    "comparison_caveats",
    "cost_said",
    "evaluations_said",
    "finalists_said",
    "shares_said",
]


def compared(document: ComparisonDocument, found: Sequence[Standing]) -> str:
    """Say in two sentences what was compared, and on what."""
    searches = list(dict.fromkeys(s.method for s in found if s.searches))
    choices = list(dict.fromkeys(s.method for s in found if not s.searches))
    ways = [counted(len(searches), "way") + " of searching"] if searches else []
    ways += [f"{counted(len(choices), 'rule')} that score{'s' * (len(choices) == 1)} nothing"]
    budgets = listed(list(dict.fromkeys(s.budget for s in found)))
    how = {
        "proxy": "A score is −Ω by the Hessian, without the network",
        "none": f"A score is the quantized network’s {document.score_name}, not trained",
        "batch_norm": f"A score is the quantized network’s {document.score_name}, with batch-norm "
        "statistics estimated again and nothing trained",
        "finetuned": f"A score is the {document.score_name} after a short fine-tuning",
    }[document.fidelity]
    over = (
        ""
        if document.fidelity == "proxy"
        else f", on {counted(document.num_examples, 'example')} of the search split (unquantized "
        f"{percent(document.unquantized)} %)"
    )
    return (
        f"Which bits should a network’s weights have, and is it worth searching for them? "
        f"{listed(ways).capitalize()}, under {budgets}. {how}{over}."
    )


def comparison_caveats(document: ComparisonDocument, found: Sequence[Standing]) -> list[str]:
    """Return what a reader must know before believing the figures."""
    told = []
    if document.search_seen and document.fidelity != "proxy":
        told.append(
            "The network was trained on the examples that scores are of: scores flatter every "
            "allocation, and only their order may count."
        )
    lengths = [len(search.evaluations) for search in document.searches]
    short = [s for s in document.searches if len(s.evaluations) < max(lengths)]
    if short:
        why = Counter((s.method, s.reason or "no reason given") for s in short)
        told.append(
            f"{counted(len(short), 'search').replace('searchs', 'searches')} of {len(lengths)} "
            f"ended before {max(lengths)} evaluations: "
            f"{'; '.join(f'{method}, {num} ({reason})' for (method, reason), num in why.items())}."
        )
    failures = sum(len(search.failures) for search in document.searches)
    if failures:
        told.append(f"{counted(failures, 'score')} failed once and had to be computed again.")
    told += filter(None, [machines_said(document)])
    seeds = [len(s.searches) for s in found if s.searches]
    if seeds and min(seeds) < MIN_SEEDS:
        told.append(
            f"Some methods have only {counted(min(seeds), 'search').replace('searchs', 'searches')}"
            f" a budget; which search is better is said from {MIN_SEEDS} on."
        )
    if any(len(finalist.by_seed) == 1 for finalist in document.finalists):
        told.append(
            f"Finalists were trained with one seed: another would move {document.score_name} too, "
            "and is in no error here."
        )
    return told


def evaluations_said(found: Sequence[Standing], scale: Scale) -> str:
    """Say which search of a budget ends highest, and when one passes the Hessian."""
    searches = [s for s in found if s.searches]
    if not searches:
        return "No search has finished."
    best = max(searches, key=lambda s: s.median)
    told = f"{best.method} ends highest, at {scale.score(best.median)} in the median"
    if best.quartiles is not None:
        low, high = (scale.number(end) for end in best.quartiles)
        told += f"; half of its {len(best.searches)} searches end within {low} … {high}"
    curves = {s.method: evaluation_curve(s) for s in searches}
    return f"{told}. {_passing(found, curves, scale, 'evaluations')}".rstrip()


def cost_said(found: Sequence[Standing], scale: Scale) -> str:
    """Say what the Hessian's best score of a budget cost, and when a search reaches it."""
    best = _best_choice(found)
    if best is None:
        return "No Hessian method was run beside the searches."
    price = f"{best.method}’s choice took {significant(best.core_seconds)} core-seconds."
    curves = {s.method: cost_curve(s) for s in found if s.searches}
    return f"{price} {_passing(found, curves, scale, 'core-seconds')}".rstrip()


def shares_said(shares: Sequence[Share]) -> str:
    """Say which method covers most."""
    if not shares:
        return "No method has found something under every budget at different sizes and scores."
    best = shares[0]
    return f"{best.method} covers most of the sizes and scores in reach, {100 * best.median:.1f} %."


def finalists_said(found: Sequence[Standing]) -> str:
    """Say which finalist of a budget is highest, and how many of the others overlap with it."""
    drawn = sorted(
        [(s.method, s.finalist) for s in found if s.finalist is not None],
        key=lambda pair: -pair[1].score,
    )
    if not drawn:
        return "No method’s best was fine-tuned here."
    method, best = drawn[0]
    told = f"{method}’s is highest, {plus_minus(percent(best.score), best.standard_error)} %"
    return f"{told}; chance alone would make one of {len(drawn)} the highest, too."


def _best_choice(found: Sequence[Standing]) -> Standing | None:
    own = [s for s in found if family(s.method) == "hessian"]
    return max(own, key=lambda s: s.median, default=None)


def _passing(found: Sequence[Standing], curves: dict[str, Curve], scale: Scale, unit: str) -> str:
    """Say which method's median first reaches the Hessian's highest score, and when."""
    best = _best_choice(found)
    if best is None or not curves:
        return ""
    level = f"{best.method}’s {scale.score(best.median)}"
    reached = {
        method: float(curve.x[np.argmax(curve.best.median >= best.median)])
        for method, curve in curves.items()
        if curve.best.median[-1] >= best.median
    }
    if not reached:
        return f"No search’s median reaches {level}, the Hessian’s highest."
    first = min(reached, key=lambda method: reached[method])
    when = few(reached[first]) if unit == "evaluations" else significant(reached[first])
    units = unit.removesuffix("s") if when == "1" else unit
    return (
        f"The first median to reach {level}, the Hessian’s highest, is {first}’s, "
        f"at {when} {units}."
    )
