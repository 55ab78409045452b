"""Stage 6: every distinct candidate fine-tuned under one recipe with every seed, by Ray Tune."""

from dataclasses import asdict
from typing import Any

from hawq.allocation import Allocation
from hawq.space import Space
from search.artefacts import Candidate, SeededTrial, TrialsArtefact
from search.evaluate import evaluation_key
from search.stages.search import Search
from search.trials import TrialSpec, run_trials

__all__ = ["inputs", "make", "specs"]


def inputs(search: Search) -> dict[str, Any]:
    """The recipe, the quantizers, early stopping, the seeds, and what is trained."""
    config = search.config.model_dump(mode="json")
    seeds = search.config.training_seeds
    return {
        "config": {
            "seeds": list(seeds),
            "finetune": config["finetune"],
            "activations": search.fixed_activations,
            "quantizers": asdict(search.schemes),
            "asha": config["trials"]["asha"],
        },
        "model": search.model.weights_sha256,
        # As JSON gives them back: a list each.
        "allocations": sorted({t: list(t) for c in search.candidates for t in c.trainings(seeds)}),
    }


def make(search: Search) -> TrialsArtefact:
    """Fine-tune."""
    wanted = specs(search)
    epochs = len(wanted) * search.config.finetune.epochs
    found = run_trials(
        search.task,
        search.weights,
        wanted,
        resources=search.config.trials,
        storage=search.folder.path / "tune",
        on_progress=lambda done: search.progress("trials", done, epochs, "epochs"),
    )
    trials = [
        SeededTrial(**trial.model_dump() | {"digest": spec.digest, "seed": spec.seed})
        for trial, spec in zip(found, wanted, strict=True)
    ]
    for trial in trials:
        if trial.status != "finished":
            told = f"{trial.digest}, seed {trial.seed}, {trial.status}: {trial.reason}"
            search.events.emit("trials", "warning", told)
    search.worker_cpu_seconds += sum(trial.cpu_seconds for trial in trials)
    return TrialsArtefact(trials=trials)


def specs(search: Search) -> list[TrialSpec]:
    """Specify a trial for each distinct training.

    Returns:
        Seed by seed, and for a seed in the order of the candidates: a comparison that is
        interrupted has every method as often as the others.
    """
    seeds = search.config.training_seeds
    found: dict[tuple[str, int], TrialSpec] = {}
    for candidate in search.candidates:
        bits = dict(zip(candidate.digests, _choices(candidate), strict=True))
        for digest, seed in candidate.trainings(seeds):
            found[digest, seed] = _spec(search, candidate, digest, bits[digest], seed)
    return sorted(found.values(), key=lambda spec: seeds.index(spec.seed))


def _choices(candidate: Candidate) -> list[dict[str, int]]:
    return [candidate.bits, *(draw.bits for draw in candidate.draws)]


def _spec(
    search: Search, candidate: Candidate, digest: str, bits: dict[str, int], seed: int
) -> TrialSpec:
    config = search.config
    fidelity = config.finetune.model_dump() | {"asha": config.trials.asha}
    if candidate.order:
        fidelity["order"] = candidate.order
    key = evaluation_key(
        Allocation.of(_space(search, candidate), bits),
        weights_sha256=search.model.weights_sha256,
        split="search",
        quantizer=search.fixed_activations | asdict(search.schemes),
        fidelity=fidelity,
        seed=seed,
    )
    return TrialSpec(
        digest=digest,
        bits=bits | search.fixed_activations,
        recipe=config.finetune.recipe(),
        seed=seed,
        folder=(search.folder.path / "trials" / key).resolve(),
        order=tuple(tuple(block) for block in candidate.order),
        schemes=search.schemes,
    )


def _space(search: Search, candidate: Candidate) -> Space:
    space = search.channels if candidate.granularity == "channel" else search.space
    assert space is not None
    return space
