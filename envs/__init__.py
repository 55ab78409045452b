"""Decision processes over allocations, in Gymnasium's terms.

An environment here receives its evaluator and can only represent allocations within the budget.
``gymnasium.make`` knows them as ``ChannelRatios-v0`` and ``LayerBits-v0`` once this is imported.
"""

import gymnasium

from envs.channel_ratios import ChannelRatios, Ranked

__all__ = ["ChannelRatios", "Ranked"]

gymnasium.register("ChannelRatios-v0", entry_point="envs.channel_ratios:ChannelRatios")
