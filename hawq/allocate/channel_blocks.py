"""Channels in blocks, so that the number of a layer's channels at each width suits the hardware."""

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.hull import reduced_costs
from hawq.allocate.remainder import Choice

__all__ = ["channel_blocks"]


def channel_blocks(
    sensitivity: NDArray[np.float64],
    cost: NDArray[np.int64],
    choice: Choice,
    price: float,
    *,
    layers: NDArray[np.int64],
    multiple: int,
) -> NDArray[np.int64]:
    """Cut each layer's channels into blocks that are to share a width, the like with the like.

    Channels are ordered by what a choice without the rule gives them, then by how near they are to
    more and how far from less, at the price λ. Where Ω of a layer's channels differs by a factor
    alone, the best counts that are multiples are found among such blocks.

    Args:
        sensitivity: Ω of channel r at option b, shape (R, B), infinite where barred.
        cost: Cost of the same, shape (R, B).
        choice: What the channels receive without the rule.
        price: λ of that choice.
        layers: The layer of each channel, shape (R,).
        multiple: Channels of a block; a layer's last block is smaller where its number of
            channels is no multiple.

    Returns:
        The block of each channel, shape (R,), in 0…; blocks are ordered by layer.
    """
    every = np.arange(len(cost))
    taken = cost[every, choice.options]
    dearer = reduced_costs(sensitivity, cost, choice.options, price)
    down = np.where(cost < taken[:, None], dearer, np.inf).min(1)
    up = np.where(cost > taken[:, None], dearer, np.inf).min(1)
    wants = np.where(np.isinf(down), 0, down) - np.where(np.isinf(up), 0, up)
    order = np.lexsort((-wants, -taken, layers))
    first = np.searchsorted(layers[order], layers[order])  # of the same layer
    starts = (every - first) % multiple == 0
    blocks = np.empty_like(every)
    blocks[order] = np.cumsum(starts) - 1
    return blocks
