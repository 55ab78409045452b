"""Stage 4: what each method chooses under each budget."""

import time
from typing import Any

import numpy as np

from hawq.cost import average_bits, compression, total
from search.artefacts import BudgetLimit, Candidate, CandidatesArtefact, FrontPoints
from search.folder import content_hash
from search.searchers import SEARCHERS, Problem, Tables
from search.stages.search import Search

__all__ = ["inputs", "make"]


def inputs(search: Search) -> dict[str, Any]:
    """Budgets, methods and the tables."""
    config = search.config.model_dump(mode="json")
    return {
        "config": {key: config[key] for key in ("seed", "budgets", "methods")},
        "tables": content_hash(search.tables.model_dump(mode="json")),
    }


def make(search: Search) -> CandidatesArtefact:
    """Run every searcher under every budget."""
    tables, config = _tables(search), search.config
    limits = [(budget.label, budget.limit_bits(search.space)) for budget in config.budgets]
    return CandidatesArtefact(
        budgets=[BudgetLimit(label=label, limit_bits=bits) for label, bits in limits],
        fronts=_fronts(search, tables),
        candidates=[
            _candidate(search, method, label, Problem(tables, bits, tables.proxy))
            for label, bits in limits
            for method in config.methods
        ],
    )


def _tables(search: Search) -> Tables:
    tables = search.tables
    sensitivity = [[np.inf if v is None else v for v in row] for row in tables.sensitivity]
    return Tables(
        search.space,
        np.array(sensitivity),
        np.array(tables.weight_bits, np.int64),
        np.array(search.curvature.trace),
    )


def _fronts(search: Search, tables: Tables) -> list[FrontPoints]:
    fronts = [(method, SEARCHERS[method].front(tables)) for method in search.config.methods]
    return [
        FrontPoints(
            method=method,
            weight_bits=front.cost.tolist(),
            sensitivity=front.sensitivity.tolist(),
        )
        for method, front in fronts
        if front is not None
    ]


def _candidate(search: Search, method: str, budget: str, problem: Problem) -> Candidate:
    started = time.monotonic()
    found = list(SEARCHERS[method].search(problem, evaluations=1, seed=search.config.seed))
    best = max(found, key=lambda evaluation: evaluation.score).allocation
    assert problem.fits(best), f"{method} must stay within its budget"
    bits = total(problem.tables.weight_bits, search.space, best)
    return Candidate(
        method=method,
        budget=budget,
        digest=best.digest,
        bits=dict(zip(best.names, best.bits, strict=True)),
        weight_bits=bits,
        average_bits=average_bits(search.space, bits),
        compression=compression(search.space, bits),
        sensitivity=problem.tables.omega(best),
        evaluations=len(found),
        seconds=time.monotonic() - started,
    )
