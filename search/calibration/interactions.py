"""How far the loss increases of two groups quantized together are from the sum of their own."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from search.artefacts import Interactions
from search.calibration.agreement import is_clear, mean_and_error

__all__ = ["Bits", "Gained", "interactions", "key_of"]

# What is quantized: groups with their bits, all else in floating point.
Bits = Mapping[str, int]
Key = frozenset[tuple[str, int]]
# Each image's own increase of the loss, shape (N,), of what was measured and is finite.
Gained = Mapping[Key, NDArray[np.float64]]


def key_of(bits: Bits) -> Key:
    """Name what is quantized, in any order."""
    return frozenset(bits.items())


def interactions(chosen: Bits, gained: Gained) -> Interactions | None:
    """Compute ΔL(i,j) − ΔL(i) − ΔL(j) of every two groups, image by image.

    Args:
        chosen: The groups with their bits.
        gained: Of each of them, and of every two.

    Returns:
        None where there are no two, or something of it was not measured.
    """
    singles = [gained.get(frozenset([choice])) for choice in chosen.items()]
    pairs = {
        (i, j): gained.get(frozenset([a, b]))
        for (i, a), (j, b) in combinations(enumerate(chosen.items()), 2)
    }
    own = np.array([single for single in singles if single is not None])
    if len(own) < max(2, len(singles)) or any(pair is None for pair in pairs.values()):
        return None
    size = len(own)
    excess, errors = np.zeros((size, size)), np.zeros((size, size))
    relative: list[list[float | None]] = [[None] * size for _ in own]
    for (i, j), pair in pairs.items():
        assert pair is not None
        both, both_error = mean_and_error(own[i] + own[j])
        found, error = mean_and_error(pair - own[i] - own[j])
        excess[i, j] = excess[j, i] = found
        errors[i, j] = errors[j, i] = error
        if is_clear(both, both_error):
            relative[i][j] = relative[j][i] = found / both
    increases, own_errors = zip(*map(mean_and_error, own), strict=True)
    return Interactions(
        groups=list(chosen),
        bits=list(chosen.values()),
        increase=increases,
        standard_error=own_errors,
        interaction=excess.tolist(),
        interaction_error=errors.tolist(),
        relative=relative,
    )
