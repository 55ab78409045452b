"""One budget, very many groups: channels by the tens of thousands, in about a second.

The hull of the whole front, the point of it below the budget, and what is left spent well; on
request with a layer's channels held to few widths, or to counts that hardware likes.
"""

from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from hawq.allocate.channel_blocks import channel_blocks
from hawq.allocate.few_widths import spend_on_few_widths
from hawq.allocate.front import Rows, merge_ties
from hawq.allocate.hull import lower_hull
from hawq.allocate.remainder import Choice, spend
from hawq.allocate.solution import Solution
from hawq.allocation import Allocation
from hawq.space import Space

__all__ = ["lagrangian_solution"]


def lagrangian_solution(
    space: Space,
    sensitivity: NDArray[np.float64],
    cost: NDArray[np.int64],
    budget: int,
    *,
    max_widths: int | None = None,
    multiple: int = 1,
) -> Solution:
    """Find an allocation within a budget, with a bound on how much better another could be.

    Args:
        space: What may be chosen; menus and ties are respected. Groups ``w:LAYER[c]`` are the
            channels of one layer.
        sensitivity: Ω of group l at width b, shape (L, B).
        cost: Cost of the same, shape (L, B).
        budget: Largest total cost.
        max_widths: Different widths that a layer's channels may have.
        multiple: The number of a layer's channels at each width is a multiple of this, as
            hardware likes (8, 16, 32), but for one width where the layer's own number is none.

    Returns:
        The allocation; its cost is called ``cost``. The bound of ``multiple`` is that of the
        problem without it.

    Raises:
        InfeasibleBudgetError: If nothing fits the budget.
        ValueError: If a table's shape or values are wrong, a rule is not positive, or tied or
            differently pinned channels cannot follow it.
    """
    if multiple < 1 or (max_widths is not None and max_widths < 1):
        raise ValueError(
            f"multiple and max_widths must be at least 1, got {multiple} and {max_widths}"
        )
    started = perf_counter()
    rows = merge_ties(space, sensitivity, cost)
    found = lower_hull(rows.sensitivity, rows.cost)
    free = choice = spend(found, budget)
    if multiple > 1 or max_widths is not None:
        layers = _layers(space, rows, multiple)
        blocks = np.arange(len(layers))
        if multiple > 1:
            blocks = channel_blocks(
                rows.sensitivity,
                rows.cost,
                free,
                found.price(budget),
                layers=layers,
                multiple=multiple,
            )
        choice = _ruled(rows, budget, layers, blocks, max_widths)
    # The blocks are one way of following ``multiple``: a bound among them is none for the rule.
    bound = free.bound if multiple > 1 else max(choice.bound, free.bound)
    bits = np.empty(len(space), np.int64)
    widths = np.array(space.widths)
    for members, option in zip(rows.members, choice.options.tolist(), strict=True):
        bits[list(members)] = widths[option]
    return Solution(
        allocation=Allocation.of(space, bits.tolist()),
        sensitivity=choice.sensitivity,
        bound=min(bound, choice.sensitivity),
        costs={"cost": choice.cost},
        seconds=perf_counter() - started,
        loss_of_rules=max(choice.sensitivity - free.sensitivity, 0.0),
    )


def _ruled(
    rows: Rows,
    budget: int,
    layers: NDArray[np.int64],
    blocks: NDArray[np.int64],
    max_widths: int | None,
) -> Choice:
    """Choose for blocks of rows, and give each row its block's option."""
    num_blocks = int(blocks.max()) + 1
    sensitivity = np.zeros((num_blocks, rows.cost.shape[1]))
    cost = np.zeros(sensitivity.shape, np.int64)
    np.add.at(sensitivity, blocks, rows.sensitivity)
    np.add.at(cost, blocks, rows.cost)
    if max_widths is None:
        choice = spend(lower_hull(sensitivity, cost), budget)
    else:
        layer_of_block = np.empty(num_blocks, np.int64)
        layer_of_block[blocks] = layers
        choice = spend_on_few_widths(
            sensitivity, cost, budget, layers=layer_of_block, max_widths=max_widths
        )
    return Choice(choice.options[blocks], choice.sensitivity, choice.cost, choice.bound)


def _layers(space: Space, rows: Rows, multiple: int) -> NDArray[np.int64]:
    """Number the layer of each row, shape (R,)."""
    names = [name.partition("[")[0] for name in space.names]
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    layers = np.array([numbers[names[members[0]]] for members in rows.members])
    first: dict[int, NDArray[np.bool_]] = {}
    for row, members in enumerate(rows.members):
        of = {names[i] for i in members}
        if len(of) > 1:
            raise ValueError(
                f"channels tied across layers cannot follow a layer's rule, got {sorted(of)}"
            )
        allowed = np.isfinite(rows.sensitivity[row])
        alike = np.array_equal(first.setdefault(int(layers[row]), allowed), allowed)
        if multiple > 1 and (len(members) > 1 or not alike):
            raise ValueError(
                f"channels must be untied and share one menu to be counted in multiples of "
                f"{multiple}, got others in {of.pop()}"
            )
    return layers
