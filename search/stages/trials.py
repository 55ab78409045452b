"""Stage 6: every distinct allocation fine-tuned under one recipe, by Ray Tune."""

from typing import Any

from hawq.allocation import Allocation
from search.artefacts import TrialsArtefact
from search.evaluate import evaluation_key
from search.stages.search import Search
from search.trials import TrialSpec, run_trials

__all__ = ["inputs", "make", "specs"]


def inputs(search: Search) -> dict[str, Any]:
    """The recipe, the quantizers, early stopping, and the allocations."""
    config = search.config.model_dump(mode="json")
    return {
        "config": {
            "seed": config["seed"],
            "finetune": config["finetune"],
            "activations": search.fixed_activations,
            "asha": config["trials"]["asha"],
        },
        "model": search.model.weights_sha256,
        "allocations": sorted({candidate.digest for candidate in search.candidates}),
    }


def make(search: Search) -> TrialsArtefact:
    """Fine-tune."""
    wanted = specs(search)
    epochs = len(wanted) * search.config.finetune.epochs
    trials = run_trials(
        search.task,
        search.weights,
        wanted,
        resources=search.config.trials,
        storage=search.folder.path / "tune",
        on_progress=lambda done: search.progress("trials", done, epochs, "epochs"),
    )
    for trial in trials:
        if trial.status != "finished":
            told = f"{trial.digest} {trial.status}: {trial.reason}"
            search.events.emit("trials", "warning", told)
    search.worker_cpu_seconds += sum(trial.cpu_seconds for trial in trials)
    return TrialsArtefact(trials=trials)


def specs(search: Search) -> list[TrialSpec]:
    """Specify a trial for each distinct candidate, in the order of the candidates."""
    config = search.config
    found: dict[str, TrialSpec] = {}
    for candidate in search.candidates:
        space = search.channels if candidate.granularity == "channel" else search.space
        assert space is not None
        key = evaluation_key(
            Allocation.of(space, candidate.bits),
            weights_sha256=search.model.weights_sha256,
            split="search",
            quantizer=search.fixed_activations,
            fidelity=config.finetune.model_dump() | {"asha": config.trials.asha},
            seed=config.seed,
        )
        found[candidate.digest] = TrialSpec(
            digest=candidate.digest,
            bits=candidate.bits | search.fixed_activations,
            recipe=config.finetune.recipe(),
            seed=config.seed,
            folder=(search.folder.path / "trials" / key).resolve(),
        )
    return list(found.values())
