"""How a network is trained."""

from typing import Literal

from pydantic import Field, model_validator

from hawq.finetune import Recipe
from search.config.section import Positive, Section, Share

__all__ = ["RecipeConfig"]


class RecipeConfig(Section):
    """How to train: SGD with Nesterov momentum, a warm-up, then a falling rate."""

    epochs: Positive = Field(10, description="Passes over the training split.")
    batch_size: Positive = Field(128, description="Examples a step.")
    lr: float = Field(0.02, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps with a rising rate.")
    schedule: Literal["cosine", "step"] = Field(
        "cosine", description="After the warm-up: cosine to zero, or step."
    )
    milestones: tuple[Share, ...] = Field(
        (0.5, 0.75), description="Of step: shares of the steps after which the rate falls."
    )
    step_factor: float = Field(
        0.1, gt=0, le=1, description="Of step: the rate is multiplied by it."
    )
    scale_lr: float = Field(
        1.0, ge=0, description="Rate of quantization scales, as multiple of lr."
    )
    freeze_batch_norm: Share = Field(
        0.6, description="Share of the epochs after which batch-norm statistics stay fixed."
    )
    reestimate_batch_norm: int = Field(
        0,
        ge=0,
        description="Training batches, without augmentation, on which batch-norm statistics are "
        "estimated again at the end; 0: not at all.",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="Length that a step's gradient is shortened to; null: as it is."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a running average of the weights, which is what is scored and kept; "
        "null: the last weights.",
    )
    distillation: Share = Field(
        0.0, description="Weight of imitating the unquantized network's outputs, in the loss."
    )
    temperature: float = Field(4.0, gt=0, description="Of both networks' outputs in distillation.")
    activations_first: float = Field(
        0.0, ge=0, lt=1, description="Share of the training with activations quantized alone."
    )
    staging: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="Share of the training within which blocks of layers are quantized one after "
        "the other, for the methods that do so.",
    )
    examples_per_epoch: Positive | None = Field(None, description="null: the whole split.")
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _consistent(self) -> "RecipeConfig":
        self.recipe()
        return self

    def recipe(self) -> Recipe:
        """Return the same as the training loop takes it."""
        return Recipe(**self.model_dump())
