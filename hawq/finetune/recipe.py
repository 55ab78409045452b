"""What a training does, as data: every candidate of a comparison has the same."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from hawq.finetune.schedule import cosine_rate, step_rate

__all__ = ["Recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: Passes over the training split.
        batch_size: Examples a step.
        lr: Peak learning rate of SGD with Nesterov momentum.
        momentum: Of SGD.
        weight_decay: Of weights; scales, biases and batch-norm have none.
        warmup: Share of all steps in which the rate rises from zero.
        schedule: After the warm-up: ``"cosine"`` to zero, or ``"step"``.
        milestones: Of ``"step"``: shares of all steps after which the rate is multiplied.
        step_factor: By this.
        scale_lr: Learning rate of quantization scales as a multiple of ``lr``.
        freeze_batch_norm: Share of the epochs after which batch-norm's statistics stay fixed;
            low-bit networks oscillate otherwise. 0: from the start.
        reestimate_batch_norm: Training batches on which the statistics are estimated again at the
            end, with the final weights; 0: not at all.
        clip_norm: Length to which a step's gradient, of all parameters together, is shortened:
            detectors' is long where few boxes are in a batch. None: it stays as it is.
        ema: Decay of a running average of weights, biases, scales and batch-norm statistics; it
            is what is scored and kept. None: no average.
        distillation: Weight, 0..1, of the divergence from the unquantized network's outputs in the
            loss (Hinton et al., 2015): (1 − α) · loss + α · T² · divergence.
        temperature: T: of both networks' outputs in the divergence.
        activations_first: Share of the training in which activations alone are quantized.
        staging: Share of the training within which blocks of layers are quantized one after the
            other, where a candidate says in which order.
        examples_per_epoch: Examples drawn an epoch; None takes the whole split.
        precision: ``"bf16"`` runs forward passes in bfloat16 where torch's autocast would.

    Raises:
        ValueError: If a number is outside its range.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: float = 0.05
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    step_factor: float = 0.1
    scale_lr: float = 1.0
    freeze_batch_norm: float = 0.6
    reestimate_batch_norm: int = 0
    clip_norm: float | None = None
    ema: float | None = None
    distillation: float = 0.0
    temperature: float = 4.0
    activations_first: float = 0.0
    staging: float = 0.5
    examples_per_epoch: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("epochs", self.epochs >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", self.lr > 0, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "within 0..1, below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("warmup", 0 <= self.warmup < 1, "within 0..1, below 1"),
            ("schedule", self.schedule in {"cosine", "step"}, "'cosine' or 'step'"),
            ("step_factor", 0 < self.step_factor <= 1, "above 0, at most 1"),
            ("scale_lr", self.scale_lr >= 0, "0 or more"),
            ("freeze_batch_norm", 0 <= self.freeze_batch_norm <= 1, "within 0..1"),
            ("reestimate_batch_norm", self.reestimate_batch_norm >= 0, "0 or more batches"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "above 0, or null"),
            ("ema", self.ema is None or 0 < self.ema < 1, "between 0 and 1, or null"),
            ("distillation", 0 <= self.distillation <= 1, "within 0..1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("activations_first", 0 <= self.activations_first < 1, "within 0..1, below 1"),
            ("staging", 0 <= self.staging < 1 - self.activations_first, "below what is left of 1"),
            ("precision", self.precision in {"fp32", "bf16"}, "'fp32' or 'bf16'"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {rule}, got {getattr(self, name)!r}")
        places = (self.warmup, *self.milestones, 1.0)
        rising = all(a < b for a, b in pairwise(places[1:])) and places[0] <= places[1]
        if self.schedule == "step" and (not rising or not self.milestones):
            raise ValueError(
                "milestones must be shares of the steps that increase, from warmup "
                f"({self.warmup:g}) to below 1, got {list(self.milestones)}"
            )
        if self.examples_per_epoch is not None and self.examples_per_epoch < self.batch_size:
            raise ValueError(
                f"examples_per_epoch must be at least batch_size ({self.batch_size}), "
                f"got {self.examples_per_epoch}"
            )

    def steps_per_epoch(self, size: int) -> int:
        """Whole batches an epoch takes from a split of ``size`` examples.

        Raises:
            ValueError: If the split is smaller than a batch: the rate is meant for whole ones.
        """
        if size < self.batch_size:
            raise ValueError(
                f"batch_size must be at most {size}, the examples of the training split, "
                f"got {self.batch_size}"
            )
        return min(size, self.examples_per_epoch or size) // self.batch_size

    def rate(self, progress: float) -> float:
        """Learning rate after a share of all steps."""
        if self.schedule == "step":
            return step_rate(
                self.lr, progress, self.warmup, self.milestones, factor=self.step_factor
            )
        return cosine_rate(self.lr, progress, self.warmup)
