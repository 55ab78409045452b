"""Layers quantized one after the other while training goes on.

HAWQ (Dong et al., 2019) quantizes and fine-tunes block by block, in the order of
Ω_i = λ_i ‖Q(W_i) − W_i‖², largest first: what hurts most comes while the rest of the network,
still in floating point, can make up for it. A block's turn is a point of the training, not a
training of its own, so every order costs the same number of steps. Activations are quantized from
the start: the paper gives an order of weights alone. With ``activations_first`` no weight is
quantized for a share of the training.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.utils import parametrize

from hawq.finetune.fake_quantizers import WeightQuantizer
from hawq.space import sharing_layers

__all__ = ["Staging"]


class Staging:
    """Switches the weights' quantizers on when their turn comes.

    A quantizer's range is fitted to the weight of that moment. What is on depends on the progress
    alone, so that a training resumes anywhere.

    Args:
        model: With quantizers attached.
        order: Names of layers, block by block; what is not named comes with the first block. Empty:
            all at once.
        activations_first: Share of the training before the first block.
        until: Share of the training within which the blocks' turns are spread evenly.

    Raises:
        ValueError: If ``order`` names what has no quantizer, or twice, or the shares leave nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        order: Sequence[Sequence[str]],
        *,
        activations_first: float = 0.0,
        until: float = 0.5,
    ) -> None:
        if not (0 <= activations_first < 1 and 0 <= until < 1 and activations_first + until < 1):
            raise ValueError(
                "activations_first and staging must leave a part of the training, "
                f"got {activations_first:g} and {until:g}"
            )
        layers = {
            name: sharers[0]
            for name, sharers in sharing_layers(model).items()
            if parametrize.is_parametrized(sharers[0], "weight")
        }
        named = [name for block in order for name in block]
        unknown = sorted(set(named) - set(layers))
        if unknown or len(set(named)) < len(named):
            raise ValueError(
                f"order must name each quantized layer once at most, got {unknown[:5] or named}"
            )
        turn = {name: k for k, block in enumerate(order) for name in block}
        self._starts = [
            (activations_first + until * turn.get(name, 0) / max(1, len(order)), *_of(layer))
            for name, layer in layers.items()
        ]

    @property
    def is_complete(self) -> bool:
        """Whether every weight is quantized by now."""
        return all(quantizer.active for _, quantizer, _ in self._starts)

    def advance(self, previous: float, progress: float) -> None:
        """Switch on what begins after ``previous`` and not after ``progress``, shares of all steps.

        Args:
            previous: Where the last step was; below zero before the first.
            progress: Where the next step is.
        """
        for start, quantizer, weight in self._starts:
            quantizer.active = start <= progress
            if previous < start <= progress and start > 0:
                quantizer.start(weight)


def _of(layer: nn.Module) -> tuple[WeightQuantizer, Tensor]:
    parametrizations = layer.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    chain = parametrizations["weight"]
    assert isinstance(chain, parametrize.ParametrizationList)
    quantizer = chain[0]
    assert isinstance(quantizer, WeightQuantizer)
    return quantizer, chain.original
