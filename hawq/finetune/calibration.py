"""Ranges of activations, from what a few batches send through the unquantized tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hawq.finetune.fake_quantizers import ActivationQuantizer
from hawq.space import evaluating

__all__ = ["calibrate", "sample_activations"]

# Looks at this many values a batch and tensor, spread evenly.
_CALIBRATION_VALUES = 1 << 15


@torch.no_grad()
def sample_activations(model: nn.Module, inputs: Iterable[Tensor]) -> dict[str, Tensor]:
    """Sample the values of every quantized activation, unquantized meanwhile, in eval mode.

    Args:
        model: With quantizers attached.
        inputs: Batches of the network's inputs, each of shape (N, …).

    Returns:
        By the tensor's name, shape (1, n), or (C, n) where its channels have their own bits. A
        tensor that nothing read is missing.
    """
    samples: dict[ActivationQuantizer, list[Tensor]] = {}
    num_batches = 0
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]

    def collect(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, ActivationQuantizer)
        seen = samples.setdefault(module, [])
        if len(seen) == num_batches:  # another reader of the same tensor
            return
        values = module.rows(args[0].detach())
        size = max(1, _CALIBRATION_VALUES // len(values))
        if values.shape[1] > size:
            # At random: a fixed stride would meet the same few columns of every image.
            generator = torch.Generator().manual_seed(0)
            picks = torch.randint(values.shape[1], (size,), generator=generator)
            values = values[:, picks.to(values.device)]
        seen.append(values.float())

    for quantizer in quantizers:
        quantizer.forget()
    handles = [quantizer.register_forward_pre_hook(collect) for quantizer in quantizers]
    try:
        with evaluating(model):
            for batch in inputs:
                num_batches += 1
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {quantizer.name: torch.cat(seen, 1) for quantizer, seen in samples.items()}


def calibrate(model: nn.Module, inputs: Iterable[Tensor]) -> None:
    """Set every activation range from batches of the network's inputs, each of shape (N, …).

    Layers see unquantized inputs meanwhile; the network runs in eval mode. A tensor that nothing
    read stays uncalibrated.
    """
    samples = sample_activations(model, inputs)
    for quantizer in model.modules():
        if isinstance(quantizer, ActivationQuantizer) and quantizer.name in samples:
            quantizer.calibrate(samples[quantizer.name])
