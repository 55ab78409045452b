"""Detections side by side: what was annotated in an image, and what each network found there."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from search.quantities import listed
from search.report.palette import Look, looks
from search.report.template import fill

__all__ = ["DetectionPicture", "Panel", "detection_pictures"]

Place = tuple[float, float, float, float]  # left, top, width and height, in pixels of the image

_MAX_WIDTH = 800  # pixels of an embedded image: twice a panel's, for dense screens
_QUALITY = 82
_LETTERS = 34  # letters of a tag, each as high as wide, that would fill the width of a panel
# In SVG's units per plotly's name of a dash, of a line of width 1.
_DASHES = {"solid": "none", "dash": "4 2", "dot": "1 1.5", "dashdot": "5 2 1 2"}


@dataclass(frozen=True, slots=True)
class Panel:
    """Boxes of one image: annotated ones, or those that a network found.

    Attributes:
        boxes: Corners x₁, y₁, x₂, y₂, shape (K, 4), in pixels of the image.
        labels: Their classes, shape (K,), from 0.
        scores: How sure the network is, shape (K,), in [0, 1]; None for annotated boxes.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class DetectionPicture:
    """An image with the boxes of several sources.

    Attributes:
        image: RGB, shape (H, W, 3).
        panels: Boxes by the name of their source, in the order in which they are shown.
        class_names: Of all classes, by label.

    Raises:
        ValueError: If shapes do not agree, or a label has no name.
    """

    image: NDArray[np.uint8]
    panels: Mapping[str, Panel]
    class_names: Sequence[str]

    def __post_init__(self) -> None:
        if self.image.dtype != np.uint8 or self.image.ndim != 3 or self.image.shape[2] != 3:
            raise ValueError(
                f"image must be uint8 of shape (H, W, 3), got {self.image.dtype} of "
                f"shape {self.image.shape}"
            )
        if not self.panels:
            raise ValueError("panels must hold at least one, got none")
        for name, panel in self.panels.items():
            _check(name, panel, len(self.class_names))


def detection_pictures(pictures: Sequence[DetectionPicture], *, least_score: float = 0.3) -> Markup:
    """Show pictures as rows of panels, with a legend of their classes.

    The part of a page stands by itself: it brings its style, takes the page's ink and loads
    nothing. Every image is embedded once.

    Args:
        pictures: One a row.
        least_score: Boxes that a network is less sure of are left out; the page says so.

    Returns:
        HTML; a page holds it once, for its elements have ids.

    Raises:
        ValueError: If there are no pictures.
    """
    if not pictures:
        raise ValueError("pictures must hold at least one, got none")
    occurring = _names(pictures, least_score)
    look = looks(occurring)
    return Markup(
        fill(
            "detection_pictures.html",
            {},
            rows=[
                {
                    "jpeg": _jpeg(picture.image),
                    "height": picture.image.shape[0],
                    "width": picture.image.shape[1],
                    "panels": [
                        _drawn(name, panel, picture, look, least_score)
                        for name, panel in picture.panels.items()
                    ],
                }
                for picture in pictures
            ],
            legend=[(name, look[name].color, _DASHES[look[name].dash]) for name in occurring],
            least_score=least_score,
        )
    )


@dataclass(frozen=True, slots=True)
class _Box:
    """A box as it is drawn, and its text on a tag."""

    place: Place
    text: str
    tag: Place
    color: str
    ink: str
    dash: str


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A panel as it is drawn, and what is in it in words."""

    name: str
    boxes: tuple[_Box, ...]
    found: str


def _check(name: str, panel: Panel, num_classes: int) -> None:
    num = len(panel.boxes)
    shapes = [panel.boxes.shape, panel.labels.shape]
    shapes += [] if panel.scores is None else [panel.scores.shape]
    if shapes != [(num, 4), (num,), (num,)][: len(shapes)]:
        raise ValueError(
            f"panel {name} must have shapes (K, 4), (K,) and (K,), "
            f"got {', '.join(map(str, shapes))}"
        )
    if num and not 0 <= panel.labels.min() <= panel.labels.max() < num_classes:
        raise ValueError(
            f"labels of panel {name} must be within 0..{num_classes - 1}, "
            f"got {panel.labels.min()}..{panel.labels.max()}"
        )


def _names(pictures: Sequence[DetectionPicture], least_score: float) -> list[str]:
    """Name the classes that occur in what is shown, by label."""
    found = {
        (int(label), picture.class_names[label])
        for picture in pictures
        for panel in picture.panels.values()
        for label in panel.labels[_is_shown(panel, least_score)]
    }
    return list(dict.fromkeys(name for _, name in sorted(found)))


def _is_shown(panel: Panel, least_score: float) -> NDArray[np.bool_]:
    if panel.scores is None:
        return np.ones(len(panel.boxes), bool)
    is_shown: NDArray[np.bool_] = panel.scores >= least_score
    return is_shown


def _drawn(
    name: str,
    panel: Panel,
    picture: DetectionPicture,
    look: Mapping[str, Look],
    least_score: float,
) -> _Drawn:
    boxes: list[_Box] = []
    for i in _order(panel, least_score):
        class_name = picture.class_names[panel.labels[i]]
        text = class_name if panel.scores is None else f"{class_name} {panel.scores[i]:.2f}"
        left, top, right, bottom = panel.boxes[i].tolist()
        place = (left, top, right - left, bottom - top)
        tag = _tag(place, len(text), picture.image.shape[:2], [box.tag for box in boxes])
        color = look[class_name].color
        boxes.append(_Box(place, text, tag, color, _ink(color), _DASHES[look[class_name].dash]))
    counts = Counter(int(label) for label in panel.labels[_is_shown(panel, least_score)])
    found = [f"{counts[label]} {picture.class_names[label]}" for label in sorted(counts)]
    return _Drawn(name, tuple(boxes), listed(found) or "nothing")


def _order(panel: Panel, least_score: float) -> NDArray[np.int64]:
    """Return which boxes are shown, the likeliest first: its tag has the best place."""
    scores = np.zeros(len(panel.boxes)) if panel.scores is None else panel.scores
    order = np.argsort(-scores, kind="stable")
    return order[_is_shown(panel, least_score)[order]]


def _tag(box: Place, num_letters: int, shape: tuple[int, ...], others: Sequence[Place]) -> Place:
    """Find a tag's place at an edge of its box where it hides least of the others."""
    image_height, image_width = shape
    # Text grows with the image, which is scaled to its panel.
    size = image_width / _LETTERS
    width, height = (0.56 * num_letters + 0.5) * size, 1.25 * size
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    places = [
        (min(max(x, 0.0), max(image_width - width, 0.0)), y, width, height)
        for x in (left, right - width)
        for y in (top - height, top, bottom, bottom - height)
        if 0 <= y <= image_height - height
    ]
    inside = (max(left, 0.0), min(max(top, 0.0), image_height - height), width, height)
    return min(places or [inside], key=lambda place: sum(_shared(place, o) for o in others))


def _shared(one: Place, other: Place) -> float:
    """Return the area that two places share."""
    width, height = (
        min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i]) for i in (0, 1)
    )
    return max(width, 0.0) * max(height, 0.0)


def _ink(color: str) -> str:
    """Return black or white, whichever is read better on a colour (WCAG's contrast)."""
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return "#000" if luminance > 0.18 else "#fff"


def _jpeg(image: NDArray[np.uint8]) -> str:
    """Return an image as the base64 text of a JPEG, no wider than a page shows it."""
    picture = Image.fromarray(image)
    picture.thumbnail((_MAX_WIDTH, picture.height))
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=_QUALITY)
    return base64.b64encode(written.getvalue()).decode("ascii")
