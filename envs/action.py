"""An action as an environment takes it."""

from math import isnan

__all__ = ["fraction"]


def fraction(action: float) -> float:
    """Return an action within 0..1.

    Raises:
        ValueError: If it is no number.
    """
    value = float(action)
    if isnan(value):
        raise ValueError("action must be a number in 0..1, got nan")
    # What an agent computed to be the end of the box may be a rounding error outside it.
    return min(max(value, 0.0), 1.0)
