"""A walk along a ranking: rows in order, and where the cuts between their widths may lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from envs.ranked import Ranked, Rows

__all__ = ["Scope", "Walk", "walks_of"]

Scope = Literal["network", "layer"]


@dataclass(frozen=True, slots=True, eq=False)
class Walk:
    """Some rows of a part in order, with the sums of the first k of them.

    Attributes:
        part: Index of the part.
        widths: To walk, decreasing, shape (W,).
        bits: What a row receives at each width, shape (N, W).
        extra: What the first k rows cost more at a width than at their narrowest, shape (W, N + 1).
        relief: How much Ω falls by that, shape (W, N + 1).
        least: Cost of the first k rows at their narrowest, shape (N + 1,).
        amount: The first k rows in units, shape (N + 1,).
        steepness: See entry 8 of the observation, shape (N,).
        groups: Groups of the space that are in these rows, shape (M,).
        rows: Which of the rows each of them is in, shape (M,).
    """

    part: int
    widths: NDArray[np.int64]
    bits: NDArray[np.int64]
    extra: NDArray[np.int64]
    relief: NDArray[np.float64]
    least: NDArray[np.int64]
    amount: NDArray[np.int64]
    steepness: NDArray[np.float64]
    groups: NDArray[np.int64]
    rows: NDArray[np.int64]

    def reach(self, step: int, begin: int, room: int) -> int:
        """Return the furthest cut that costs at most ``room`` more than the narrowest."""
        most = int(self.extra[step, begin]) + room
        return int(np.searchsorted(self.extra[step], most, side="right")) - 1

    def nearest(self, begin: int, end: int, fraction: float) -> int:
        """Return the cut nearest to a fraction of the way."""
        span = int(self.amount[end] - self.amount[begin])
        return min(max(self._cut(int(self.amount[begin]) + fraction * span), begin), end)

    def share(self, begin: int, cut: int, end: int) -> float:
        """Return what fraction of the way a cut is; 0 where there is no way."""
        span = int(self.amount[end] - self.amount[begin])
        return int(self.amount[cut] - self.amount[begin]) / span if span else 0.0

    def steps_of(self, cuts: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return at which step each row receives its bits, and which have them."""
        every = np.arange(len(self.bits))
        steps = np.searchsorted(np.array(cuts[1:], np.int64), every, side="right")
        return steps, (every < cuts[-1]) | (len(cuts) == len(self.widths))

    def cuts_of(self, bits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the cuts, shape (W − 1,), that give these bits, or as much of each width."""
        mine = np.empty(len(self.bits), np.int64)
        mine[self.rows] = bits[self.groups]
        fits = self.bits == mine[:, None]
        last = fits.shape[1] - 1
        steps = np.maximum.accumulate(fits.argmax(1))
        widths = np.arange(last)
        if fits[np.arange(len(mine)), steps].all():
            return np.searchsorted(steps, widths, side="right")
        wider = mine[:, None] >= self.widths[:-1]
        amounts = np.diff(self.amount) @ wider
        return np.array([self._cut(amount) for amount in amounts], np.int64)

    def _cut(self, amount: float) -> int:
        middles = (self.amount[1:] + self.amount[:-1]) / 2
        return int(np.searchsorted(middles, amount, side="right"))


def walks_of(ranked: Ranked, rows: Rows, part: int, scope: Scope) -> list[Walk]:
    """Lay out the walks of a part: none where nothing can be chosen."""
    if sorted(ranked.order.tolist()) != list(range(len(rows.members))):
        raise ValueError(f"order must hold each of {len(rows.members)} rows once")
    order = ranked.order[rows.is_free[ranked.order]]
    if not len(order):
        return []
    whole = _walk(rows, part, order)
    if len(order) < len(whole.widths):
        raise ValueError(
            f"channels must be at least as many as widths, got {len(order)} channels and "
            f"{len(whole.widths)} widths"
        )
    if scope == "network":
        return [whole]
    owners = np.array(rows.owners)
    layers = dict.fromkeys(owners[np.sort(order)].tolist())
    return [_walk(rows, part, order[owners[order] == layer]) for layer in layers]


def _walk(rows: Rows, part: int, order: NDArray[np.int64]) -> Walk:
    """Lay out a walk of some rows in an order."""
    bits, cost, omega = rows.bits[order], rows.cost[order], rows.omega[order]
    # Where no row receives more than at the next narrower width, there is nothing to choose.
    columns = np.append(np.flatnonzero((np.diff(bits, axis=1) > 0).any(0))[::-1] + 1, 0)
    members = [rows.members[row] for row in order]
    return Walk(
        part=part,
        widths=rows.widths[columns],
        bits=bits[:, columns],
        extra=_sums((cost - cost[:, :1])[:, columns].T),
        relief=_sums((omega[:, :1] - omega)[:, columns].T),
        least=_sums(cost[:, 0]),
        amount=_sums(rows.amount[order]),
        steepness=rows.steepness()[order],
        groups=np.concatenate(members),
        rows=np.repeat(np.arange(len(order)), [len(groups) for groups in members]),
    )


def _sums(table: NDArray[Any]) -> NDArray[Any]:
    """Return the sums of the first k along the last axis, k from 0."""
    return np.concatenate([np.zeros_like(table[..., :1]), np.cumsum(table, -1)], -1)
