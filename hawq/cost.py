"""What an allocation costs: exact integers, with their unit in the name.

Weight bits are a separable table (group × width). Bit operations are a product of a weight's and
an activation's bits and are therefore a function of both, never a table of one.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from hawq.allocation import Allocation
from hawq.space import Space

__all__ = ["FLOAT_BITS", "average_bits", "bops", "compression", "mib", "total", "weight_bits"]

FLOAT_BITS = 32
_BITS_PER_MIB = 8 << 20


def weight_bits(space: Space) -> NDArray[np.int64]:
    """Bits that each group's elements take at each width, shape (L, B).

    The papers' figure: weights only, without scales, biases and batch-norm.
    """
    sizes = np.array([group.num_elements for group in space.groups], np.int64)
    return np.outer(sizes, np.array(space.widths, np.int64))


def total(table: NDArray[np.int64], space: Space, allocation: Allocation) -> int:
    """Sum a table, shape (L, B), over an allocation."""
    return int(table[np.arange(len(space)), allocation.choice(space)].sum())


def bops(macs: Sequence[int], weight_bits: Sequence[int], activation_bits: Sequence[int]) -> int:
    """Bit operations of one example: Σ MACs · weight bits · activation bits (Yao et al., 2021)."""
    layers = zip(macs, weight_bits, activation_bits, strict=True)
    return sum(m * w * a for m, w, a in layers)


def compression(space: Space, bits: int) -> float:
    """How many times smaller than 32-bit floats ``bits`` bits are for this space."""
    return FLOAT_BITS * space.num_elements / bits


def average_bits(space: Space, bits: int) -> float:
    """Bits per element."""
    return bits / space.num_elements


def mib(bits: int) -> float:
    """Convert bits to MiB (2²⁰ bytes)."""
    return bits / _BITS_PER_MIB
