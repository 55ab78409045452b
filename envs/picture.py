"""An allocation to look at: each layer's bits as a strip, and the same as text."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hawq.space import PREFIX, Kind, Space

__all__ = ["listing", "picture"]

# Of 0 to 8 bits: black where pruned, else from pale to dark.
_COLORS = (
    (20, 20, 20),
    (253, 231, 37),
    (170, 220, 50),
    (92, 200, 99),
    (39, 173, 129),
    (33, 144, 141),
    (44, 113, 142),
    (59, 81, 139),
    (68, 1, 84),
)
_OPEN = (205, 205, 205)
_INK, _PAPER = (40, 40, 40), (255, 255, 255)
_NOUNS: dict[Kind, str] = {"weights": "layer", "activations": "tensor"}

# In pixels: a panel is a title, its strips and a line of names; colors are told on its right.
_LEFT, _WIDTH, _LEGEND = 42, 600, 138
_TITLE, _STRIPS, _NAMES = 26, 130, 24
_PANEL = _TITLE + _STRIPS + _NAMES

# Elements by bits, the widest first; None has no bits yet.
_Shares = list[tuple[int | None, int]]


def picture(space: Space, bits: Sequence[int | None]) -> NDArray[np.uint8]:
    """Draw what every layer and every tensor receives.

    A strip is a layer, the first on the left. Its colors are the shares of its elements, the widest
    at the bottom, gray what has no bits yet. On the right stand the colors with their shares of all
    layers' elements.

    Args:
        space: The groups: layers, channels, or both.
        bits: Of each, in order; None where there are none yet.

    Returns:
        Red, green and blue, shape (H, W, 3).

    Raises:
        ValueError: If there are more bits than groups, or fewer.
    """
    panels = _panels(space, bits)
    size = (_LEFT + _WIDTH + _LEGEND, _PANEL * len(panels))
    image = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(image)
    for i, (kind, strips) in enumerate(panels.items()):
        top = i * _PANEL + _TITLE
        _write(draw, top, kind, strips)
        for j, shares in enumerate(strips.values()):
            left, right = (_LEFT + _WIDTH * k // len(strips) for k in (j, j + 1))
            gap = 1 if right - left > 3 else 0
            _strip(draw, shares, left, max(right - 1 - gap, left), top)
    return np.array(image)


def listing(space: Space, bits: Sequence[int | None]) -> str:
    """Write what every layer and every tensor receives, one a line, shares being of its elements.

    Args:
        space: The groups: layers, channels, or both.
        bits: Of each, in order; None where there are none yet.

    Raises:
        ValueError: If there are more bits than groups, or fewer.
    """
    lines = []
    for kind, strips in _panels(space, bits).items():
        lines.append(_title(kind, strips))
        margin = max(map(len, strips))
        for owner, shares in strips.items():
            said = ", ".join(f"{_label(b)} {share:.1%}" for b, share in _parts(shares))
            lines.append(f"  {owner:<{margin}}  {said}")
    return "\n".join(lines)


def _panels(space: Space, bits: Sequence[int | None]) -> dict[Kind, dict[str, _Shares]]:
    """Count the elements of each layer and each tensor by their bits."""
    if len(bits) != len(space):
        raise ValueError(f"bits must have {len(space)} entries, got {len(bits)}")
    counts: dict[Kind, dict[str, Counter[int | None]]] = {"weights": {}, "activations": {}}
    for group, b in zip(space.groups, bits, strict=True):
        kind: Kind = "weights" if group.name.startswith(PREFIX["weights"]) else "activations"
        counts[kind].setdefault(group.owner, Counter())[b] += group.num_elements
    return {
        kind: {owner: _sorted(count) for owner, count in strips.items()}
        for kind, strips in counts.items()
        if strips
    }


def _sorted(count: Counter[int | None]) -> _Shares:
    return sorted(count.items(), key=lambda item: -1 if item[0] is None else item[0], reverse=True)


def _whole(strips: Iterable[_Shares]) -> _Shares:
    """Add up the elements of all strips."""
    count: Counter[int | None] = Counter()
    for shares in strips:
        count.update(dict(shares))
    return _sorted(count)


def _parts(shares: _Shares) -> list[tuple[int | None, float]]:
    total = sum(count for _, count in shares)
    return [(b, count / total) for b, count in shares]


def _title(kind: Kind, strips: dict[str, _Shares]) -> str:
    known = [(b, count) for b, count in _whole(strips.values()) if b is not None]
    if not known:
        return f"{kind}: no bits yet"
    average = sum(b * count for b, count in known) / sum(count for _, count in known)
    is_whole = all(b is not None for shares in strips.values() for b, _ in shares)
    return f"{kind}: {average:.2f} bits on average{'' if is_whole else ' so far'}"


def _label(bits: int | None) -> str:
    return "open" if bits is None else f"{bits} bit{'s' if bits != 1 else ''}"


def _color(bits: int | None) -> tuple[int, int, int]:
    return _OPEN if bits is None else _COLORS[bits]


def _write(draw: ImageDraw.ImageDraw, top: int, kind: Kind, strips: dict[str, _Shares]) -> None:
    """Write what stands around a panel."""
    draw.text((_LEFT, top - 17), _title(kind, strips), _INK)
    noun = _NOUNS[kind]
    draw.text((_LEFT + _WIDTH, top - 17), f"shares of each {noun}", _INK, anchor="ra")
    for mark, y in (("100 %", top - 2), ("50 %", top + _STRIPS // 2 - 6), ("0 %", top + 118)):
        draw.text((_LEFT - 6, y), mark, _INK, anchor="ra")
    first, last = next(iter(strips)), next(reversed(strips))
    beneath = top + _STRIPS + 4
    draw.text((_LEFT, beneath), first, _INK)
    draw.text(
        (_LEFT + _WIDTH // 2, beneath),
        f"{len(strips)} {noun}{'s' if len(strips) > 1 else ''}",
        _INK,
        anchor="ma",
    )
    draw.text((_LEFT + _WIDTH, beneath), last, _INK, anchor="ra")
    left = _LEFT + _WIDTH + 14
    draw.text((left, top - 17), f"of all {kind}", _INK)
    for line, (bits, share) in enumerate(_parts(_whole(strips.values()))):
        y = top + 14 * line
        draw.rectangle((left, y, left + 10, y + 10), _color(bits), _INK)
        draw.text((left + 18, y - 1), _label(bits), _INK)
        draw.text((left + 110, y - 1), f"{share:.1%}", _INK, anchor="ra")


def _strip(draw: ImageDraw.ImageDraw, shares: _Shares, left: int, right: int, top: int) -> None:
    """Stack the shares of a strip, the widest at the bottom."""
    reached, below = 0.0, top + _STRIPS
    for bits, share in _parts(shares):
        reached += share
        above = top + _STRIPS - round(_STRIPS * reached)
        if above < below:
            draw.rectangle((left, above, right, below - 1), _color(bits))
        below = above
