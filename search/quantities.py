"""How quantities are written: one place decides digits and units."""

import math
from collections.abc import Sequence
from datetime import datetime

__all__ = [
    "count",
    "counted",
    "duration",
    "listed",
    "mib",
    "moment",
    "percent",
    "plus_minus",
    "points",
    "significant",
    "with_error",
]

_MINUS, _NO_BREAK = "−", "\u00a0"


def percent(score: float) -> str:
    """Write a score in [0, 1] in percent, without the sign: 0.9123 is ``91.23``."""
    return f"{100 * score:.2f}".replace("-", _MINUS)


def points(drop: float) -> str:
    """Write a difference of scores in percentage points, with its sign: 0.012 is ``+1.20``."""
    text = f"{100 * drop:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", _MINUS)


def plus_minus(value: str, error: float) -> str:
    """Join a written score or drop and its standard error, which is in [0, 1]."""
    return f"{value}{_NO_BREAK}±{_NO_BREAK}{percent(error)}"


def significant(value: float) -> str:
    """Write a number with three significant digits: ``0.0195``, ``1,230``, ``4.2e-7``."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    rounded = float(f"{value:.3g}")
    if not 1e-4 <= abs(rounded) < 1e6:
        mantissa, exponent = f"{rounded:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", _MINUS)
    decimals = max(0, 2 - math.floor(math.log10(abs(rounded))))
    return f"{rounded:,.{decimals}f}".replace("-", _MINUS)


def with_error(value: float, error: float) -> str:
    """Write a number as far as its standard error goes: ``6.14 ± 0.84``, ``1,230 ± 150``."""
    if not 0 < error < 1e6:
        return f"{significant(value)}{_NO_BREAK}±{_NO_BREAK}{significant(error)}"
    decimals = 1 - math.floor(math.log10(error))
    if decimals > 6:
        return f"{significant(value)}{_NO_BREAK}±{_NO_BREAK}{significant(error)}"
    shown = [f"{round(x, decimals):,.{max(0, decimals)}f}" for x in (value, error)]
    return f"{shown[0].replace('-', _MINUS)}{_NO_BREAK}±{_NO_BREAK}{shown[1]}"


def mib(bits: int) -> float:
    """Convert bits to MiB."""
    return bits / 8 / 2**20


def count(number: int) -> str:
    """Write a count with separators: ``270,896``."""
    return f"{number:,}"


def counted(number: int, noun: str) -> str:
    """Write a count of something: ``1 layer``, ``20 layers``."""
    return f"{count(number)} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Write a time as a person would say it: ``0.31 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 99.5:
        return f"{significant(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def moment(iso: str) -> str:
    """Write a time in ISO 8601 to the minute: ``2025-03-04 05:06 UTC``."""
    return datetime.fromisoformat(iso).strftime("%Y-%m-%d %H:%M %Z").strip()


def listed(names: Sequence[str]) -> str:
    """Join names: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])
