"""What scores allocations for a search, and what becomes of a score that fails."""

import json
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import ray
from torch import Tensor

from hawq.allocation import Allocation
from hawq.finetune import Recipe
from search.evaluate import Evaluate, Evaluation, evaluation_key
from search.scorers import evaluated
from search.scores import ScoreSpec
from search.tasks.checkpoint import read_state, state_sha256
from search.trials import TrialSpec, read_trial, run_trial

__all__ = ["EvaluationFailedError", "Retried", "TrainedScores"]


class EvaluationFailedError(RuntimeError):
    """A score failed where it was asked for, and elsewhere again."""


class TrainedScores:
    """Scores allocations by a short fine-tuning, as HAQ does (Wang et al., 2019).

    A score is the last epoch's on the search split; of the training only its result is kept.

    Args:
        spec: Of what, and where.
        recipe: How to train.
    """

    def __init__(self, spec: ScoreSpec, recipe: Recipe) -> None:
        self.spec, self.recipe = spec, recipe

    def __getstate__(self) -> dict[str, object]:
        return {"spec": self.spec, "recipe": self.recipe}

    def __call__(self, allocation: Allocation) -> Evaluation:
        """Train and score, or find the result of that.

        Raises:
            ValueError: If there is no folder for results.
        """
        spec, recipe = self.spec, self.recipe
        if spec.folder is None:
            raise ValueError("a folder must be given for trainings, got None")
        key = evaluation_key(
            allocation,
            weights_sha256=state_sha256(self._state),
            split="search",
            quantizer={"fixed": dict(spec.fixed or {}), "schemes": asdict(spec.schemes)},
            fidelity={"kind": "finetuned", "task": spec.task.fingerprint, **asdict(recipe)},
            seed=spec.seed,
        )
        trial = TrialSpec(
            digest=allocation.digest,
            bits=dict(zip(allocation.names, allocation.bits, strict=True)) | dict(spec.fixed or {}),
            recipe=recipe,
            seed=spec.seed,
            folder=spec.folder / "finetuned" / key,
            schemes=spec.schemes,
        )
        found = read_trial(trial.folder)
        if found is None:
            found = run_trial(spec.task, self._state, trial, device=spec.device)
            for heavy in ("checkpoint.pt", "model.safetensors"):
                (trial.folder / heavy).unlink(missing_ok=True)
        return Evaluation(
            allocation,
            score=found.epochs[-1].search_score if found.status == "finished" else float("-inf"),
            fidelity="finetuned",
            seed=spec.seed,
            seconds=found.seconds,
            status="scored" if found.status == "finished" else "failed",
            reason=found.reason,
        )

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return read_state(self.spec.weights)


class Retried:
    """Asks again, in another process, where a score failed; then gives up.

    Args:
        evaluate: What scores.
        failures: File to which failures are added, a JSON object a line.
        cpus: Of the other process.
        gpus: Of the other process.
    """

    def __init__(
        self, evaluate: Evaluate, failures: Path, *, cpus: float = 1.0, gpus: float = 0.0
    ) -> None:
        self.evaluate, self.failures = evaluate, failures
        self.cpus, self.gpus = cpus, gpus

    def __call__(self, allocation: Allocation) -> Evaluation:
        """Score an allocation.

        Raises:
            EvaluationFailedError: If it cannot be scored, twice.
        """
        started = time.process_time()
        found = self._attempted(self.evaluate, allocation)
        if found.status == "failed":
            found = self._attempted(self._elsewhere, allocation)
        if found.status == "failed":
            raise EvaluationFailedError(
                f"allocation {allocation.digest} could not be scored, here or elsewhere: "
                f"{found.reason}"
            )
        return replace(found, spent=time.process_time() - started)

    def _attempted(self, evaluate: Evaluate, allocation: Allocation) -> Evaluation:
        try:
            found = evaluate(allocation)
        except Exception as error:
            cause = getattr(error, "cause", error)  # of a worker's, which carries its own trace
            lines = str(cause).strip().splitlines() or [""]
            reason = f"{type(cause).__name__}: {lines[-1]}"
            found = Evaluation(allocation, float("-inf"), "none", status="failed", reason=reason)
        if found.status == "failed":
            told = {"digest": allocation.digest, "bits": allocation.bits, "reason": found.reason}
            self.failures.parent.mkdir(parents=True, exist_ok=True)
            with self.failures.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")
        return found

    def _elsewhere(self, allocation: Allocation) -> Evaluation:
        if not ray.is_initialized():  # a search without a cluster has nowhere else
            return self.evaluate(allocation)
        remote = evaluated.options(
            name="search:score again", num_cpus=self.cpus, num_gpus=self.gpus
        )
        found: Evaluation = ray.get(remote.remote(self.evaluate, allocation, self.cpus))
        return found
