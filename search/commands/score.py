"""``hawq allocate --score``: what an allocation does to the network, measured without training."""

from pathlib import Path

from hawq.allocation import Allocation
from search.artefacts import Candidate, ModelArtefact
from search.config_file import load_config
from search.errors import InputError
from search.folder import RunFolder
from search.scores import CheapScores, Scored, ScoreSpec
from search.scores import score_spec as configured
from search.spaces import reads_of
from search.tables import Tables
from search.tasks.build import build_task

__all__ = ["score_candidate", "score_spec", "score_view"]


def score_spec(run: Path, *, num_examples: int | None = None, device: str = "cpu") -> ScoreSpec:
    """Say how the allocations of a finished run are scored.

    Args:
        run: The run's folder, with the weights that it searched.
        num_examples: First images of the search split; None: all.
        device: Where.

    Raises:
        InputError: If the folder has no weights yet, or a number makes no sense.
    """
    weights = run / "model.safetensors"
    if not weights.is_file():
        raise InputError(f"{run}: must hold the weights to score, got no {weights.name} in it")
    config = load_config(run / "config.yaml")
    task = build_task(config.task, config.seed)
    try:
        return configured(
            config,
            task,
            reads_of(config, task, task.model()),
            run,
            num_examples=num_examples,
            device=device,
        )
    except ValueError as error:
        raise InputError(f"--score: {error}") from error


def score_candidate(spec: ScoreSpec, found: Candidate, tables: Tables) -> Scored:
    """Score what was chosen, or find its score."""
    return CheapScores(spec).score(Allocation.of(tables.space, found.bits))


def score_view(run: Path, scored: Scored) -> str:
    """Say a score in a line, with how it came about."""
    evaluation = scored.evaluation
    if evaluation.status != "scored":
        return f"measured     nothing: {evaluation.reason}"
    model = RunFolder(run).load("model", ModelArtefact)[0]
    how = (
        "batch-norm statistics estimated again"
        if evaluation.fidelity == "batch_norm"
        else "nothing estimated again"
    )
    whole = "" if len(scored.examples) == model.search_size else f", on all {model.search_size:,}"
    seen = ", on which the network was trained: it only ranks" if model.search_seen else ""
    return (
        f"measured     {model.score_name} {100 * evaluation.score:.2f} ± "
        f"{100 * scored.standard_error:.2f} % without training, {how}, on "
        f"{len(scored.examples):,} examples of the search split{seen} "
        f"(unquantized {100 * model.search_score:.2f} %{whole}), in {evaluation.seconds:.2g} s"
    )
