"""Decision processes over allocations, in Gymnasium's terms.

An environment here receives its evaluator and can only represent allocations within the budget.
``gymnasium.make`` knows them as ``ChannelRatios-v0`` and ``LayerBits-v0`` once this is imported.
"""

import gymnasium

from envs.channel_ratios import ChannelRatios
from envs.layer_bits import LayerBits, layer_features
from envs.ranked import Ranked

__all__ = ["ChannelRatios", "LayerBits", "Ranked", "layer_features"]

gymnasium.register("ChannelRatios-v0", entry_point="envs.channel_ratios:ChannelRatios")
gymnasium.register("LayerBits-v0", entry_point="envs.layer_bits:LayerBits")
