"""An evaluation: one allocation with its score, how it was scored, and what that cost."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hawq.allocation import Allocation
from search.folder import content_hash
from search.searched import Fidelity

__all__ = ["Evaluate", "Evaluation", "Fidelity", "evaluation_key"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One allocation, scored.

    Attributes:
        allocation: What was scored.
        score: Higher is better.
        fidelity: ``proxy``: −Ω, no forward pass. ``none``: quantized, not trained.
            ``batch_norm``: with batch-norm statistics estimated again. ``finetuned``.
        seed: Of whatever was random.
        seconds: What it took.
        status: Whether there is a score at all.
        reason: Why not; empty otherwise.
        bound: Under the same budget no allocation has a smaller Ω; None where that is not known.
        proposals: Proposals since the evaluation before, this one included: more than one where a
            search came back to what it had scored.
        spent: CPU seconds that the process which asked spent on it: next to none where the score
            was found on disk.
    """

    allocation: Allocation
    score: float
    fidelity: Fidelity
    seed: int = 0
    seconds: float = 0.0
    status: Literal["scored", "failed"] = "scored"
    reason: str = ""
    bound: float | None = None
    proposals: int = 1
    spent: float = 0.0


Evaluate = Callable[[Allocation], Evaluation]


def evaluation_key(
    allocation: Allocation,
    *,
    weights_sha256: str,
    split: str,
    quantizer: Mapping[str, Any],
    fidelity: Mapping[str, Any],
    seed: int,
) -> str:
    """Name an evaluation: equal keys have equal scores, so each is computed once.

    Args:
        allocation: What is scored.
        weights_sha256: Of the network before quantization.
        split: Where it is scored.
        quantizer: Everything about the quantizers but the allocation.
        fidelity: How it is trained before.
        seed: Of the training.
    """
    inputs = {
        "weights": weights_sha256,
        "split": split,
        "quantizer": dict(quantizer),
        "fidelity": dict(fidelity),
        "seed": seed,
    }
    return f"{allocation.digest}-{content_hash(inputs)[:8]}"
