"""What Tune, TensorBoard and MLflow are told of a trial."""

from dataclasses import asdict
from typing import Any

from search.artefacts import EpochRecord
from search.trials.specification import TrialSpec

__all__ = ["description", "metrics"]


def description(spec: TrialSpec) -> dict[str, Any]:
    """Say what a trial is: its parameters."""
    return {"digest": spec.digest, "seed": spec.seed} | asdict(spec.recipe)


def metrics(spec: TrialSpec, record: EpochRecord) -> dict[str, float]:
    """Say what an epoch came to."""
    recipe = spec.recipe
    found = {"epoch": record.epoch + 1, "search_score": record.search_score}
    # Tune counts the reports of one process; TensorBoard's and MLflow's steps go by this instead.
    found["timesteps_total"] = record.epoch + 1
    if spec.stored_bits is not None:
        found["stored_bits"] = spec.stored_bits
    if record.loss is not None:
        found |= {"loss": record.loss, "lr": recipe.rate((record.epoch - 0.5) / recipe.epochs)}
    return found
