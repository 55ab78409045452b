"""A COCO-format set of drawn rectangles, and a detector that is small enough for them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("red", "green", "blue")
DETECTOR = Path(__file__).parents[1] / "configs" / "detectors" / "bccd_retinanet.py"
# The smallest RetinaNet that still has a pyramid, for drawn rectangles of 64×96 pixels. Boxes that
# it is hardly sure of count: mAP is above 0 after few epochs.
TINY: dict[str, Any] = {
    "model.backbone.base_channels": 4,
    "model.neck.in_channels": [4, 8, 16, 32],
    "model.neck.out_channels": 8,
    "model.bbox_head.in_channels": 8,
    "model.bbox_head.feat_channels": 8,
    "model.bbox_head.stacked_convs": 1,
    "model.bbox_head.anchor_generator.scales_per_octave": 1,
    "model.test_cfg.score_thr": 0.005,
    "model.test_cfg.nms_pre": 100,
} | {
    f"{part}_dataloader.dataset.{key}": value
    for part in ("train", "val", "test")
    for key, value in (("metainfo.classes", CLASSES), ("pipeline.2.scale", (96, 64)))
}

_SHIPPED: dict[str, Any] = {
    "model.backbone": {
        "_delete_": True,
        "type": "ResNet",
        "depth": 18,
        "base_channels": 8,
        "norm_cfg": {"type": "BN"},
        "norm_eval": True,
        "out_indices": (0, 1, 2, 3),
        "style": "pytorch",
    },
    "model.neck.in_channels": [8, 16, 32, 64],
    "model.neck.out_channels": 8,
} | {
    f"{part}_dataloader.dataset.{key}": value
    for part in ("train", "val", "test")
    for key, value in (
        ("metainfo", {"classes": CLASSES}),
        ("ann_file", f"annotations/{part}.json"),
        ("data_prefix.img", "images/"),
        (f"pipeline.{2 if part == 'train' else 1}.scale", (96, 64)),
    )
}
# mmdetection's smallest one of one stage without a loss module; its training set is repeated.
SSD = "mmdet::ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py"
SSD_OPTIONS: dict[str, Any] = {
    ("train_dataloader.dataset." if part == "train" else f"{part}_dataloader.")
    + f"dataset.{key}": value
    for part in ("train", "val", "test")
    for key, value in (
        ("metainfo", {"classes": CLASSES}),
        ("ann_file", f"annotations/{part}.json"),
        ("data_prefix.img", "images/"),
    )
} | {f"{part}_dataloader.dataset.pipeline.1.scale": (96, 64) for part in ("val", "test")}
# Of mmdetection's own configs to what makes them small.
SHIPPED: dict[str, dict[str, Any]] = {
    "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": _SHIPPED
    | {
        "model.rpn_head.in_channels": 8,
        "model.rpn_head.feat_channels": 8,
        "model.rpn_head.anchor_generator.scales": [4],
        "model.roi_head.bbox_roi_extractor.out_channels": 8,
        "model.roi_head.bbox_head.in_channels": 8,
        "model.roi_head.bbox_head.fc_out_channels": 16,
        "model.roi_head.bbox_head.num_classes": 3,
        "model.train_cfg.rpn.sampler.num": 32,
        "model.train_cfg.rcnn.sampler.num": 16,
        "model.train_cfg.rpn_proposal.max_per_img": 50,
        "model.test_cfg.rpn.max_per_img": 50,
    },
    "mmdet::atss/atss_r50_fpn_1x_coco.py": _SHIPPED
    | {
        "model.bbox_head.in_channels": 8,
        "model.bbox_head.feat_channels": 8,
        "model.bbox_head.stacked_convs": 1,
        "model.bbox_head.num_classes": 3,
        "model.bbox_head.norm_cfg": {"type": "GN", "num_groups": 4, "requires_grad": True},
    },
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
