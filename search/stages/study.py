"""Stage between calibration and trials, where asked for: Optuna looks for a recipe.

Trials are those of ``search.trials``, in ``study/NUMBER-DIGEST-HASH/``; Optuna's study is
``study/optuna.db``. Scores are those of the search split. Killed and started again the stage goes
on: what has ended is not trained again, what was interrupted continues after its last whole epoch.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from optuna.trial import FrozenTrial

from search.artefacts import Candidate, StudyArtefact, StudyTrial, Trial
from search.config import StudyConfig
from search.errors import InputError
from search.fit import read_progress
from search.folder import content_hash
from search.stages.search import Search
from search.stages.trials import best, spec
from search.study import RecipeSearch, StudySpecs, distributions, middle
from search.trials import TrialSpec, Tuning, cause, read_trial, tune_specs

__all__ = ["inputs", "make"]


def inputs(search: Search) -> dict[str, Any]:
    """The study, the recipe and the quantizers that it starts from, and what it trains."""
    config = search.config
    return {
        "config": {
            "seed": config.seed,
            "study": _study(search).model_dump(mode="json"),
            "finetune": config.finetune.model_dump(mode="json"),
            "activations": search.fixed_activations,
            "quantizers": asdict(search.config.schemes),
            **({"workers": config.trials.workers} if config.trials.workers > 1 else {}),
        },
        "model": search.model.weights_sha256,
        "allocations": [candidate.digest for candidate in _candidates(search)],
    }


def make(search: Search) -> StudyArtefact:
    """Try recipes, and choose one."""
    study, candidates = _study(search), _candidates(search)
    recipe = study.shortened(search.config.finetune)
    templates = {c.digest: _template(search, c) for c in candidates}
    root = search.folder.path / "study"
    digests = list(templates) if study.sampler == "nsga2" else []
    searcher = RecipeSearch(
        distributions(study, digests),
        path=root / "optuna.db",
        name=_name(search),
        sampler=study.sampler,
        seed=search.config.seed,
        num_trials=study.trials,
        first=middle(study, recipe, search.config.schemes.weights.range, digests),
        specs=StudySpecs(templates, recipe, search.config.schemes, root.resolve()),
    )
    errors = _run(search, searcher, recipe.epochs) if searcher.num_left else {}
    trials = [_trial(searcher, t, errors.get(t.number)) for t in searcher.trials]
    finished = [trial for trial in trials if trial.status == "finished"]
    if not finished:
        first = trials[0].reason if trials else "none was begun"
        raise InputError(
            f"study: a trial must finish, got {len(trials)} that did not, the first: {first}"
        )
    for trial in trials:
        searcher.tell(searcher.study.trials[trial.number], errors.get(trial.number))
        if trial.status == "failed":
            search.events.emit("study", "warning", f"trial {trial.number}: {trial.reason}")
    chosen = max(finished, key=lambda t: (t.search_score or 0.0, -t.number))
    is_tpe = study.sampler == "tpe"
    reason = (
        f"the best score on the search split, {100 * (chosen.search_score or 0.0):.2f} %, of "
        f"{len(finished)} finished trials out of {len(trials)}"
    )
    search.events.emit("study", "note", f"trial {chosen.number} has {reason}: {_said(chosen)}")
    search.worker_cpu_seconds += sum(trial.cpu_seconds for trial in trials)
    return StudyArtefact(
        sampler=study.sampler,
        digest=candidates[0].digest if is_tpe else None,
        method=candidates[0].method if is_tpe else None,
        epochs=recipe.epochs,
        trials=trials,
        chosen=chosen.number,
        reason=reason,
        front=[] if is_tpe else _front(finished),
    )


def _name(search: Search) -> str:
    """Name the study: of another config, or of other weights, it is another one in the file."""
    identity = inputs(search)
    del identity["config"]["study"]["trials"]  # more of them continue it
    return f"recipe-{content_hash(identity)[:8]}"


def _study(search: Search) -> StudyConfig:
    assert search.config.study is not None, "the pipeline has this stage where there is a study"
    return search.config.study


def _candidates(search: Search) -> list[Candidate]:
    """Return whose recipe is looked for: one, or every distinct one where it is chosen, too."""
    study = _study(search)
    if study.sampler == "nsga2":
        return list({c.digest: c for c in reversed(search.candidates)}.values())[::-1]
    method = study.candidate or search.config.methods[0]
    return [next(c for c in search.candidates if c.method == method)]


def _template(search: Search, candidate: Candidate) -> TrialSpec:
    recipe = _study(search).shortened(search.config.finetune)
    found = spec(
        search,
        candidate,
        candidate.digests[0],
        candidate.bits,
        search.config.seed,
        recipe,
        search.config.schemes,
    )
    size = candidate.costs["stored_bits"] if _study(search).sampler == "nsga2" else None
    return replace(found, stored_bits=size)


def _run(search: Search, searcher: RecipeSearch, epochs: int) -> dict[int, Exception]:
    """Run what is left of a study; return what workers died of too often, by trials' numbers."""
    study = _study(search)
    resources = search.config.trials.model_copy(update={"asha": study.asha})

    def look() -> None:
        trials = searcher.trials
        progress = [read_progress(searcher.spec(t).folder) for t in trials]
        parts = zip(trials, progress, strict=True)
        done = sum(
            1.0 if t.state.is_finished() else min(0.99, p.done / p.total) if p else 0.0
            for t, p in parts
        )
        search.progress("study", done, study.trials, "trials", _leader(trials))

    grid = tune_specs(
        search.task,
        search.weights,
        searcher.specs,
        tuning=Tuning(resources, search.folder.path / "tune", best(search), "study"),
        epochs=epochs,
        look=look,
        searcher=searcher,
        num_samples=searcher.num_left,
    )
    look()
    errors = [(grid[i].config, cause(grid[i].error)) for i in range(len(grid))]
    return {config["number"]: error for config, error in errors if config and error is not None}


def _leader(trials: Sequence[FrozenTrial]) -> str:
    finished = [trial for trial in trials if trial.values]
    if not finished:
        return ""
    leader = max(finished, key=lambda trial: trial.values[0])
    return f"best {100 * leader.values[0]:.2f} % (trial {leader.number})"


def _trial(searcher: RecipeSearch, trial: FrozenTrial, error: Exception | None) -> StudyTrial:
    found: Trial | None = read_trial(searcher.spec(trial).folder)
    if found is None:
        found = searcher.result(trial, error)
    return StudyTrial(
        **found.model_dump(),
        number=trial.number,
        parameters=trial.params,
        stored_bits=searcher.spec(trial).stored_bits,
    )


def _said(trial: StudyTrial) -> str:
    return ", ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in trial.parameters.items()
    )


def _front(finished: Sequence[StudyTrial]) -> list[int]:
    """Return the undominated trials' numbers, smallest size first."""
    order = sorted(finished, key=lambda t: (t.stored_bits, -(t.search_score or 0.0), t.number))
    front: list[StudyTrial] = []
    for trial in order:
        if not front or (trial.search_score or 0.0) > (front[-1].search_score or 0.0):
            front.append(trial)
    return [trial.number for trial in front]
