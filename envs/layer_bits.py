"""HAQ's decision process: one layer after the other receives its bits (Wang et al., 2019).

HAQ narrows what an agent chose until it is within the budget. Here an agent chooses only among
what still is: all that comes later can then have its narrowest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from envs.allocation_env import AllocationEnv, Evaluate
from hawq.allocate import Budget, InfeasibleBudgetsError, Verdict
from hawq.allocation import Allocation
from hawq.cost import Cost
from hawq.reads import Reads
from hawq.space import Space

__all__ = ["LayerBits", "layer_features"]


class LayerBits(AllocationEnv["_Episode"]):
    """Choose the bits of each layer and each activation tensor in turn, within all budgets.

    A row of the space, tied groups together, is a step, in the space's order: the weights, then the
    activations. A row of one width, such as a pinned one, is passed over.

    ===========  ===================================================================================
    Action       ``Box(0, 1, (1,))``: where to pick among the widths that this row can have with
                 all later ones at their narrowest, 0 the narrowest of them, 1 the widest; each has
                 an equal share of the box.
    Observation  ``Box(0, 1, (F + 2,))``: the F features of the row; the action before; the share
                 left of the budget that has the least left. A budget's share is 1 with everything
                 at its narrowest, and 0 where nothing more can be spent. After the end the features
                 are 0.
    Reward       0 until the end, then the first of what ``evaluate`` returns.
    Start        Everything at its narrowest. Deterministic.
    End          Terminated after the last row, always within every budget; no truncation.
                 ``info`` is then the second of what ``evaluate`` returns, and ``allocation``.
    ===========  ===================================================================================

    A cost need not be a sum: pairs of groups and peaks are counted as they are. Where one falls
    with the width, every episode is within the budgets still, but budgets below what everything
    at its narrowest costs are refused although something else might fit.

    Args:
        space: Layers and activation tensors.
        features: Of each of ``space.rows()``, shape (R, F), in 0..1: from ``layer_features``.
        budgets: What no allocation may exceed.
        evaluate: Reward of a finished allocation, higher is better, with what ``info`` says of it.
        render_mode: ``rgb_array``, ``ansi``, or None.

    Raises:
        InfeasibleBudgetsError: If everything at its narrowest is above a budget.
        ValueError: If nothing can be chosen, or a shape or a value is wrong.
    """

    def __init__(
        self,
        *,
        space: Space,
        features: NDArray[np.float32],
        budgets: Sequence[Budget],
        evaluate: Evaluate,
        render_mode: str | None = None,
    ) -> None:
        _check(space, features, budgets)
        self._meters = [_Meter.of(budget) for budget in budgets]
        self._widths = np.array(space.widths)
        members = space.rows()
        menus = [np.searchsorted(space.widths, space.menu_of(row)) for row in members]
        walked = [i for i, menu in enumerate(menus) if len(menu) > 1]
        self._rows = [_Row(np.array(members[i]), menus[i].tolist()) for i in walked]
        self._features = np.vstack([features[walked], np.zeros_like(features[:1])])
        self._narrowest = np.empty(len(space), np.int64)
        for row, menu in zip(members, menus, strict=True):
            self._narrowest[list(row)] = menu[0]
        self._least = self._costs(self._narrowest)
        _refuse_infeasible(budgets, self._least)
        super().__init__(
            space,
            evaluate,
            num_steps=len(walked),
            num_observed=features.shape[1] + 2,
            render_mode=render_mode,
        )

    @override
    def actions_of(self, allocation: Allocation) -> list[float]:
        """Return actions that lead to an allocation.

        Any allocation within the budgets is met exactly, if no cost falls with the width. Of any
        other, a row receives the widest affordable width that is no wider than the allocation's.

        Returns:
            ``num_steps`` numbers, each in the middle of its width's share of the box.

        Raises:
            ValueError: If the allocation belongs to another space.
        """
        wanted = allocation.choice(self._space)
        choice, actions = self._narrowest.copy(), []
        for row in self._rows:
            columns = self._affordable(choice, row)
            below = sum(column <= wanted[row.groups[0]] for column in columns)
            place = max(int(below) - 1, 0)
            choice[row.groups] = columns[place]
            actions.append((place + 0.5) / len(columns))
        return actions

    @override
    def _start(self) -> "_Episode":
        return _Episode(self._narrowest.copy())

    @override
    def _take(self, episode: "_Episode", fraction: float) -> None:
        row = self._rows[episode.step]
        columns = self._affordable(episode.choice, row)
        episode.choice[row.groups] = columns[min(int(fraction * len(columns)), len(columns) - 1)]
        episode.step, episode.action = episode.step + 1, fraction

    @override
    def _bits(self, episode: "_Episode") -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        assigned = np.ones(len(self._space), np.bool_)
        for row in self._rows[episode.step :]:
            assigned[row.groups] = False
        return self._widths[episode.choice], assigned

    @override
    def _observe(self, episode: "_Episode") -> NDArray[np.float64]:
        spent = self._costs(episode.choice)
        left = [
            (meter.limit - now) / (meter.limit - least) if meter.limit > least else 0.0
            for meter, now, least in zip(self._meters, spent, self._least, strict=True)
        ]
        dynamic = np.array([episode.action, min(left, default=1.0)])
        return np.concatenate([self._features[episode.step], dynamic])

    def _costs(self, choice: NDArray[np.int64]) -> list[int]:
        return [meter.cost(choice) for meter in self._meters]

    def _affordable(self, choice: NDArray[np.int64], row: "_Row") -> list[int]:
        """Return the columns that a row can have beside what is chosen; never none."""
        tried, found = choice.copy(), []
        for column in row.menu:
            tried[row.groups] = column
            if all(meter.cost(tried) <= meter.limit for meter in self._meters):
                found.append(column)
        assert found, "its narrowest is part of what fitted before"
        return found


def layer_features(space: Space, reads: Reads) -> NDArray[np.float32]:
    """Describe each row of a space of layers and tensors by HAQ's features that do not change.

    What a layer is is told from what it reads and computes in its first call; a tensor is described
    by the layer that reads it first, tied groups by their average. Each feature is scaled so that
    its least value over the rows is 0 and its largest 1; one that is always the same is 0.

    =====  =========================================================================================
    Entry  Feature
    =====  =========================================================================================
    0      1 if the layer is grouped, as a depthwise one is: its weights for one output channel are
           no multiple of its input channels.
    1      Input channels.
    2      Output channels.
    3      Stride, of each of two axes: √(positions read / positions computed).
    4      Kernel, of each of two axes: √(weights for one output channel and one input channel, for
           one output channel of a grouped layer).
    5      Weights.
    6      Positions read, on each of two axes: the square root of their number.
    7      Place in the order.
    8      1 for an activation tensor, 0 for a weight.
    =====  =========================================================================================

    Returns:
        Features in 0..1, shape (R, 9), in the order of ``space.rows()``.

    Raises:
        ValueError: If a group is no layer, nor a tensor, of ``reads``.
    """
    described = _described(reads)
    rows = space.rows()
    raw = np.zeros((len(rows), 9))
    for i, members in enumerate(rows):
        names = [space.groups[j].name for j in members]
        for name in names:
            if name not in described:
                raise ValueError(f"groups must be layers or tensors of the network, got {name}")
        raw[i, :7] = np.mean([described[name] for name in names], 0)
        raw[i, 7:] = i, names[0].startswith("a:")
    span = np.ptp(raw, axis=0)
    scaled: NDArray[np.float64] = (raw - raw.min(0)) / np.where(span > 0, span, 1)
    return scaled.astype(np.float32)


def _described(reads: Reads) -> dict[str, tuple[float, ...]]:
    """Return entries 0 to 6, before they are scaled, of every group of layers and tensors."""
    layers = {layer.name: layer for layer in reads.layers}
    tensors = {tensor.name: tensor for tensor in reads.activations}
    found: dict[str, tuple[float, ...]] = {
        f"w:{layer.name}": (0, 0, layer.num_channels, 0, 0, layer.num_elements, 0)
        for layer in reads.layers  # also those that never run
    }
    seen = set()
    for read in reads.reads:
        layer, tensor = layers[read.layer], tensors.get(read.activation)
        if tensor is None:
            continue  # it stays in floating point, and what it was is not known
        channels, each = tensor.num_channels, layer.num_elements / layer.num_channels
        is_grouped = each % channels != 0
        inside, outside = tensor.num_elements / channels, read.macs / layer.num_elements
        entries = (
            float(is_grouped),
            channels,
            layer.num_channels,
            sqrt(inside / outside),
            sqrt(each if is_grouped else each / channels),
            layer.num_elements,
            sqrt(inside),
        )
        for name in (f"w:{layer.name}", f"a:{tensor.name}"):
            if name not in seen:
                seen.add(name)
                found[name] = entries
    return found


@dataclass(slots=True, eq=False)
class _Episode:
    """Where an episode stands.

    Attributes:
        choice: Column of every group's width, the narrowest for what is to come.
        step: Actions so far.
        action: The last one.
    """

    choice: NDArray[np.int64]
    step: int = 0
    action: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """Groups that choose together, and the columns of their menu, increasing."""

    groups: NDArray[np.int64]
    menu: list[int]


@dataclass(frozen=True, slots=True, eq=False)
class _Meter:
    """A budget whose cost is quick to tell: its pairs side by side.

    Attributes:
        limit: The most that may be spent.
        steps: As in ``Cost``, shape (S, L, B).
        first: Index of each pair's one group, shape (P,).
        second: Index of the other one, shape (P,).
        tables: Of the pairs, shape (P, B, B).
    """

    limit: int
    steps: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    tables: NDArray[np.int64]

    @staticmethod
    def of(budget: Budget) -> "_Meter":
        cost: Cost = budget.cost
        num_widths = cost.steps.shape[2]
        return _Meter(
            limit=budget.limit,
            steps=cost.steps,
            first=np.array([pair.first for pair in cost.pairs], np.int64),
            second=np.array([pair.second for pair in cost.pairs], np.int64),
            tables=np.array([pair.table for pair in cost.pairs], np.int64).reshape(
                -1, num_widths, num_widths
            ),
        )

    def cost(self, choice: NDArray[np.int64]) -> int:
        """Return what columns cost, shape (L,): ``Cost.of`` without an allocation."""
        sums = self.steps[:, np.arange(len(choice)), choice].sum(1)
        every = np.arange(len(self.tables))
        return int(sums.max() + self.tables[every, choice[self.first], choice[self.second]].sum())


def _refuse_infeasible(budgets: Sequence[Budget], least: Sequence[int]) -> None:
    """Say what everything at its narrowest costs, if that is above a budget."""
    above = [now > budget.limit for budget, now in zip(budgets, least, strict=True)]
    if any(above):
        verdicts = [
            # The same allocation is the least of every cost.
            Verdict(budget.cost.name, budget.limit, now, now if sum(above) == is_above else None)
            for budget, now, is_above in zip(budgets, least, above, strict=True)
        ]
        raise InfeasibleBudgetsError(verdicts)


def _check(space: Space, features: NDArray[np.float32], budgets: Sequence[Budget]) -> None:
    num_rows = len(space.rows())
    if features.ndim != 2 or len(features) != num_rows:
        raise ValueError(f"features must be of {num_rows} rows, got shape {features.shape}")
    if not ((features >= 0) & (features <= 1)).all():
        raise ValueError("features must be within 0..1, got others")
    expected = (len(space), len(space.widths))
    for budget in budgets:
        if budget.cost.steps.shape[1:] != expected:
            raise ValueError(
                f"{budget.cost.name}: cost must have shape {expected}, "
                f"got {budget.cost.steps.shape[1:]}"
            )
