"""How a comparison puts several things into one sentence."""

from collections.abc import Callable, Mapping, Sequence

from search.comparison.statistics import Interval
from search.quantities import listed, significant

__all__ = ["few", "sides", "spread"]


def spread(values: Sequence[float], written: Callable[[float], str] = significant) -> str:
    """Write the range of numbers: ``214``, ``214 to 12,300``."""
    low, high = written(min(values)), written(max(values))
    return low if low == high else f"{low} to {high}"


def few(number: float) -> str:
    """Write a median of counts: ``12``, ``12.5``."""
    return f"{number:,.1f}".removesuffix(".0")


def sides(leads: Mapping[str, Interval], written: Callable[[Interval], str]) -> list[str]:
    """Say who is above something, who cannot be told apart from it, and who is below.

    Args:
        leads: How far each is above it.
        written: Writes a lead that is not inside the error.
    """

    def shown(sign: int) -> str:
        mine = sorted((n for n in leads if leads[n].sign == sign), key=lambda n: -leads[n].value)
        return listed([f"{name} ({written(leads[name])})" if sign else name for name in mine])

    words = {1: "above it", 0: "not told apart from it", -1: "below it"}
    return [f"{said} {names}" for sign, said in words.items() if (names := shown(sign))]
