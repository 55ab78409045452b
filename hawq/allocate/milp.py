"""Several budgets at once, solved exactly: HAWQ-V3's integer programme (Yao et al., 2021).

Size, bit operations, activation memory (its sum or its peak) and latency, any of them together.
The solver is HiGHS, through scipy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.front import merge_ties
from hawq.allocate.programme import Limit, Programme
from hawq.allocate.solution import Solution
from hawq.allocation import Allocation
from hawq.cost import Cost
from hawq.space import Space

__all__ = ["Budget", "InfeasibleBudgetsError", "Verdict", "milp_solution"]


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """The most that an allocation may cost.

    Attributes:
        cost: What is limited.
        limit: The limit, in the unit of the cost's name.
    """

    cost: Cost
    limit: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why a budget could not be met.

    Attributes:
        name: Of its cost.
        limit: What was asked.
        least: The least that this cost can be at all; None where it was not found in time.
        nearest: The least that it can be within all the other budgets; None where no allocation
            is within those, or it was not found in time.
    """

    name: str
    limit: int
    least: int | None
    nearest: int | None

    @property
    def is_feasible_alone(self) -> bool:
        """Whether some allocation is within this budget."""
        return self.least is not None and self.least <= self.limit

    def __str__(self) -> str:
        text = f"{self.name} ≤ {self.limit}"
        if self.least is None:
            return f"{text} (its least value was not found in time)"
        if not self.is_feasible_alone:
            return f"{text} is too small even alone: at least {self.least}"
        if self.nearest is None:
            return f"{text} can be met alone (least {self.least})"
        return f"{text} can be met alone (least {self.least}), with the others {self.nearest}"


class InfeasibleBudgetsError(ValueError):
    """No allocation is within all budgets.

    Attributes:
        verdicts: What is wrong with each budget, in the order given.
    """

    def __init__(self, verdicts: Sequence[Verdict]) -> None:
        super().__init__(f"no allocation is within all budgets: {'; '.join(map(str, verdicts))}")
        self.verdicts = tuple(verdicts)


def milp_solution(
    space: Space,
    sensitivity: NDArray[np.float64],
    budgets: Sequence[Budget],
    *,
    max_gap: float = 0.0,
    max_seconds: float = inf,
) -> Solution:
    """Find the allocation of least Ω within several budgets.

    Args:
        space: What may be chosen; menus, pins and ties are respected. Weights and activations
            that receive bits together are groups of one space.
        sensitivity: Ω of group l at width b, shape (L, B).
        budgets: At least one, with costs of different names.
        max_gap: Stop when Ω is proved to be within this part of the optimum. With 0, it is
            optimal up to the solver's arithmetic, about 1e-9 of Ω.
        max_seconds: Stop after this long; the gap is then what it is.

    Raises:
        InfeasibleBudgetsError: If no allocation is within all budgets.
        TimeoutError: If none was found in time.
        ValueError: If a table's shape or values are wrong.
    """
    names = [budget.cost.name for budget in budgets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"budgets must be at least one, of different costs, got {names}")
    for budget in budgets:
        if budget.cost.steps.shape[1:] != sensitivity.shape:
            raise ValueError(
                f"{budget.cost.name}: cost must have shape {sensitivity.shape}, "
                f"got {budget.cost.steps.shape[1:]}"
            )
    if not (max_gap >= 0 and max_seconds > 0):
        raise ValueError(
            f"max_gap must not be negative and max_seconds positive, got {max_gap}, {max_seconds}"
        )
    started = perf_counter()
    rows = merge_ties(space, sensitivity, np.zeros(sensitivity.shape, np.int64))
    programme = Programme.of(rows, [budget.cost for budget in budgets])
    limits = [Limit(programme.form(b.cost), b.limit) for b in budgets]
    answer = programme.least_sensitive(limits, max_gap, max_seconds)
    if answer.is_infeasible:
        raise InfeasibleBudgetsError(_verdicts(programme, names, limits, max_seconds))
    if answer.choice is None:
        raise TimeoutError(
            f"no allocation within the budgets was found in {max_seconds} s, nor proved impossible"
        )
    bits = np.empty(len(space), np.int64)
    for members, column in zip(rows.members, answer.choice.tolist(), strict=True):
        bits[list(members)] = space.widths[column]
    allocation = Allocation.of(space, bits.tolist())
    every = np.arange(len(rows.members))
    omega = float(rows.sensitivity[every, answer.choice].sum())
    return Solution(
        allocation=allocation,
        sensitivity=omega,
        bound=min(answer.bound, omega),
        costs={budget.cost.name: budget.cost.of(space, allocation) for budget in budgets},
        seconds=perf_counter() - started,
    )


def _verdicts(
    programme: Programme, names: Sequence[str], limits: Sequence[Limit], seconds: float
) -> list[Verdict]:
    verdicts = []
    for i, (name, limit) in enumerate(zip(names, limits, strict=True)):
        others = [*limits[:i], *limits[i + 1 :]]
        least = programme.least(limit.form, [], seconds)
        nearest = programme.least(limit.form, others, seconds)
        verdicts.append(Verdict(name, limit.most, least, nearest))
    return verdicts
