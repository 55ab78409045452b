"""Learning rates: a linear warm-up, then a cosine (Loshchilov & Hutter, 2017) or steps.

Progress is the share of all steps that are done, so a recipe means the same for any number of them.
"""

import math
from collections.abc import Sequence

__all__ = ["cosine_rate", "step_rate"]


def cosine_rate(peak: float, progress: float, warmup: float) -> float:
    """Return the rate that rises to its peak and falls to zero as half a cosine.

    Args:
        peak: The largest rate.
        progress: Share of all steps done, 0..1.
        warmup: Share of them in which the rate rises from zero.
    """
    if progress < warmup:
        return peak * progress / warmup
    cosine = math.cos(math.pi * (progress - warmup) / (1 - warmup))
    return peak * (1 + cosine) / 2


def step_rate(
    peak: float, progress: float, warmup: float, milestones: Sequence[float], factor: float
) -> float:
    """Return the rate that rises to its peak and is multiplied by a factor at every milestone.

    Args:
        peak: The largest rate.
        progress: Share of all steps done, 0..1.
        warmup: Share of them in which the rate rises from zero.
        milestones: Shares of them, none within the warm-up.
        factor: By which the rate changes at each.
    """
    if progress < warmup:
        return peak * progress / warmup
    return peak * factor ** sum(progress >= milestone for milestone in milestones)
