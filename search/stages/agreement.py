"""Stage: what a score without training is worth, and what the Hessian's choices score.

Some allocations are scored and fine-tuned: half of them from anywhere in the decision process, half
from around the Hessian's solution, which is where good searches end. Where scores rank them
otherwise than fine-tuning does, nothing follows from scores.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import load_file

from hawq.allocation import Allocation
from hawq.finetune import evaluate
from search.artefacts import Candidate
from search.config import ComparisonConfig, RecipeConfig
from search.evaluate import Evaluation
from search.folder import content_hash
from search.scorers import evaluated
from search.searched import AgreementArtefact, AgreementPoint, HessianChoice, ScoredAllocation
from search.searchers import SEARCHERS, Problem, around
from search.searchers.processes import Process
from search.stages.scoring import Job, score_all
from search.stages.search import Search
from search.stages.searches import evaluator, problem
from search.tables import Tables
from search.trials import TrialSpec, run_trials

__all__ = ["inputs", "make"]


def inputs(search: Search) -> dict[str, Any]:
    """How many, how they are trained, how scored, and what the Hessian's methods chose."""
    own, recipe = _settings(search)
    config = search.config.model_dump(mode="json")
    return {
        "config": {
            "seed": search.config.seed,
            "agreement": own.agreement,
            "finetune": recipe.model_dump(mode="json"),
            "searches": config["searches"],
        },
        "model": search.model.weights_sha256,
        "tables": content_hash(search.tables.model_dump(mode="json")),
        "chosen": [[c.method, c.budget, c.digest] for c in _hessian(search)],
    }


def make(search: Search) -> AgreementArtefact:
    """Score, fine-tune, test."""
    chosen = [(c, *_of(search, c)) for c in _hessian(search)]
    evaluations = _scored(search, [(tables, allocation) for _, tables, allocation in chosen])
    scores = _unquantized(search)
    return AgreementArtefact(
        num_examples=len(scores),
        unquantized=float(scores.double().mean()),
        hessian=[
            HessianChoice(
                method=candidate.method,
                budget=candidate.budget,
                chosen=ScoredAllocation(
                    digest=candidate.digest,
                    score=evaluation.score,
                    seconds=candidate.seconds,
                    weight_bits=candidate.costs["weight_bits"],
                    activation_bits=candidate.costs.get("activation_bits"),
                    sensitivity=candidate.sensitivity,
                ),
                cpu_seconds=candidate.seconds,
            )
            for (candidate, _, _), evaluation in zip(chosen, evaluations, strict=True)
            if evaluation.status == "scored"
        ],
        points=_points(search),
    )


def _settings(search: Search) -> tuple[ComparisonConfig, RecipeConfig]:
    own = search.config.comparison
    assert own is not None, "the stage is there for comparisons alone"
    recipe, _ = search.training
    return own, RecipeConfig(**recipe.model_dump() | {"epochs": own.agreement_epochs})


def _hessian(search: Search) -> list[Candidate]:
    return [c for c in search.candidates if not SEARCHERS[c.method].needs_scores]


def _of(search: Search, candidate: Candidate) -> tuple[Tables, Allocation]:
    by_channel = candidate.granularity == "channel"
    of_channels = Tables.of_channels(search.tables) if by_channel else None
    tables = of_channels or Tables.of(search.tables)
    return tables, Allocation.of(tables.space, candidate.bits)


def _scored(search: Search, wanted: list[tuple[Tables, Allocation]]) -> list[Evaluation]:
    """Score allocations on the cluster."""
    own = search.config.searches
    remote = evaluated.options(name="agreement:score", num_cpus=own.cpus, num_gpus=own.gpus)
    asked = [remote.remote(evaluator(search, t), a, own.cpus) for t, a in wanted]
    for done in range(1, len(asked) + 1):
        ray.wait(asked, num_returns=done)
        search.progress("agreement", done, len(asked), "scores")
    found: list[Evaluation] = ray.get(asked)
    search.worker_cpu_seconds += sum(evaluation.seconds for evaluation in found)
    return found


def _unquantized(search: Search) -> torch.Tensor:
    model = search.task.model()
    model.load_state_dict(search.weights)
    return evaluate(model, search.task, "search", num_examples=search.config.searches.examples)


def _points(search: Search) -> list[AgreementPoint]:
    """Score allocations, and fine-tune and test them."""
    own, recipe = _settings(search)
    if not own.agreement or not search.config.searching:
        return []
    asked = _problem(search)
    drawn = list({a.digest: a for a in _drawn(asked, own.agreement, search.config.seed)}.values())
    scores = _scored(search, [(asked.tables, allocation) for allocation in drawn])
    _, schemes = search.training
    specs = [
        TrialSpec(
            digest=allocation.digest,
            bits=dict(zip(allocation.names, allocation.bits, strict=True))
            | search.fixed_activations,
            recipe=recipe.recipe(),
            seed=search.config.seed,
            folder=(search.folder.path / "agreement" / allocation.digest).resolve(),
            schemes=schemes,
        )
        for allocation in drawn
    ]
    trials = run_trials(
        search.task,
        search.weights,
        specs,
        resources=search.config.trials,
        storage=search.folder.path / "tune-agreement",
        on_progress=lambda done: search.progress(
            "agreement", done, len(specs) * recipe.epochs, "epochs"
        ),
    )
    search.worker_cpu_seconds += sum(trial.cpu_seconds for trial in trials)
    trained = [
        (spec, score)
        for spec, score, trial in zip(specs, scores, trials, strict=True)
        if trial.status == "finished" and score.status == "scored"
    ]
    jobs: list[Job] = [(load_file(spec.folder / "model.safetensors"), spec) for spec, _ in trained]
    tested = score_all(search, "agreement", jobs, "test")
    return [
        AgreementPoint(
            digest=spec.digest,
            budget=search.config.budgets[0].label,
            score=score.score,
            finetuned=float(examples.double().mean()),
        )
        for (spec, score), examples in zip(trained, tested, strict=True)
    ]


def _problem(search: Search) -> Problem:
    """Return what the first searching method is asked, under the first budget."""
    first = SEARCHERS[search.config.searching[0]]
    return problem(search, search.config.budgets[0], first.by_channel)


def _drawn(asked: Problem, num: int, seed: int) -> Iterator[Allocation]:
    """Draw allocations: from anywhere, and from around the Hessian's solution."""
    rng = np.random.default_rng(seed)
    by_channel = any(group.is_channel for group in asked.tables.space.groups)
    process = Process(replace(asked, evaluate=asked.tables.proxy), by_channel)()
    for _ in range((num + 1) // 2):
        yield process.allocation_of(rng.random(process.num_steps).tolist())
    base = SEARCHERS["channel" if by_channel else "exact"]
    for _ in range(num // 2):
        yield around(base, asked, rng)
