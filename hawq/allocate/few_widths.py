"""Few widths in each layer: what its channels may be asked to have in common.

At a price λ each layer takes the set of widths that is best for all of its channels; sets are few
(28 pairs of 8 widths), so that every one is looked at. The dual function's best λ gives a bound.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.front import InfeasibleBudgetError
from hawq.allocate.hull import lower_hull
from hawq.allocate.remainder import Choice, spend

__all__ = ["spend_on_few_widths"]

_CLOSE = 1e-5  # a gap, as a part of Ω, that no more tries are spent on


def spend_on_few_widths(
    sensitivity: NDArray[np.float64],
    cost: NDArray[np.int64],
    budget: int,
    *,
    layers: NDArray[np.int64],
    max_widths: int,
    max_tries: int = 24,
) -> Choice:
    """Choose for every row within a budget, with few different options in each layer.

    Args:
        sensitivity: Ω of row r at option b, shape (R, B), infinite where barred.
        cost: Cost of the same, shape (R, B).
        budget: Largest total cost.
        layers: The layer of each row, shape (R,), in 0…L − 1.
        max_widths: Different options that a layer may use.
        max_tries: Changes of one layer's set that are tried in the end, the likeliest
            first, while the gap is worth it.

    Raises:
        InfeasibleBudgetError: If the cheapest choice under the rule costs more.
        ValueError: If a layer's rows cannot be served by so few options.
    """
    if max_widths == 1:
        return _spend_on_one_width(sensitivity, cost, budget, layers)
    num_options = cost.shape[1]
    sets = combinations(range(num_options), min(max_widths, num_options))
    tables = _Layers(sensitivity, cost, layers, np.array(list(sets)))
    costs = tables.sums(np.where(np.isfinite(sensitivity), cost, np.inf))
    least = costs.min(0)
    if np.isinf(least).any():
        raise _too_few(max_widths, int(np.isinf(least).argmax()))
    if least.sum() > budget:
        raise InfeasibleBudgetError(budget, int(least.sum()))

    taken, bound, regrets = _price(tables, budget, costs.argmin(0))
    best = spend(lower_hull(tables.within(taken), cost), budget)
    every_layer = np.arange(len(taken))
    for _ in range(max_tries):
        # With another set for one layer, Ω is at least the bound and what the layer regrets.
        regrets[taken, every_layer] = np.inf
        other, layer = np.unravel_index(regrets.argmin(), regrets.shape)
        gap = best.sensitivity - bound
        if regrets[other, layer] >= gap or gap <= _CLOSE * best.sensitivity:
            break
        regrets[other, layer] = np.inf
        trial = taken.copy()
        trial[layer] = other
        if costs[trial, every_layer].sum() <= budget:
            found = spend(lower_hull(tables.within(trial), cost), budget)
            if found.sensitivity < best.sensitivity:
                taken, best = trial, found
    return Choice(best.options, best.sensitivity, best.cost, min(bound, best.sensitivity))


@dataclass(frozen=True, slots=True, eq=False)
class _Layers:
    """Tables of rows that share a set of options with the others of their layer.

    Attributes:
        sensitivity: Shape (R, B).
        cost: Shape (R, B).
        layers: Shape (R,).
        sets: Columns of each set, shape (S, max_widths).
    """

    sensitivity: NDArray[np.float64]
    cost: NDArray[np.int64]
    layers: NDArray[np.int64]
    sets: NDArray[np.int64]

    def sums(self, key: NDArray[np.float64]) -> NDArray[np.float64]:
        """What each layer's rows take together with each set, shape (S, L)."""
        sums = np.empty((len(self.sets), int(self.layers.max()) + 1))
        for row, options in zip(sums, self.sets, strict=True):
            row[:] = np.bincount(self.layers, key[:, options].min(1))
        return sums

    def within(self, taken: NDArray[np.int64]) -> NDArray[np.float64]:
        """Ω with all options barred but those of each layer's set."""
        member = (self.sets[:, :, None] == np.arange(self.cost.shape[1])).any(1)
        return np.where(member[taken[self.layers]], self.sensitivity, np.inf)

    def point(self, taken: NDArray[np.int64], key: NDArray[np.float64]) -> tuple[int, float]:
        """Cost and Ω of all rows when each takes its least of a key."""
        inside = np.where(np.isfinite(self.within(taken)), key, np.inf)
        at = np.arange(len(key)), inside.argmin(1)
        return int(self.cost[at].sum()), float(self.sensitivity[at].sum())


def _price(
    tables: _Layers, budget: int, low: NDArray[np.int64]
) -> tuple[NDArray[np.int64], float, NDArray[np.float64]]:
    """Find the price of a budget by secants of the dual function, and what it makes of the sets.

    Returns:
        The set of each layer, shape (L,), that has a choice within the budget; the bound; and how
        much worse at the price each set would be, shape (S, L).
    """
    sums = tables.sums(tables.sensitivity)
    high = sums.argmin(0)
    high_cost, high_total = tables.point(high, tables.sensitivity)
    if high_cost <= budget:
        return high, high_total, sums - sums.min(0)
    low_cost, low_total = tables.point(low, tables.cost.astype(np.float64))
    while True:
        price = (low_total - high_total) / (high_cost - low_cost)
        key = tables.sensitivity + price * tables.cost
        sums = tables.sums(key)
        new_cost, new_total = tables.point(sums.argmin(0), key)
        if new_total + price * new_cost >= (low_total + price * low_cost) * (1 - 1e-12):
            return low, float(sums.min(0).sum()) - price * budget, sums - sums.min(0)
        if new_cost <= budget:
            low, low_cost, low_total = sums.argmin(0), new_cost, new_total
        else:
            high_cost, high_total = new_cost, new_total


def _spend_on_one_width(
    sensitivity: NDArray[np.float64],
    cost: NDArray[np.int64],
    budget: int,
    layers: NDArray[np.int64],
) -> Choice:
    """Choose for whole layers."""
    whole = np.zeros((int(layers.max()) + 1, cost.shape[1]))
    whole_cost = np.zeros(whole.shape, np.int64)
    np.add.at(whole, layers, sensitivity)
    np.add.at(whole_cost, layers, cost)
    stuck = ~np.isfinite(whole).any(1)
    if stuck.any():
        raise _too_few(1, int(stuck.argmax()))
    choice = spend(lower_hull(whole, whole_cost), budget)
    return Choice(choice.options[layers], choice.sensitivity, choice.cost, choice.bound)


def _too_few(max_widths: int, layer: int) -> ValueError:
    return ValueError(
        f"max_widths must let every channel of a layer choose, got {max_widths} for layer {layer}"
    )
