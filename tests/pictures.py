"""A COCO-format set of drawn rectangles, and a detector that is small enough for them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("red", "green", "blue")
DETECTOR = Path(__file__).parents[1] / "configs" / "detectors" / "bccd_retinanet.py"
# The smallest RetinaNet that still has a pyramid, for drawn rectangles of 64×96 pixels.
TINY: dict[str, Any] = {
    "model.backbone.base_channels": 4,
    "model.neck.in_channels": [4, 8, 16, 32],
    "model.neck.out_channels": 8,
    "model.bbox_head.in_channels": 8,
    "model.bbox_head.feat_channels": 8,
    "model.bbox_head.stacked_convs": 1,
    "model.bbox_head.anchor_generator.scales_per_octave": 1,
} | {
    f"{part}_dataloader.dataset.{key}": value
    for part in ("train", "val", "test")
    for key, value in (("metainfo.classes", CLASSES), ("pipeline.2.scale", (96, 64)))
}


def draw_set(
    folder: Path,
    sizes: dict[str, int],
    *,
    shape: tuple[int, int] = (64, 96),
    classes: Sequence[str] = CLASSES,
    seed: int = 0,
) -> Path:
    """Draw rectangles, one class a colour, on gray noise; every fifth image has none.

    Args:
        folder: Where ``images/`` and ``annotations/SPLIT.json`` go.
        sizes: Split to its number of images.
        shape: Height and width; every third image is a bit narrower.
        classes: Their names; colours repeat after three.
        seed: Of everything.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, num in sizes.items():
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(num):
            height, width = shape[0], shape[1] - (8 if i % 3 == 2 else 0)
            pixels = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
            name = f"{split}_{i}.png"
            images.append({"id": i, "file_name": name, "height": height, "width": width})
            for _ in range(0 if i % 5 == 4 else int(rng.integers(1, 4))):
                label = int(rng.integers(len(classes)))
                w, h = (int(x) for x in rng.integers(12, 28, 2))
                x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
                pixels[y : y + h, x : x + w] = 30
                pixels[y : y + h, x : x + w, label % 3] = 220
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i,
                        "category_id": label + 1,
                        "bbox": [x, y, w, h],
                        "area": w * h,
                        "iscrowd": 0,
                    }
                )
            Image.fromarray(pixels).save(folder / "images" / name)
        categories = [{"id": k + 1, "name": name} for k, name in enumerate(classes)]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(document))
    return folder
