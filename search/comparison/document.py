"""What a comparison leaves behind, as data: ``comparison.json``."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from search.evaluate import Fidelity
from search.searched import AgreementPoint, HessianChoice, ScoredAllocation, SearchRecord

__all__ = [
    "AgreementPoint",
    "ComparisonDocument",
    "Finalist",
    "FinalistDifference",
    "HessianChoice",
    "ScoredAllocation",
    "SearchRecord",
]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Finalist(_Record):
    """A method's best, fine-tuned and tested."""

    method: str
    budget: str
    digest: str
    search_seed: int | None = Field(description="Of the search that found it; null: no search.")
    score: float = Field(description="On the test split, mean over seeds of the training.")
    standard_error: float = Field(description="Over images × seeds.")
    by_seed: list[float]


class FinalistDifference(_Record):
    """Two finalists of one budget on the same test examples and training seeds."""

    budget: str
    first: str = Field(description="Method.")
    second: str
    difference: float = Field(description="Score of the first minus score of the second.")
    low: float = Field(description="End of the 95 % interval, bootstrapped over images × seeds.")
    high: float
    num_seeds: int = Field(description="Of the training, that both have; 1: over images alone.")


class ComparisonDocument(_Record):
    """A whole comparison."""

    schema_version: Literal[1] = 1
    name: str
    finished: str = Field(description="UTC, ISO 8601.")
    machine: dict[str, str]
    versions: dict[str, str]
    config: dict[str, Any]
    score_name: str = Field("accuracy", description="What scores and tests measure.")
    fidelity: Fidelity
    num_examples: int = Field(description="That a score is the mean of.")
    unquantized: float = Field(description="Score of the network as it was, on the same examples.")
    search_seen: bool = Field(description="Whether the network was trained on those examples.")
    curvature_core_seconds: float = Field(description="What every Hessian method shares.")
    searches: list[SearchRecord]
    hessian: list[HessianChoice]
    agreement: list[AgreementPoint]
    finalists: list[Finalist] = Field(description="One a method and budget.")
    differences: list[FinalistDifference] = Field([], description="Of every two of a budget, once.")
    verdict: list[str] = Field([], description="What follows, in plain language.")
