"""What a comparison leaves behind, as data: ``comparison.json``."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from search.evaluate import Fidelity

__all__ = [
    "AgreementPoint",
    "ComparisonDocument",
    "Finalist",
    "HessianChoice",
    "ScoredAllocation",
    "SearchRecord",
]


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
    failures: list[str] = Field([], description="Scores that failed once, with their reasons.")
    reason: str = Field("", description="Why it ended before its evaluations were spent.")
    bits: dict[str, int] = Field(description="The best allocation.")

    @property
    def best(self) -> ScoredAllocation:
        """The allocation of highest score, the first of equal ones."""
        return max(self.evaluations, key=lambda found: found.score)


class HessianChoice(_Record):
    """What a method chose that spends no evaluation; scored afterwards, to be compared."""

    method: str
    budget: str
    chosen: ScoredAllocation
    cpu_seconds: float = Field(description="Of the choice, without the curvature.")


class AgreementPoint(_Record):
    """One allocation, scored cheaply and after fine-tuning."""

    digest: str
    score: float
    finetuned: float = Field(description="On the test split, in [0, 1].")


class Finalist(_Record):
    """A method's best, fine-tuned and tested."""

    method: str
    budget: str
    digest: str
    search_seed: int | None = Field(description="Of the search that found it; null: no search.")
    score: float = Field(description="On the test split, mean over seeds of the training.")
    standard_error: float = Field(description="Over images × seeds.")
    by_seed: list[float]


class ComparisonDocument(_Record):
    """A whole comparison."""

    schema_version: Literal[1] = 1
    name: str
    finished: str = Field(description="UTC, ISO 8601.")
    machine: dict[str, str]
    versions: dict[str, str]
    config: dict[str, Any]
    fidelity: Fidelity
    num_examples: int = Field(description="That a score is the mean of.")
    unquantized: float = Field(description="Score of the network as it was, on the same examples.")
    search_seen: bool = Field(description="Whether the network was trained on those examples.")
    curvature_core_seconds: float = Field(description="What every Hessian method shares.")
    searches: list[SearchRecord]
    hessian: list[HessianChoice]
    agreement: list[AgreementPoint]
    finalists: list[Finalist]
    verdict: list[str] = Field([], description="What follows, in plain language.")
