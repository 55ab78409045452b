"""Quantization-aware fine-tuning: fake quantizers that attach and detach, and the training loop."""

from hawq.finetune.attachment import attach, detach, fixed_activations, zeroed_layers
from hawq.finetune.averaging import WeightAverage
from hawq.finetune.batch_norm import reestimate
from hawq.finetune.calibration import calibrate, sample_activations
from hawq.finetune.fake_quantizers import ActivationQuantizer, WeightQuantizer
from hawq.finetune.folding import fold_batch_norm
from hawq.finetune.recipe import Recipe
from hawq.finetune.training import DivergedError, evaluate, make_optimizer, train_epoch

__all__ = [
    "ActivationQuantizer",
    "DivergedError",
    "Recipe",
    "WeightAverage",
    "WeightQuantizer",
    "attach",
    "calibrate",
    "detach",
    "evaluate",
    "fixed_activations",
    "fold_batch_norm",
    "make_optimizer",
    "reestimate",
    "sample_activations",
    "train_epoch",
    "zeroed_layers",
]
