"""How a method and a bit-width look, in every figure and table of a report alike."""

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Look", "looks", "width_color"]

# Okabe and Ito (2008), told apart with any colour vision; without their yellow, too pale on white.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon", "cross")
# The same markers as SVG paths, in a box from −6 to 6.
_PATHS = {
    "circle": "M5 0A5 5 0 1 1-5 0A5 5 0 1 1 5 0Z",
    "square": "M-4.5-4.5H4.5V4.5H-4.5Z",
    "diamond": "M0-6L6 0L0 6L-6 0Z",
    "triangle-up": "M0-5L5.5 4.5H-5.5Z",
    "x": "M0-2L3-5L5-3L2 0L5 3L3 5L0 2L-3 5L-5 3L-2 0L-5-3L-3-5Z",
    "star": "M0-6L1.5-2L6-2L2.3.8L3.6 5L0 2.5L-3.6 5L-2.3.8L-6-2L-1.5-2Z",
    "hexagon": "M-4.5-2.6L0-5.2L4.5-2.6V2.6L0 5.2L-4.5 2.6Z",
    "cross": "M-1.6-5.5H1.6V-1.6H5.5V1.6H1.6V5.5H-1.6V1.6H-5.5V-1.6H-1.6Z",
}
_DASHES = ("solid", "dash", "dot", "dashdot")
_FEW, _MANY = (0xF3, 0xF7, 0xFB), (0x08, 0x35, 0x68)


@dataclass(frozen=True, slots=True)
class Look:
    """A colour, a marker and a line, in plotly's names."""

    color: str
    symbol: str
    dash: str

    @property
    def path(self) -> str:
        """The marker as an SVG path, in a box from −6 to 6."""
        return _PATHS[self.symbol]


def looks(methods: Sequence[str]) -> dict[str, Look]:
    """Give every method a look; the first 28 differ in colour or line, the first 56 in marker."""
    return {
        method: Look(
            _COLORS[i % len(_COLORS)],
            _SYMBOLS[i % len(_SYMBOLS)],
            _DASHES[i // len(_COLORS) % len(_DASHES)],
        )
        for i, method in enumerate(methods)
    }


def width_color(bits: float) -> str:
    """Shade a width, or a mean of widths: the darker, the more bits, from 1 to 8."""
    part = min(max((bits - 1) / 7, 0), 1)
    mixed = (few + (many - few) * part for few, many in zip(_FEW, _MANY, strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)
