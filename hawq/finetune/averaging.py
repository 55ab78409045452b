"""A running average of a network's weights, which is often better than the last of them.

With decay d the average after t steps is Σ_i (1 − d) dᵗ⁻ⁱ x_i / (1 − dᵗ), i = 1 … t: the
exponential moving average (Polyak & Juditsky, 1992) with the correction for its start (Kingma & Ba,
2015). It is a mean of the weights that training has passed, after one step as after a million: a
training of fewer than 1/(1 − d) steps gets nearly the plain mean of them all.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hawq.finetune.batch_norm import BatchNorm

__all__ = ["WeightAverage"]

_STATISTICS = ("running_mean", "running_var")


class WeightAverage:
    """The average of a network's weights, biases, scales and batch-norm statistics.

    Whatever else its state holds (zero points, counters) is the latest.

    Args:
        model: Whose state is averaged.
        decay: d, between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_steps = 0
        self._tensors = {name: value.clone() for name, value in _state(model).items()}
        self._averaged = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, BatchNorm):
                self._averaged |= {f"{name}.{key}".lstrip(".") for key in _STATISTICS}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights after one more step in."""
        self.num_steps += 1
        share = (1 - self.decay) / (1 - self.decay**self.num_steps)
        for name, value in self._matched(model):
            if name in self._averaged:
                self._tensors[name].lerp_(value, share)
            else:
                self._tensors[name].copy_(value)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Give a network the average for its weights; before any step it keeps its own."""
        if self.num_steps:
            for name, value in self._matched(model):
                value.copy_(self._tensors[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let a network have the average, and its own weights again afterwards, bit for bit."""
        own = {name: value.clone() for name, value in _state(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in self._matched(model):
                    value.copy_(own[name])

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Go on from a network's tensors as the average, once there is one."""
        if self.num_steps:
            for name, value in self._matched(model):
                self._tensors[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"num_steps": self.num_steps, "tensors": dict(self._tensors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.num_steps = state["num_steps"]
        for name, tensor in self._tensors.items():
            tensor.copy_(state["tensors"][name])

    def _matched(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        found = _state(model)
        odd = sorted(found.keys() ^ self._tensors.keys())
        if odd:
            raise ValueError(f"the network must keep its tensors while averaged, got {odd[:5]}")
        return list(found.items())


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {n: value for n, value in model.state_dict().items() if isinstance(value, Tensor)}
