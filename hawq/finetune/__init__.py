"""Quantization-aware fine-tuning: fake quantizers that attach and detach, and the training loop."""

from hawq.finetune.quantized import (
    attach,
    calibrate,
    detach,
    fixed_activations,
    sample_activations,
)
from hawq.finetune.training import DivergedError, Recipe, evaluate, make_optimizer, train_epoch

__all__ = [
    "DivergedError",
    "Recipe",
    "attach",
    "calibrate",
    "detach",
    "evaluate",
    "fixed_activations",
    "make_optimizer",
    "sample_activations",
    "train_epoch",
]
