"""A few images with what was annotated in them and what networks found, kept for the report."""

import base64
import io
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from hawq.task import Task

__all__ = [
    "PICTURES_FILE",
    "Boxes",
    "Pictured",
    "PicturedImage",
    "PicturesDocument",
    "pictured",
    "read_jpeg",
    "take_pictures",
]

# In a run's folder.
PICTURES_FILE = "pictures.json"
# Images that are shown, spread over the search split.
_NUM_IMAGES = 4
_QUALITY = 85


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Boxes(_Document):
    """Boxes of one image, annotated or found."""

    boxes: list[tuple[float, float, float, float]] = Field(
        description="Corners x1, y1, x2, y2 in pixels of the image."
    )
    labels: list[int] = Field(description="Numbers in class_names.")
    scores: list[float] | None = Field(None, description="In [0, 1]; null: annotated.")


class PicturedImage(_Document):
    """An image with the boxes of several sources."""

    jpeg: str = Field(description="The image, base64.")
    panels: dict[str, Boxes] = Field(description="By source, in the order to show them.")


class PicturesDocument(_Document):
    """``pictures.json`` of a run of a detector."""

    class_names: list[str]
    images: list[PicturedImage]


class Pictured(Task, Protocol):
    """A task whose network finds boxes in images."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        ...

    def picture(self, split: str, index: int) -> tuple[NDArray[np.uint8], Boxes]:
        """Return an image, RGB, shape (H, W, 3), with its annotated boxes."""
        ...

    def found(self, model: nn.Module, split: str, index: int) -> Boxes:
        """Return the boxes that a network finds there, with their scores."""
        ...


def pictured(task: Task) -> Pictured | None:
    """Return the same task, if its network finds boxes in images."""
    # Not isinstance: what wraps a task passes on what it has.
    takes = hasattr(task, "picture") and hasattr(task, "found")
    return cast(Pictured, task) if takes else None


def take_pictures(task: Pictured, networks: dict[str, nn.Module]) -> PicturesDocument:
    """Let networks look at a few images of the search split.

    Args:
        task: Gives the images.
        networks: By the name to show, in eval mode.
    """
    size = task.size("search")
    images = []
    for index in np.linspace(0, size - 1, min(size, _NUM_IMAGES)).astype(int).tolist():
        pixels, true = task.picture("search", index)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
        panels = {"annotated": true} | {
            name: task.found(network, "search", index) for name, network in networks.items()
        }
        jpeg = base64.b64encode(file.getvalue()).decode()
        images.append(PicturedImage(jpeg=jpeg, panels=panels))
    return PicturesDocument(class_names=list(task.classes), images=images)


def read_jpeg(text: str) -> NDArray[np.uint8]:
    """Return the pixels of ``PicturedImage.jpeg``, RGB, shape (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))
