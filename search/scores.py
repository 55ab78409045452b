"""Scores without training, in little more than the forward passes that they are made of.

The network is quantized, batch-norm statistics are estimated again on a few training batches, and
the search split is scored. Everything that allocations share is prepared once; a score is kept in
``RUN/scores``, so equal allocations cost one evaluation, whichever process asks, before or after a
restart.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from hawq.allocation import Allocation
from hawq.finetune import reestimate
from hawq.finetune.batch_norm import has_statistics, statistics_batches
from hawq.finetune.requantized import Requantized
from hawq.quantizers import Schemes
from hawq.reads import Reads
from hawq.task import Batch, Task, at_once, moved, pooled_scores
from search.config import SearchConfig
from search.evaluate import Evaluation, evaluation_key
from search.folder import write_atomically
from search.spaces import fixed_bits
from search.tasks.checkpoint import read_state, state_sha256
from search.trials import calibration_inputs

__all__ = ["CheapScores", "ScoreSpec", "Scored", "score_spec"]


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """How allocations are scored: small, so that it can be sent to where they are.

    Attributes:
        task: Network and data.
        weights: File of the network's weights before quantization.
        folder: Where scores are kept; None keeps none.
        fixed: Bits of the activations that no allocation names.
        schemes: How weights and activations are quantized.
        fidelity: ``batch_norm`` estimates the statistics again, ``none`` does not.
        num_examples: First examples of the search split to score; None: all.
        batch_size: Examples that are scored at once.
        statistics_batches: Training batches that statistics come from.
        statistics_batch_size: Examples of each.
        seed: Draws those.
        device: Where.

    Raises:
        ValueError: If a number is too small.
    """

    task: Task
    weights: Path
    folder: Path | None = None
    fixed: Mapping[str, int] | None = None
    schemes: Schemes = field(default_factory=Schemes)
    fidelity: Literal["none", "batch_norm"] = "batch_norm"
    num_examples: int | None = None
    batch_size: int = 64
    statistics_batches: int = 4
    statistics_batch_size: int = 64
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in (
            ("num_examples", 2),
            ("batch_size", 1),
            ("statistics_batches", 1),
            ("statistics_batch_size", 2),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


def score_spec(
    config: SearchConfig,
    task: Task,
    reads: Reads,
    run: Path,
    *,
    num_examples: int | None = None,
    device: str = "cpu",
) -> ScoreSpec:
    """Say how the allocations of a run are scored, as its trials quantize them.

    Args:
        config: Of the run.
        task: Built from it.
        reads: Of its network.
        run: The run's folder, with the weights that it searches.
        num_examples: First examples of the search split; None: all.
        device: Where.

    Raises:
        ValueError: If a number makes no sense.
    """
    return ScoreSpec(
        task,
        (run / "model.safetensors").resolve(),
        folder=(run / "scores").resolve(),
        fixed=fixed_bits(config, reads),
        schemes=config.schemes,
        fidelity="batch_norm" if has_statistics(task.model()) else "none",
        num_examples=num_examples,
        statistics_batch_size=max(2, at_once(task, "train", 64)),
        seed=config.seed,
        device=device,
    )


@dataclass(frozen=True, slots=True)
class Scored:
    """An evaluation with what it is the mean of.

    Attributes:
        evaluation: The score.
        examples: Each example's, shape (N,), float32; empty where the evaluation failed.
    """

    evaluation: Evaluation
    examples: Tensor

    @property
    def standard_error(self) -> float:
        """Of the score, over the choice of examples.

        Raises:
            ValueError: If the evaluation failed.
        """
        if self.evaluation.status != "scored":
            raise ValueError(f"a score must be there to have an error: {self.evaluation.reason}")
        return float(self.examples.double().std()) / math.sqrt(len(self.examples))


class CheapScores:
    """Scores allocations one after the other. A plain class: it needs no cluster.

    A score is a function of the specification and the allocation alone, whatever was scored before.
    One that failed is not kept. The network is built when the first score is asked for that is not
    on disk.

    Args:
        spec: How.
    """

    def __init__(self, spec: ScoreSpec) -> None:
        self.spec = spec

    def __getstate__(self) -> dict[str, object]:
        return {"spec": self.spec}  # it travels without the network

    def __call__(self, allocation: Allocation) -> Evaluation:
        """Score an allocation, as a searcher asks for it."""
        return self.score(allocation).evaluation

    def score(self, allocation: Allocation) -> Scored:
        """Score an allocation, example by example.

        Raises:
            ValueError: If it names what the network does not have, or statistics are to be
                estimated of a network that has none.
        """
        path = (
            None if self.spec.folder is None else self.spec.folder / f"{self.key(allocation)}.json"
        )
        if path is not None and path.exists():
            return self._read(path, allocation)
        # What else the machine does is no cost of the score; a device's work is not the process's.
        clock = time.process_time if self.spec.device == "cpu" else time.perf_counter
        started = clock()
        examples = self._examples(allocation)
        scored = self._scored(allocation, examples, clock() - started)
        if path is not None and scored.evaluation.status == "scored":
            write_atomically(path, json.dumps(_document(scored), allow_nan=False))
        return scored

    def key(self, allocation: Allocation) -> str:
        """Name the evaluation of an allocation: equal keys have equal scores."""
        spec = self.spec
        fidelity: dict[str, object] = {
            "kind": spec.fidelity,
            "task": self._fingerprint,
            "examples": spec.num_examples,
            "batch_size": spec.batch_size,
            "ranges": "unquantized",
        }
        if spec.fidelity == "batch_norm":
            fidelity["statistics"] = [spec.statistics_batches, spec.statistics_batch_size]
        return evaluation_key(
            allocation,
            weights_sha256=self._weights_sha256,
            split="search",
            quantizer={"fixed": dict(spec.fixed or {}), "schemes": asdict(spec.schemes)},
            fidelity=fidelity,
            seed=spec.seed,
        )

    @torch.no_grad()
    def _examples(self, allocation: Allocation) -> Tensor:
        """Return the score of each example, shape (N,), float32, on the CPU."""
        bits = dict(zip(allocation.names, allocation.bits, strict=True))
        network = self._network
        network.quantize(bits | dict(self.spec.fixed or {}))
        if self.spec.fidelity == "batch_norm":
            reestimate(network.model, self._statistics_inputs)
        task = self.spec.task
        return pooled_scores(task, [task.scores(network.model, b) for b in self._batches])

    def _scored(self, allocation: Allocation, examples: Tensor, seconds: float) -> Scored:
        finite = bool(torch.isfinite(examples).all())
        evaluation = Evaluation(
            allocation,
            score=float(examples.double().mean()) if finite else -math.inf,
            fidelity=self.spec.fidelity,
            seed=self.spec.seed,
            seconds=seconds,
            status="scored" if finite else "failed",
            reason="" if finite else "the scores of some examples are not finite",
        )
        return Scored(evaluation, examples if finite else examples[:0])

    def _read(self, path: Path, allocation: Allocation) -> Scored:
        document = json.loads(path.read_text(encoding="utf-8"))
        examples = torch.tensor(document["examples"], dtype=torch.float32)
        return self._scored(allocation, examples, document["seconds"])

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return read_state(self.spec.weights)

    @cached_property
    def _weights_sha256(self) -> str:
        return state_sha256(self._state)

    @cached_property
    def _fingerprint(self) -> str:
        return self.spec.task.fingerprint

    @cached_property
    def _network(self) -> Requantized:
        spec = self.spec
        model: nn.Module = spec.task.model()
        model.load_state_dict(self._state)
        if spec.fidelity == "batch_norm" and not has_statistics(model):
            raise ValueError("fidelity must be none for a network without batch-norm statistics")
        return Requantized(
            model.to(spec.device).eval(),
            lambda: calibration_inputs(spec.task, spec.device),
            spec.schemes,
        )

    @cached_property
    def _batches(self) -> list[Batch]:
        """The examples that are scored, on the device."""
        return list(self._drawn())

    def _drawn(self) -> Iterator[Batch]:
        spec = self.spec
        size = spec.task.size("search")
        num = size if spec.num_examples is None else min(size, spec.num_examples)
        for indices in torch.arange(num).split(at_once(spec.task, "search", spec.batch_size)):
            yield moved(spec.task.batch("search", indices), spec.device)

    @cached_property
    def _statistics_inputs(self) -> list[Tensor]:
        spec = self.spec
        return list(
            statistics_batches(
                spec.task,
                spec.statistics_batches,
                spec.statistics_batch_size,
                spec.seed,
                spec.device,
            )
        )


def _document(scored: Scored) -> dict[str, object]:
    """Return what the file of a score holds; whole numbers are written short."""
    evaluation = scored.evaluation
    return {
        "digest": evaluation.allocation.digest,
        "score": evaluation.score,
        "fidelity": evaluation.fidelity,
        "seed": evaluation.seed,
        "seconds": evaluation.seconds,
        "examples": [int(x) if x == int(x) else x for x in scored.examples.tolist()],
    }
