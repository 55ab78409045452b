"""What a layer's channels may be asked to have in common: few widths, and counts that fit hardware.

Both rules only take choices away, so a bound without them still holds.
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.front import InfeasibleBudgetError
from hawq.allocate.hull import lower_hull, reduced_costs
from hawq.allocate.remainder import Choice, spend

__all__ = ["channel_blocks", "spend_on_few_widths"]


def spend_on_few_widths(
    sensitivity: NDArray[np.float64],
    cost: NDArray[np.int64],
    budget: int,
    *,
    layers: NDArray[np.int64],
    max_widths: int,
) -> Choice:
    """Choose for every row within a budget, with few different options in each layer.

    At a price λ each layer takes the set of ``max_widths`` options that is best for all of its
    rows, of all such sets; λ comes from the secants of the dual function. With the sets of either
    side of the budget, what is left is a choice without rules.

    Args:
        sensitivity: Ω of row r at option b, shape (R, B), infinite where barred.
        cost: Cost of the same, shape (R, B).
        budget: Largest total cost.
        layers: The layer of each row, shape (R,), in 0…L − 1.
        max_widths: Different options that a layer may use.

    Raises:
        InfeasibleBudgetError: If the cheapest choice under the rule costs more.
        ValueError: If a layer's rows cannot be served by so few options.
    """
    if max_widths == 1:
        return _spend_on_one_width(sensitivity, cost, budget, layers)
    num_options = cost.shape[1]
    sets = np.array(list(combinations(range(num_options), min(max_widths, num_options))))
    member = (sets[:, :, None] == np.arange(num_options)).any(1)

    def cheapest(key: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """For each layer, the set of the least sum over its rows, and that sum."""
        sums = np.stack([np.bincount(layers, key[:, s].min(1)) for s in sets])
        return sums.argmin(0), sums.min(0)

    def restricted(chosen: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.where(member[chosen[layers]], sensitivity, np.inf)

    def point(chosen: NDArray[np.int64], key: NDArray[np.float64]) -> tuple[int, float]:
        """Cost and Ω of all rows when each takes its least of some key."""
        inside = np.where(np.isfinite(restricted(chosen)), key, np.inf)
        at = np.arange(len(cost)), inside.argmin(1)
        return int(cost[at].sum()), float(sensitivity[at].sum())

    cost_key = np.where(np.isfinite(sensitivity), cost, np.inf)
    low, least = cheapest(cost_key)
    if np.isinf(least).any():
        raise _too_few(max_widths, int(np.isinf(least).argmax()))
    if least.sum() > budget:
        raise InfeasibleBudgetError(budget, int(least.sum()))
    high, _ = cheapest(sensitivity)
    (low_cost, low_total), (high_cost, high_total) = (
        point(low, cost_key),
        point(high, sensitivity),
    )
    bound = high_total
    while high_cost > budget:
        price = (low_total - high_total) / (high_cost - low_cost)
        key = sensitivity + price * cost
        chosen, sums = cheapest(key)
        bound = float(sums.sum()) - price * budget
        new_cost, new_total = point(chosen, key)
        line = low_total + price * low_cost
        if new_total + price * new_cost >= line * (1 - 1e-12):
            break
        if new_cost <= budget:
            low, low_cost, low_total = chosen, new_cost, new_total
        else:
            high, high_cost, high_total = chosen, new_cost, new_total
    choices = []
    for chosen in (low, high):
        allowed = lower_hull(restricted(chosen), cost)
        if allowed.total_cost[0] <= budget:
            choices.append(spend(allowed, budget))
    best = min(choices, key=lambda choice: choice.sensitivity)
    return Choice(best.options, best.sensitivity, best.cost, min(bound, best.sensitivity))


def channel_blocks(
    sensitivity: NDArray[np.float64],
    cost: NDArray[np.int64],
    choice: Choice,
    price: float,
    *,
    layers: NDArray[np.int64],
    multiple: int,
) -> NDArray[np.int64]:
    """Cut each layer's channels into blocks that are to share a width, the like with the like.

    Channels are ordered by what a choice without the rule gives them, then by how near they are to
    more and how far from less, at the price λ. Where Ω of a layer's channels differs by a factor
    alone, the best counts that are multiples are found among such blocks.

    Args:
        sensitivity: Ω of channel r at option b, shape (R, B), infinite where barred.
        cost: Cost of the same, shape (R, B).
        choice: What the channels receive without the rule.
        price: λ of that choice.
        layers: The layer of each channel, shape (R,).
        multiple: Channels of a block; a layer's last block is smaller where its number of
            channels is no multiple.

    Returns:
        The block of each channel, shape (R,), in 0…; blocks are ordered by layer.
    """
    every = np.arange(len(cost))
    taken = cost[every, choice.options]
    dearer = reduced_costs(sensitivity, cost, choice.options, price)
    down = np.where(cost < taken[:, None], dearer, np.inf).min(1)
    up = np.where(cost > taken[:, None], dearer, np.inf).min(1)
    wants = np.where(np.isinf(down), 0, down) - np.where(np.isinf(up), 0, up)
    order = np.lexsort((-wants, -taken, layers))
    first = np.searchsorted(layers[order], layers[order])  # of the same layer
    starts = (every - first) % multiple == 0
    blocks = np.empty_like(every)
    blocks[order] = np.cumsum(starts) - 1
    return blocks


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
