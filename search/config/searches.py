"""How agents and samplers search, and how searches are compared."""

from typing import Literal

from pydantic import Field, model_validator

from search.config.recipe import RecipeConfig
from search.config.section import Positive, Section

__all__ = ["ComparisonConfig", "SearchesConfig"]


class SearchesConfig(Section):
    """Agents, samplers and hill climbing: what they may spend, and what scores an allocation."""

    evaluations: Positive = Field(200, description="Distinct allocations that each may score.")
    score: Literal["quantized", "finetuned", "proxy"] = Field(
        "quantized",
        description="quantized: batch-norm statistics estimated again, no training; finetuned: "
        "after the training below; proxy: -Omega, no forward pass.",
    )
    examples: int | None = Field(
        None, ge=2, description="First examples of the search split to score; null: all."
    )
    finetune: RecipeConfig | None = Field(
        None, description="Of score: finetuned; short, for each evaluation is one."
    )
    ranking: Literal["omega_gain", "trace"] = Field(
        "omega_gain",
        description="Order of the channels: by what Omega falls by for a bit, or by average trace.",
    )
    unit: Literal["channels", "weights"] = Field(
        "channels", description="What ratios are of: channels, or their weights."
    )
    scope: Literal["network", "layer"] = Field(
        "network", description="One ratio of a width for the whole network, or one a layer."
    )
    runners: int = Field(
        0,
        ge=0,
        description="Processes that score for one search; 0: its own. Another number is another "
        "search.",
    )
    cpus: float = Field(1, gt=0, description="CPUs (and threads) of what scores.")
    gpus: float = Field(0, ge=0, description="GPUs of what scores.")

    @model_validator(mode="after")
    def _consistent(self) -> "SearchesConfig":
        if (self.score == "finetuned") != (self.finetune is not None):
            raise ValueError(
                "finetune must be given with score: finetuned, and with it alone, "
                f"got score: {self.score}"
            )
        if self.finetune is not None and self.examples is not None:
            raise ValueError("examples must be null with score: finetuned, which scores all")
        return self


class ComparisonConfig(Section):
    """Several searches of each method, and what their scores are worth."""

    seeds: Positive = Field(
        10, description="Searches of each method; below 10 nothing is claimed about searches."
    )
    agreement: int = Field(
        12,
        ge=0,
        description="Allocations, of all scores, to fine-tune as well: whether scores rank as "
        "training does. 0: none, and no verdict from scores.",
    )
    agreement_epochs: Positive = Field(1, description="Epochs of these.")
