"""HAWQ by blocks: the front of its precision order, and its orders of fine-tuning.

Dong et al. (2019) take the top eigenvalue λ of the Hessian of every block of layers, a residual
block or a layer by itself. A block with a larger S = λ / n, of n weights, receives no fewer bits,
its layers all the same; how many, they set by hand. Here a budget does: of all bits in that order
those of least Σ (λ/n)·‖Q(W) − W‖² that fit, which is our rule, not theirs.

Fine-tuning quantizes block after block, the largest Ω = λ·‖Q(W) − W‖² first, while what comes later
is still in floating point. The square is as HAWQ-V2 (equation 10) and most accounts of HAWQ have
it; one prints the norm without.

An eigenvalue below zero, which a minimum has not, counts as zero, as negative traces do in Ω.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from hawq.allocate import Front, monotone_front
from hawq.allocation import Allocation
from hawq.space import Space
from search.artefacts import BlockEigenvalue
from search.tables import Part, Tables

__all__ = ["block_front", "fine_tuning_order"]

Order = tuple[tuple[str, ...], ...]


def block_front(part: Part, cost: NDArray[np.int64]) -> Front:
    """Find the undominated allocations among those in HAWQ's precision order.

    Layers that are pinned keep their bits and stand outside their block's tie; ties of the space
    hold besides, and blocks that they join are one.

    Args:
        part: The weights, with the eigenvalues of their blocks.
        cost: Shape (R, C).

    Returns:
        The front by Σ (λ/n)·‖Q(W) − W‖², of a space in which blocks are tied.

    Raises:
        ValueError: If the eigenvalues are not known, or a block's layers have no width in common.
    """
    average = _averages(part)
    sizes = np.array([group.num_elements for group in part.space.groups])
    objective = average[:, None] * part.squared_errors
    return monotone_front(_tied(part), objective, cost, average * sizes)


def fine_tuning_order(method: str, tables: Tables, allocation: Allocation, seed: int) -> Order:
    """Return the order in which a method has its layers quantized, block by block.

    Args:
        method: Its name.
        tables: With the eigenvalues of blocks, for a method that has an order.
        allocation: What it chose.
        seed: Of a random order.

    Returns:
        Names of layers; empty where all are quantized from the start.
    """
    if method not in _ORDERS:
        return ()
    omegas = _omegas(tables, allocation)
    ranked = _ORDERS[method](omegas, seed)
    layers = {block.block: tuple(block.layers) for block in tables.blocks}
    return tuple(layers[block] for block in ranked)


def _largest_first(omegas: Mapping[str, float], seed: int) -> list[str]:  # noqa: ARG001
    return sorted(omegas, key=lambda block: -omegas[block])


def _smallest_first(omegas: Mapping[str, float], seed: int) -> list[str]:
    return _largest_first(omegas, seed)[::-1]


def _at_random(omegas: Mapping[str, float], seed: int) -> list[str]:
    blocks = list(omegas)
    return [blocks[i] for i in np.random.default_rng(seed).permutation(len(blocks))]


_ORDERS: dict[str, Callable[[Mapping[str, float], int], list[str]]] = {
    "hawq-v1": _largest_first,
    "hawq-v1-reverse": _smallest_first,
    "hawq-v1-random": _at_random,
}


def _omegas(tables: Tables, allocation: Allocation) -> dict[str, float]:
    """Return λ·‖Q(W) − W‖² of every block, in the network's order."""
    part = tables.part("weights")
    assert part is not None
    column = {width: c for c, width in enumerate(part.space.widths)}
    errors = {
        name: float(part.squared_errors[row, column[allocation[name]]])
        for row, name in enumerate(part.space.names)
    }
    return {
        block.block: _eigenvalue(block) * sum(errors[f"w:{layer}"] for layer in block.layers)
        for block in tables.blocks
    }


def _averages(part: Part) -> NDArray[np.float64]:
    """Return S = λ/n of every layer's block, shape (R,)."""
    if not part.blocks:
        raise ValueError(
            "the top eigenvalues of the network's blocks must be known: run a search with hawq-v1 "
            "among its methods"
        )
    found = {f"w:{name}": block for block in part.blocks for name in block.layers}
    return np.array([_eigenvalue(found[name]) / found[name].n for name in part.space.names])


def _eigenvalue(block: BlockEigenvalue) -> float:
    return max(block.eigenvalue, 0.0)


def _tied(part: Part) -> Space:
    is_free = {group.owner for group in part.space.groups if len(group.menu) > 1}
    members = [[name for name in block.layers if name in is_free] for block in part.blocks]
    return part.space.tied([names for names in members if len(names) > 1])
