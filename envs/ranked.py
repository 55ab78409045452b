"""Weights, or activations, in the order in which they receive their bits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hawq.allocate import InfeasibleBudgetError
from hawq.allocate.front import merge_ties
from hawq.space import PREFIX, Space

__all__ = ["Part", "Ranked", "Rows", "Unit"]

Unit = Literal["channels", "weights"]


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """The weights, or the activations, with the order in which they receive their bits.

    Attributes:
        space: Their groups; tied ones are one row.
        groups: Where these are in the whole space, shape (G,).
        cost: What is limited, shape (G, B), columns ``space.widths``; it must not fall with the
            width.
        limit: The most that they may cost.
        sensitivity: Ω, shape (G, B); infinite where it is barred.
        order: Indices of ``space.rows()``, the most sensitive first, shape (R,): from
            ``hawq.ranking.ranking``.
    """

    space: Space
    groups: NDArray[np.int64]
    cost: NDArray[np.int64]
    limit: int
    sensitivity: NDArray[np.float64]
    order: NDArray[np.int64]

    @property
    def is_activations(self) -> bool:
        """Whether these are the activations."""
        return self.space.groups[0].name.startswith(PREFIX["activations"])


@dataclass(frozen=True, slots=True)
class Part:
    """The totals of a part.

    Attributes:
        is_activations: Whether it is the activations.
        limit: The most that it may cost.
        least: Its cost with everything at its narrowest.
        fixed: Cost of its rows of one width.
        omega: Ω with everything at its narrowest.
    """

    is_activations: bool
    limit: int
    least: int
    fixed: int
    omega: float

    @staticmethod
    def of(ranked: Ranked, rows: "Rows") -> "Part":
        """Sum up a part.

        Raises:
            InfeasibleBudgetError: If it is above its limit even at its narrowest.
        """
        cost = rows.cost[:, 0]
        if cost.sum() > ranked.limit:
            raise InfeasibleBudgetError(ranked.limit, int(cost.sum()))
        return Part(
            is_activations=ranked.is_activations,
            limit=ranked.limit,
            least=int(cost.sum()),
            fixed=int(cost[~rows.is_free].sum()),
            omega=float(rows.omega[:, 0].sum()),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What each row of a part receives and costs at each of its widths, in the space's order.

    Attributes:
        widths: Of the part's tables, shape (B,).
        bits: The widest width on its menu that is no wider, else its narrowest, shape (R, B).
        cost: At those bits, same shape.
        omega: Ω at those bits, same shape.
        amount: In units, shape (R,).
        members: Groups of the whole space in each row.
        owners: Layer, or tensor, of each row's first group.
    """

    widths: NDArray[np.int64]
    bits: NDArray[np.int64]
    cost: NDArray[np.int64]
    omega: NDArray[np.float64]
    amount: NDArray[np.int64]
    members: Sequence[NDArray[np.int64]]
    owners: Sequence[str]

    @staticmethod
    def of(ranked: Ranked, unit: Unit) -> "Rows":
        """Lay out the rows of a part.

        Raises:
            ValueError: If a cost falls with the width.
        """
        space = ranked.space
        rows = merge_ties(space, ranked.sensitivity, ranked.cost)
        allowed = np.isfinite(rows.sensitivity)
        wider = np.maximum.accumulate(np.where(allowed, np.arange(allowed.shape[1]), -1), 1)
        columns = np.where(wider < 0, allowed.argmax(1)[:, None], wider)
        cost = np.take_along_axis(rows.cost, columns, 1)
        falls = (np.diff(cost, axis=1) < 0).any(1)
        if falls.any():
            name = space.groups[rows.members[int(falls.argmax())][0]].name
            raise ValueError(f"{name}: cost must not fall with the width, got one that does")
        sizes = np.array([group.num_elements for group in space.groups], np.int64)
        elements = [int(sizes[list(members)].sum()) for members in rows.members]
        widths = np.array(space.widths, np.int64)
        return Rows(
            widths=widths,
            bits=widths[columns],
            cost=cost,
            omega=np.take_along_axis(rows.sensitivity, columns, 1),
            amount=np.array(elements if unit == "weights" else [1] * len(elements), np.int64),
            members=[ranked.groups[list(members)] for members in rows.members],
            owners=[space.groups[members[0]].owner for members in rows.members],
        )

    @property
    def is_free(self) -> NDArray[np.bool_]:
        """Which rows have a choice, shape (R,)."""
        return self.bits[:, 0] < self.bits[:, -1]

    def steepness(self) -> NDArray[np.float64]:
        """Return entry 8 of the observation for each row, shape (R,)."""
        fall = self.omega[:, 0] - self.omega[:, -1]
        spent = np.maximum(self.cost[:, -1] - self.cost[:, 0], 1)
        counts = self.is_free & (fall > 0)
        scale = np.zeros(len(fall))
        if counts.any():
            logs = np.log(fall[counts] / spent[counts])
            span = np.ptp(logs)
            scale[counts] = (logs - logs.min()) / span if span > 0 else 1
        return scale
