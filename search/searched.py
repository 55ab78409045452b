"""What searches that score what they try leave behind, as data."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AgreementArtefact",
    "AgreementPoint",
    "Fidelity",
    "HessianChoice",
    "ScoredAllocation",
    "SearchRecord",
    "SearchesArtefact",
]


Fidelity = Literal["proxy", "none", "batch_norm", "finetuned"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScoredAllocation(_Record):
    """One distinct allocation that a search scored."""

    digest: str
    score: float = Field(description="On the search split, in [0, 1]; of the proxy −Ω.")
    seconds: float = Field(description="Since the search began, its own work included.")
    weight_bits: int
    activation_bits: int | None = Field(description="null: activations are not searched.")
    sensitivity: float = Field(description="Ω.")


class SearchRecord(_Record):
    """One search: a method under a budget, with a seed."""

    method: str
    budget: str
    seed: int
    evaluations: list[ScoredAllocation] = Field(description="In the order of scoring.")
    num_starts: int = Field(0, description="The first of them that the Hessian's front gave.")
    episodes: int = Field(description="Proposals, repeated ones included.")
    cpu_seconds: float = Field(description="Of the search and its scores.")
    machine: str = Field("", description="On which it ended; empty: not kept.")
    failures: list[str] = Field([], description="Scores that failed once, with their reasons.")
    reason: str = Field("", description="Why it ended before its evaluations were spent.")
    bits: dict[str, int | list[int]] = Field(
        description="The best allocation, by layer and tensor; a list is of their channels."
    )
    fidelity: Fidelity = Field(description="How its allocations were scored.")
    inputs: str = Field(description="Hash of everything that the search depends on.")

    @property
    def best(self) -> ScoredAllocation:
        """The allocation of highest score, the first of equal ones."""
        return max(self.evaluations, key=lambda found: found.score)


class SearchesArtefact(_Record):
    """Every search of a run."""

    searches: list[SearchRecord]


class HessianChoice(_Record):
    """What a method chose that spends no evaluation; scored afterwards, to be compared."""

    method: str
    budget: str
    chosen: ScoredAllocation
    cpu_seconds: float = Field(description="Of the choice, without the curvature.")


class AgreementPoint(_Record):
    """One allocation, scored cheaply and after fine-tuning."""

    digest: str
    budget: str = Field("", description="Ranks are compared within it.")
    score: float
    finetuned: float = Field(description="On the test split, in [0, 1].")


class AgreementArtefact(_Record):
    """What scores are worth: the unquantized network's, the Hessian's choices', some trainings'."""

    num_examples: int = Field(description="That a score is the mean of.")
    unquantized: float = Field(description="Score of the network as it was, on these examples.")
    hessian: list[HessianChoice]
    points: list[AgreementPoint]
