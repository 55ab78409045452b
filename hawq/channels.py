"""Where a weight has its channels: what receives a scale, and perhaps bits, of its own.

A channel is an output channel. Convolutions, linear layers and embeddings (whose rows are the
channels) keep theirs first, shape (C, …). A transposed convolution keeps its inputs first and the
outputs of one group second, shape (I, O / groups, …); what is searched, scaled and packed is its
weight with the O output channels first, shape (O, I / groups, …), as of any other convolution.
"""

from torch import Tensor, nn

__all__ = ["TransposedConvolution", "channels_first", "num_channels", "transposed_groups"]

TransposedConvolution = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def transposed_groups(layer: nn.Module) -> int:
    """Return the groups of a transposed convolution, at least 1; 0 for any other layer."""
    return layer.groups if isinstance(layer, TransposedConvolution) else 0


def num_channels(layer: nn.Module) -> int:
    """Return the channels of a layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    groups = transposed_groups(layer)
    return groups * weight.shape[1] if groups else len(weight)


def channels_first(weight: Tensor, groups: int) -> Tensor:
    """Move the output channels of a weight to the front, or back: it is its own inverse.

    Args:
        weight: As its layer keeps it, shape (I, O / groups, …), or channels first.
        groups: Of a transposed convolution; 0 for a weight whose channels come first anyway.
    """
    if groups == 0:
        return weight
    by_group: Tensor = weight.unflatten(0, (groups, -1))
    return by_group.transpose(1, 2).flatten(0, 1)
