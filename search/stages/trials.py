"""Stage 6: every distinct candidate fine-tuned under one recipe with every seed, by Ray Tune."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from hawq.allocation import Allocation
from hawq.quantizers import Schemes
from hawq.space import Space
from search.artefacts import Candidate, SeededTrial, TrialsArtefact
from search.config import RecipeConfig
from search.evaluate import evaluation_key
from search.events import Measure, Measures
from search.stages.search import Search
from search.trials import BestSoFar, TrialSpec, read_trial, run_trials

__all__ = ["best", "inputs", "make", "spec", "specs"]


def inputs(search: Search) -> dict[str, Any]:
    """The recipe, the quantizers, early stopping, the seeds, and what is trained."""
    config = search.config
    seeds = config.training_seeds
    recipe, schemes = search.training
    return {
        "config": {
            "seeds": list(seeds),
            "finetune": recipe.model_dump(mode="json"),
            "activations": search.fixed_activations,
            "quantizers": asdict(schemes),
            "asha": config.trials.asha,
            **({"workers": config.trials.workers} if config.trials.workers > 1 else {}),
        },
        "model": search.model.weights_sha256,
        # As JSON gives them back: a list each.
        "allocations": sorted(
            list(t) for t in {t for c in search.candidates for t in c.trainings(seeds)}
        ),
    }


def make(search: Search) -> TrialsArtefact:
    """Fine-tune."""
    wanted = specs(search)
    epochs = len(wanted) * search.training[0].epochs
    found = run_trials(
        search.task,
        search.weights,
        wanted,
        resources=search.config.trials,
        storage=search.folder.path / "tune",
        best=best(search),
        on_progress=lambda done: search.progress(
            "trials", done, epochs, "epochs", measures=_standing(search, wanted)
        ),
    )
    trials = [
        SeededTrial(**trial.model_dump() | {"digest": spec.digest, "seed": spec.seed})
        for trial, spec in zip(found, wanted, strict=True)
    ]
    for trial in trials:
        if trial.status != "finished":
            told = f"{trial.digest}, seed {trial.seed}, {trial.status}: {trial.reason}"
            search.events.emit("trials", "warning", told)
        if trial.zeroed:
            told = f"{trial.digest}, seed {trial.seed}: all zero are {', '.join(trial.zeroed)}"
            search.events.emit("trials", "warning", told)
    search.worker_cpu_seconds += sum(trial.cpu_seconds for trial in trials)
    return TrialsArtefact(trials=trials)


def _standing(search: Search, wanted: Sequence[TrialSpec]) -> Measures:
    """Say how many trials have ended, and the best score of an epoch by now."""
    found: dict[Measure, float] = {
        "trials": sum(read_trial(spec.folder) is not None for spec in wanted)
    }
    path = search.folder.path / "best" / "allocation.json"
    with suppress(FileNotFoundError):  # there is none yet, or it is replaced in this moment
        found["best_score"] = json.loads(path.read_text(encoding="utf-8"))["search_score"]
    return found


def specs(search: Search) -> list[TrialSpec]:
    """Specify a trial for each distinct training.

    Returns:
        Seed by seed, and for a seed in the order of the candidates: a comparison that is
        interrupted has every method as often as the others.
    """
    seeds, training = search.config.training_seeds, search.training
    found: dict[tuple[str, int], TrialSpec] = {}
    for candidate in search.candidates:
        bits = dict(zip(candidate.digests, _choices(candidate), strict=True))
        for digest, seed in candidate.trainings(seeds):
            found[digest, seed] = spec(search, candidate, digest, bits[digest], seed, *training)
    return sorted(found.values(), key=lambda spec: seeds.index(spec.seed))


def _choices(candidate: Candidate) -> list[dict[str, int]]:
    return [candidate.bits, *(draw.bits for draw in candidate.draws)]


def best(search: Search) -> BestSoFar:
    """Return what trials offer their epochs to: ``RUN/best/``."""
    methods: dict[str, list[str]] = {}
    for candidate in search.candidates:
        for digest in candidate.digests:
            methods.setdefault(digest, []).append(f"{candidate.method} at {candidate.budget}")
    of = {"weights": search.model.weights_sha256, "task": search.task.fingerprint}
    return BestSoFar(search.folder.path / "best", of, methods)


def spec(
    search: Search,
    candidate: Candidate,
    digest: str,
    bits: dict[str, int],
    seed: int,
    recipe: RecipeConfig,
    schemes: Schemes,
) -> TrialSpec:
    """Specify one training.

    Args:
        search: Gives everything that is the same for all.
        candidate: Whose space and order it is.
        digest: Of what is trained.
        bits: The candidate's, or a draw's.
        seed: Of the training.
        recipe: How to train.
        schemes: How to quantize.
    """
    trials = search.config.trials
    fidelity = recipe.model_dump() | {"asha": trials.asha}
    if trials.workers > 1:
        fidelity["workers"] = trials.workers
    if candidate.order:
        fidelity["order"] = candidate.order
    key = evaluation_key(
        Allocation.of(_space(search, candidate), bits),
        weights_sha256=search.model.weights_sha256,
        split="search",
        quantizer=search.fixed_activations | asdict(schemes),
        fidelity=fidelity,
        seed=seed,
    )
    return TrialSpec(
        digest=digest,
        bits=bits | search.fixed_activations,
        recipe=recipe.recipe(),
        seed=seed,
        folder=(search.folder.path / "trials" / key).resolve(),
        order=tuple(tuple(block) for block in candidate.order),
        schemes=schemes,
    )


def _space(search: Search, candidate: Candidate) -> Space:
    space = search.channels if candidate.granularity == "channel" else search.space
    assert space is not None
    return space
