"""Stage: what agents, samplers and climbers find, every method under every budget."""

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from envs.layer_bits import layer_features
from hawq.allocation import Allocation
from search.config import Budget
from search.evaluate import Evaluate
from search.events import Measures
from search.folder import content_hash
from search.scores import CheapScores, score_spec
from search.searched import SearchesArtefact
from search.searchers import SEARCHERS, Effort, Problem, Ratios, Reward, Rules
from search.searches import SearchSpec, TrainedScores, run_searches
from search.stages.search import Search
from search.tables import Tables

__all__ = ["evaluator", "inputs", "make", "problem"]

_RECENT = 10


def inputs(search: Search) -> dict[str, Any]:
    """How they search and score, for what, and from which tables."""
    return {
        "config": _config(search) | {"methods": search.config.searching},
        "tables": content_hash(search.tables.model_dump(mode="json")),
        "model": search.model.weights_sha256,
    }


def _config(search: Search) -> dict[str, Any]:
    config = search.config.model_dump(mode="json")
    keys = ("seed", "searches", "budgets", "channels")
    found = {key: config[key] for key in keys}
    found["seeds"] = list(search.config.search_seeds)
    return found


def make(search: Search) -> SearchesArtefact:
    """Search, as much at once as fits the cluster."""
    config = search.config
    specs = list(_specs(search))
    wanted = {(spec.budget, SEARCHERS[spec.method].by_channel) for spec in specs}
    problems = {
        (budget.label, by_channel): problem(search, budget, by_channel)
        for budget in config.budgets
        for by_channel in (False, True)
        if (budget.label, by_channel) in wanted
    }
    records = run_searches(
        specs,
        problems,
        effort=_effort(search),
        progress=lambda done, total: search.progress(
            "searches", done, total, "evaluations", measures=_standing(specs)
        ),
        finished=lambda r: search.events.emit(
            "searches", "note", f"{r.method} at {r.budget}, seed {r.seed}: {r.best.score:.4f}"
        ),
    )
    for record in records:
        if record.reason:
            told = f"{record.method}, seed {record.seed}, {len(record.evaluations)} evaluations"
            search.events.emit("searches", "warning", f"{told}: {record.reason}")
        search.worker_cpu_seconds += record.cpu_seconds
    return SearchesArtefact(searches=records)


def _standing(specs: Sequence[SearchSpec]) -> Measures:
    """Say what the searches have found by now, from what they wrote."""
    logs = [spec.log.read_text(encoding="utf-8") for spec in specs if spec.log.exists()]
    found = [json.loads(line) for log in logs for line in log.split("\n")[1:-1]]
    if not found:
        return {}
    scores = [evaluation["score"] for evaluation in found]
    return {
        "evaluations": len(found),
        "episodes": sum(evaluation["proposals"] for evaluation in found),
        "reward": fmean(scores[-_RECENT:]),
        "best_score": max(scores),
    }


def _specs(search: Search) -> list[SearchSpec]:
    """Specify every search: seed by seed, so that an interrupted comparison is an even one."""
    config = search.config
    shared = config.model_dump(mode="json")
    depends = {key: shared[key] for key in ("searches", "curvature", "weights", "activations")}
    depends |= {"channels": shared["channels"], "weights_sha256": search.model.weights_sha256}
    return [
        SearchSpec(
            method=method,
            budget=budget.label,
            seed=seed,
            evaluations=config.searches.evaluations,
            folder=(search.folder.path / "searches" / f"{method}-{index}-{seed}").resolve(),
            inputs=content_hash(depends | {"budget": budget.given, "method": method, "seed": seed}),
        )
        for seed in config.search_seeds
        for index, budget in enumerate(config.budgets)
        for method in config.searching
    ]


def problem(search: Search, budget: Budget, by_channel: bool) -> Problem:
    """Return what a search is asked."""
    config = search.config
    own = config.searches
    of_channels = Tables.of_channels(search.tables) if by_channel else None
    tables = of_channels or Tables.of(search.tables)
    return Problem(
        tables,
        tables.budgets(budget.limits(tables.space)),
        evaluator(search, tables),
        Rules(config.channels.max_widths, config.channels.multiple),
        reward=_reward(search, tables),
        ratios=Ratios(own.ranking, own.unit, own.scope),
        features=None if by_channel else layer_features(tables.space, search.reads),
        effort=_effort(search),
    )


def evaluator(search: Search, tables: Tables) -> Evaluate:
    """Return what scores allocations, as the config asks for it."""
    own = search.config.searches
    if own.score == "proxy":
        return tables.proxy
    spec = score_spec(
        search.config,
        search.task,
        search.reads,
        search.folder.path,
        num_examples=own.examples,
        device="cuda" if own.gpus and torch.cuda.is_available() else "cpu",
    )
    return TrainedScores(spec, own.finetune.recipe()) if own.finetune else CheapScores(spec)


def _effort(search: Search) -> Effort:
    own = search.config.searches
    return Effort(own.runners, own.cpus, own.gpus)


def _reward(search: Search, tables: Tables) -> Reward:
    if search.config.searches.score != "proxy":
        return Reward(search.model.search_score)
    return Reward(0.0, 1 / (tables.omega(Allocation.least(tables.space)) or 1.0))
