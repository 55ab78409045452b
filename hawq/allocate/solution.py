"""An allocation within its budgets, and how much better another one could be at most."""

from collections.abc import Mapping
from dataclasses import dataclass

from hawq.allocation import Allocation

__all__ = ["Solution", "relative_gap"]


@dataclass(frozen=True, slots=True)
class Solution:
    """An allocation within its budgets.

    Attributes:
        allocation: The bits of every group.
        sensitivity: Its Ω.
        bound: No allocation within the budgets has a smaller Ω.
        costs: What the allocation costs, by the name of each budget.
        seconds: Wall time of finding it.
        loss_of_rules: Ω above what was found for the same budget without the rules that a layer's
            channels were asked to follow; 0 without rules.
    """

    allocation: Allocation
    sensitivity: float
    bound: float
    costs: Mapping[str, int]
    seconds: float
    loss_of_rules: float = 0.0

    @property
    def gap(self) -> float:
        """What Ω could still fall by, at most, as a part of it."""
        return relative_gap(self.sensitivity, self.bound)


def relative_gap(sensitivity: float, bound: float) -> float:
    """(Ω − bound) / |Ω|, 0 where the bound is met; 1 at least where they differ in sign."""
    if sensitivity <= bound:
        return 0.0
    return (sensitivity - bound) / max(abs(sensitivity), abs(bound))
