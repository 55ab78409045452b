"""How far Ω can be trusted: what is measured of it, and how well that agrees."""

from search.calibration.agreement import agreement, is_clear, mean_and_error
from search.calibration.interactions import Bits, Gained, interactions, key_of
from search.calibration.single_choices import spread

__all__ = [
    "Bits",
    "Gained",
    "agreement",
    "interactions",
    "is_clear",
    "key_of",
    "mean_and_error",
    "spread",
]
