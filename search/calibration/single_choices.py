"""A few of all single choices, spread over groups and widths.

A single choice gives one group some bits and leaves all else alone. A large space has more of them
than one wants to measure.
"""

from math import gcd

from hawq.space import Space

__all__ = ["spread"]

# Steps of this share of a menu meet all of it, and never the neighbours one after the other.
_GOLDEN = 0.618


def spread(space: Space, most: int) -> list[tuple[str, int]]:
    """Pick single choices evenly: each group as often as any other, and each width.

    In every round each group takes one width that it has not had, its neighbour the next one of
    the menu; of the last round, which does not fit, groups are taken at equal distances.

    Args:
        space: What may be chosen; what a tie forbids is left out.
        most: How many, at most.

    Returns:
        Groups' names with bits, in the space's order, bits increasing. Always the same for equal
        arguments; all there are where they are no more than ``most``.

    Raises:
        ValueError: If ``most`` is below 1.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    menus: list[tuple[int, ...]] = [()] * len(space)
    for members in space.rows():
        for i in members:
            menus[i] = space.menu_of(members)
    picked: list[tuple[int, int]] = []
    for turn in range(max(map(len, menus))):
        entries = [
            (i, menu[(i + turn * _step(len(menu))) % len(menu)])
            for i, menu in enumerate(menus)
            if turn < len(menu)
        ]
        left = min(most - len(picked), len(entries))
        picked += [entries[k * len(entries) // left] for k in range(left)]
    return [(space.names[i], bits) for i, bits in sorted(picked)]


def _step(length: int) -> int:
    step = max(1, round(_GOLDEN * length))
    while gcd(step, length) > 1:
        step += 1
    return step
