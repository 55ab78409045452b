"""Stage 4: what each method chooses under each budget."""

import time
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from hawq.allocate import InfeasibleBudgetError, InfeasibleBudgetsError, Verdict, lower_hull
from hawq.allocate.front import evenly, merge_ties
from hawq.allocation import Allocation, by_group
from hawq.cost import average_bits, compression
from hawq.space import Kind
from search.artefacts import BudgetLimit, Candidate, CandidatesArtefact, Draw, FrontPoints
from search.config import Budget, SearchConfig
from search.errors import InputError
from search.folder import content_hash
from search.searched import SearchRecord
from search.searchers import SEARCHERS, Problem, Rules, fine_tuning_order
from search.stages.search import Search
from search.tables import Tables

__all__ = ["MAX_HULL_POINTS", "candidate", "fronts", "inputs", "make"]

# A hull has a point for every step of every channel: a picture needs no more than these.
MAX_HULL_POINTS = 1000

_NOUNS = {
    "weight_bits": "weights",
    "activation_bits": "activations",
    "peak_activation_bits": "the activations' peak",
    "bops": "bit operations",
    "latency_ns": "latency",
}


def inputs(search: Search) -> dict[str, Any]:
    """Budgets, methods and the tables."""
    config = search.config.model_dump(mode="json")
    return {
        "config": {
            key: config[key] for key in ("seed", "budgets", "methods", "channels", "uniform_draws")
        },
        "tables": content_hash(search.tables.model_dump(mode="json")),
        # Named only where there are some: a run without them goes on with what it has.
        **({"searches": _bests(search)} if search.config.searching else {}),
    }


def make(search: Search) -> CandidatesArtefact:
    """Run every searcher under every budget."""
    tables, config = Tables.of(search.tables), search.config
    channels = Tables.of_channels(search.tables)
    rules = Rules(config.channels.max_widths, config.channels.multiple)
    return CandidatesArtefact(
        budgets=[
            BudgetLimit(label=budget.label, limits=budget.limits(tables.space))
            for budget in config.budgets
        ],
        fronts=[found for method in config.methods for found in fronts(method, tables, channels)],
        candidates=[
            _searched(method, budget, used, search.searches)
            if SEARCHERS[method].needs_scores
            else _drawn(method, budget, used, rules, config)
            for budget in config.budgets
            for method in config.methods
            for used in [channels if SEARCHERS[method].by_channel else tables]
            if used is not None  # the config has tables of channels made where a method needs them
        ],
    )


def _bests(search: Search) -> list[list[str | int]]:
    return [[r.method, r.budget, r.seed, r.best.digest] for r in search.searches]


def _searched(
    method: str, budget: Budget, used: Tables, records: Sequence[SearchRecord]
) -> Candidate:
    """Return the best that a method's searches found, the first of equal ones."""
    mine = [r for r in records if (r.method, r.budget) == (method, budget.label)]
    record = max(mine, key=lambda r: r.best.score)
    return _candidate(
        method,
        budget,
        used,
        Allocation.of(used.space, by_group(record.bits)),
        evaluations=len(record.evaluations),
        seconds=record.cpu_seconds,
        search_seed=record.seed,
    )


def _drawn(
    method: str, budget: Budget, used: Tables, rules: Rules, config: SearchConfig
) -> Candidate:
    """Let a method choose, and a random one as often as the config asks for."""
    first = candidate(method, budget, used, rules=rules, seed=config.seed)
    if not SEARCHERS[method].is_random:
        return first
    others = [
        candidate(method, budget, used, rules=rules, seed=_seed(config.seed, d))
        for d in range(1, config.uniform_draws)
    ]
    if all(other.digest == first.digest for other in others):
        return first  # nothing was left to chance: at a whole number of bits
    draws = [
        Draw(digest=o.digest, bits=o.bits, costs=o.costs, sensitivity=o.sensitivity) for o in others
    ]
    return first.model_copy(update={"draws": draws})


def _seed(seed: int, draw: int) -> int:
    return int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])


def fronts(method: str, tables: Tables, channels: Tables | None = None) -> list[FrontPoints]:
    """Return what a method can offer, over the size of the weights and of the activations.

    Args:
        method: Its name.
        tables: Of layers and activation tensors.
        channels: Of channels; None where there are none.

    Returns:
        A method's own front; of one that gives every channel its own bits the lower convex hull,
        thinned to ``MAX_HULL_POINTS``, each of which is an allocation.
    """
    searcher, kinds = SEARCHERS[method], get_args(Kind)
    if searcher.needs_scores:
        return []  # what a search tries is known for its budget alone
    if searcher.by_channel:
        hulls = [_hull(method, channels, kind) for kind in kinds if channels is not None]
        return [hull for hull in hulls if hull is not None]
    found = [(kind, searcher.front(tables, kind)) for kind in kinds]
    return [
        FrontPoints(
            method=method,
            of=kind,
            bits=front.cost.tolist(),
            sensitivity=front.sensitivity.tolist(),
        )
        for kind, front in found
        if front is not None
    ]


def _hull(method: str, channels: Tables, kind: Kind) -> FrontPoints | None:
    part = channels.part(kind)
    if part is None:
        return None
    rows = merge_ties(part.space, part.sensitivity, part.size)
    hull = lower_hull(rows.sensitivity, rows.cost)
    kept = evenly(hull.total_cost, MAX_HULL_POINTS)
    return FrontPoints(
        method=method,
        of=kind,
        bits=hull.total_cost[kept].tolist(),
        sensitivity=hull.total[kept].tolist(),
        is_hull=True,
    )


def candidate(
    method: str, budget: Budget, used: Tables, *, rules: Rules | None = None, seed: int = 0
) -> Candidate:
    """Let one method choose under one budget.

    Args:
        method: Its name.
        budget: What the allocation may cost.
        used: Tables of channels for a method that gives them bits, else of layers and tensors.
        rules: For channels.
        seed: Of whatever is random.

    Raises:
        InputError: If nothing is within the budget, or a cost is not known.
    """
    started = time.monotonic()
    searcher = SEARCHERS[method]
    problem = Problem(used, used.budgets(budget.limits(used.space)), used.proxy, rules or Rules())
    try:
        found = list(searcher.search(problem, evaluations=1, seed=seed))
    except InfeasibleBudgetError as error:
        name = next(n for n, limit in budget.limits(used.space).items() if limit == error.budget)
        least = budget.in_own_unit(used.space, name, error.minimum)
        raise InputError(
            f"budget {budget.label}: must allow {least} at least for {_NOUNS[name]}"
        ) from error
    except InfeasibleBudgetsError as error:
        told = "; ".join(_verdict(verdict, budget, used) for verdict in error.verdicts)
        raise InputError(f"budget {budget.label}: nothing is within it: {told}") from error
    except ValueError as error:
        raise InputError(f"{method} at {budget.label}: {error}") from error
    evaluation = max(found, key=lambda e: e.score)
    return _candidate(
        method,
        budget,
        used,
        evaluation.allocation,
        bound=evaluation.bound,
        evaluations=len(found),
        seconds=time.monotonic() - started,
        seed=seed,
    )


def _candidate(
    method: str,
    budget: Budget,
    used: Tables,
    best: Allocation,
    *,
    evaluations: int,
    seconds: float,
    bound: float | None = None,
    seed: int = 0,
    search_seed: int | None = None,
) -> Candidate:
    """Describe what a method chose."""
    within = Problem(used, used.budgets(budget.limits(used.space)), used.proxy)
    assert within.fits(best), f"{method} must stay within its budget"
    costs = {name: cost.of(used.space, best) for name, cost in used.costs.items()}
    return Candidate(
        method=method,
        budget=budget.label,
        granularity="channel" if SEARCHERS[method].by_channel else "layer",
        digest=best.digest,
        bits=dict(zip(best.names, best.bits, strict=True)),
        costs=costs,
        **_ratios(used, costs),
        sensitivity=used.omega(best),
        activation_sensitivity=used.omega(best, "activations")
        if "activation_bits" in costs
        else None,
        bound=bound,
        evaluations=evaluations,
        search_seed=search_seed,
        seconds=seconds,
        order=[list(block) for block in fine_tuning_order(method, used, best, seed)],
    )


def _verdict(verdict: Verdict, budget: Budget, tables: Tables) -> str:
    def own(cost: int) -> str:
        return budget.in_own_unit(tables.space, verdict.name, cost)

    text = f"{_NOUNS[verdict.name]} at {own(verdict.limit)}"
    if verdict.least is None:
        return f"{text} (the least was not found in time)"
    if not verdict.is_feasible_alone:
        return f"{text} cannot be, even alone: at least {own(verdict.least)}"
    if verdict.nearest is None:
        return f"{text} can be, alone"
    return f"{text} can be, alone; within the others at least {own(verdict.nearest)}"


def _ratios(tables: Tables, costs: dict[str, int]) -> dict[str, Any]:
    space, weights = tables.space, costs["weight_bits"]
    activations = costs.get("activation_bits")
    return {
        "average_bits": average_bits(space, weights),
        "compression": compression(space, weights),
        "activation_average_bits": activations and average_bits(space, activations, "activations"),
        "activation_compression": activations and compression(space, activations, "activations"),
    }
