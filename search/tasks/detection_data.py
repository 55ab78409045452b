"""Images and boxes of a COCO-format set, read by the config's own pipeline, as tensors.

All images of a set stand on one canvas, the least that holds each of them, black to the right and
below: then an example is the same in any batch, and so are its activations' sizes.
"""

import contextlib
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search.errors import InputError

__all__ = ["DetectionData", "dataset_of", "flip_probability"]

# Decoded images that a process keeps.
_CACHE_BYTES = 2 << 30
_NAMED = 5


class DetectionData:
    """One set of images.

    Attributes:
        infos: What is known of each image, as mmdetection tells it.
        classes: Their names, in the order of the labels.
        dropped: Boxes that the file has and the set has not: of no area, less than a pixel wide or
            high, outside the image.

    Args:
        config: Of the data set, such as ``val_dataloader.dataset``.
        pipeline: How an image is read: without randomness.
        divisor: Both sides of the canvas are multiples of it.
        path: Where the config has it, for messages.

    Raises:
        InputError: If the annotations cannot be read, do not have the classes, or images are
            missing.
    """

    def __init__(
        self, config: Mapping[str, Any], pipeline: Sequence[Any], divisor: int, path: str
    ) -> None:
        self._file = Path(str(config.get("data_root") or "")) / str(config.get("ann_file"))
        document = _annotations(self._file, path)
        described = dict(config) | {"pipeline": list(pipeline), "lazy_init": True}
        self._dataset = import_module("mmdet.registry").DATASETS.build(described)
        self.classes = tuple(self._dataset.metainfo["classes"])
        _refuse_other_classes(self.classes, document, self._file, path)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells how long it took
            self._dataset.full_init()
        self.infos: list[dict[str, Any]] = [
            self._dataset.get_data_info(i) for i in range(len(self._dataset))
        ]
        if not self.infos:
            raise InputError(f"{path}: {self._file} must have an image with boxes, got none")
        kept = {info["img_id"] for info in self.infos}
        known = {c["id"] for c in document["categories"] if c["name"] in self.classes}
        given = sum(
            a["image_id"] in kept and a["category_id"] in known and not a.get("ignore")
            for a in document["annotations"]
        )
        self.dropped = given - sum(len(info["instances"]) for info in self.infos)
        _refuse_missing(self.infos, path)
        self.canvas = _canvas(self.infos, pipeline, divisor)
        self.most_boxes = max(1, *(len(info["instances"]) for info in self.infos))
        self._cache: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.infos)

    @cached_property
    def digest(self) -> str:
        """Hash of the annotations and of what the images' files are called and how large."""
        found = hashlib.sha256(self._file.read_bytes())
        for info in self.infos:
            found.update(
                f"{Path(info['img_path']).name}{Path(info['img_path']).stat().st_size}".encode()
            )
        return found.hexdigest()[:16]

    def example(self, index: int) -> dict[str, Tensor]:
        """Return one image and its boxes.

        Returns:
            ``image`` (C, H, W) of bytes, as large as it is; ``boxes`` (G, 4) in its pixels, x1, y1,
            x2, y2, ``labels`` (G,), ``ignored`` (G,) for crowds; ``true_boxes`` (G, 4) in pixels of
            the file; ``scale`` (2,): by which width and height were multiplied.

        Raises:
            InputError: If the file is no image, or of another size than the annotations say.
        """
        found = self._cache.get(index)
        if found is None:
            found = self._read(index)
            if (len(self._cache) + 1) * found["image"].numel() <= _CACHE_BYTES:
                self._cache[index] = found
        return found

    def _read(self, index: int) -> dict[str, Tensor]:
        info = self.infos[index]
        try:
            packed = self._dataset.pipeline(self._dataset.get_data_info(index))
        except (AssertionError, OSError) as error:
            raise InputError(
                f"task.detector: {info['img_path']} must be an image ({error})"
            ) from error
        sample = packed["data_samples"]
        if tuple(sample.ori_shape) != (info["height"], info["width"]):
            raise InputError(
                f"task.detector: {info['img_path']} must be {info['width']}×{info['height']} as "
                f"the annotations say, got {sample.ori_shape[1]}×{sample.ori_shape[0]}"
            )
        boxes, ignored = sample.gt_instances, sample.ignored_instances
        crowd = [i for i in info["instances"] if i["ignore_flag"]]
        plain = [i for i in info["instances"] if not i["ignore_flag"]]
        return {
            "image": packed["inputs"],
            "boxes": torch.cat([_tensor(boxes.bboxes), _tensor(ignored.bboxes)]),
            "labels": torch.cat([boxes.labels, ignored.labels]),
            "ignored": torch.arange(len(info["instances"])) >= len(plain),
            "true_boxes": torch.tensor(
                [i["bbox"] for i in (*plain, *crowd)], dtype=torch.float64
            ).reshape(-1, 4),
            "scale": torch.tensor(sample.scale_factor, dtype=torch.float32),
        }


def dataset_of(loader: Mapping[str, Any], root: str | None) -> dict[str, Any]:
    """Return a loader's data set, without what wraps it, at another root if one is given.

    Raises:
        InputError: If it is not in COCO's format.
    """
    found = loader["dataset"]
    while "dataset" in found:  # RepeatDataset, ClassBalancedDataset, MultiImageMixDataset
        found = found["dataset"]
    if root is not None:
        found = dict(found) | {"data_root": root}
    if "ann_file" not in found or "Coco" not in str(found.get("type")):
        raise InputError(
            f"task.detector.config: the data set must be a CocoDataset, got {found.get('type')}"
        )
    return dict(found)


def flip_probability(config: Mapping[str, Any]) -> float:
    """Return how often the pipeline mirrors an image left to right."""
    for step in config.get("pipeline", ()):
        if step["type"] == "RandomFlip" and step.get("direction", "horizontal") == "horizontal":
            return float(step.get("prob") or 0.0)
    return 0.0


def _annotations(file: Path, path: str) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: {file} must be annotations in COCO's format ({error})"
        ) from error
    missing = [k for k in ("images", "annotations", "categories") if k not in document]
    if missing:
        raise InputError(f"{path}: {file} must have {', '.join(missing)}, as COCO's format has")
    return dict(document)


def _refuse_other_classes(
    classes: Sequence[str], document: Mapping[str, Any], file: Path, path: str
) -> None:
    names = [category["name"] for category in document["categories"]]
    missing = [name for name in classes if name not in names]
    if missing:
        raise InputError(
            f"{path}: metainfo.classes must be categories of {file} ({_first(names)}), got "
            f"{_first(missing)}: give metainfo=dict(classes={tuple(names[:_NAMED])!r}"
            f"{'' if len(names) <= _NAMED else ' …'})"
        )


def _refuse_missing(infos: Sequence[Mapping[str, Any]], path: str) -> None:
    missing = [info["img_path"] for info in infos if not Path(info["img_path"]).is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(infos)} images are missing: {_first(missing)}"
        )


def _first(names: Sequence[str]) -> str:
    return ", ".join(map(str, names[:_NAMED])) + (" …" if len(names) > _NAMED else "")


def _canvas(
    infos: Sequence[Mapping[str, Any]], pipeline: Sequence[Any], divisor: int
) -> tuple[int, int]:
    """Return height and width that hold every image once it is resized."""
    resized = import_module("mmcv").image.rescale_size
    sizes = {(info["width"], info["height"]) for info in infos}
    for step in pipeline:
        if step["type"] not in {"Resize", "FixScaleResize"}:
            continue
        scale = tuple(step["scale"])
        sizes = {resized(size, scale) if step.get("keep_ratio") else scale for size in sizes}
    width, height = (max(size[axis] for size in sizes) for axis in (0, 1))
    return math.ceil(height / divisor) * divisor, math.ceil(width / divisor) * divisor


def _tensor(boxes: Any) -> Tensor:
    """Return boxes, shape (G, 4), of mmdetection's box type or of plain arrays."""
    found = getattr(boxes, "tensor", boxes)
    if not isinstance(found, Tensor):
        found = torch.from_numpy(np.asarray(found, dtype=np.float32))
    return found.reshape(-1, 4).float()
