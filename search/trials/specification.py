"""What a trial's result depends on, and the network that it trains."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hawq.finetune import Recipe, attach
from hawq.quantizers import Schemes
from hawq.task import Task, at_once, moved

__all__ = ["TrialSpec", "calibration_inputs", "num_calibration_batches", "quantized_model"]

_CALIBRATION_EXAMPLES = 1024
_CALIBRATION_BATCH = 256


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """What a trial's result depends on, and where it is kept.

    Attributes:
        digest: Of the allocation.
        bits: Of every weight and activation that is quantized, by group: ``w:LAYER``,
            ``a:LAYER#i``, or their channels.
        recipe: How to train; the same for all trials of a comparison.
        seed: Of the training; the same for all.
        folder: Where the checkpoint and the result are.
        order: Layers in the order in which their weights are quantized, block by block; empty
            quantizes all from the start.
        schemes: How weights and activations become codes; None as ``attach`` has it.
        stored_bits: Size of the weights with scales and channels' widths, to be told with scores.
    """

    digest: str
    bits: Mapping[str, int]
    recipe: Recipe
    seed: int
    folder: Path
    order: tuple[tuple[str, ...], ...] = ()
    schemes: Schemes | None = None
    stored_bits: int | None = None


def quantized_model(task: Task, state: Mapping[str, Tensor], spec: TrialSpec) -> nn.Module:
    """Build the network with its quantizers attached, ranges not yet calibrated.

    Args:
        task: Builds the network.
        state: Its weights before quantization.
        spec: The bits.
    """
    model = task.model()
    model.load_state_dict(state)
    example = task.inputs(task.batch("train", torch.arange(min(2, task.size("train")))))
    attach(model, spec.bits, example, spec.schemes)
    return model


def num_calibration_batches(task: Task) -> int:
    """Count the batches of ``calibration_inputs``."""
    size = min(_CALIBRATION_EXAMPLES, task.size("train"))
    return math.ceil(size / at_once(task, "train", _CALIBRATION_BATCH))


def calibration_inputs(task: Task, device: str) -> Iterator[Tensor]:
    """Return the batches that activation ranges come from, for trials and for Ω alike."""
    size = min(_CALIBRATION_EXAMPLES, task.size("train"))
    for part in torch.arange(size).split(at_once(task, "train", _CALIBRATION_BATCH)):
        yield task.inputs(moved(task.batch("train", part), device))
