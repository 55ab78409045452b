"""Object detection as a task: any detector of mmdetection 3.x, COCO's format, COCO's mAP."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hawq.task import Factor, moved
from search.errors import InputError
from search.pictured import Boxes
from search.tasks.average_precision import matched, pseudo_values
from search.tasks.detection_data import DetectionData, dataset_of, flip_probability
from search.tasks.detection_losses import image_losses, output_factors, smoothing
from search.tasks.detectors import build_detector, detector_config

__all__ = ["DetectionBatch", "DetectionTask"]

# What an example is, by name; each tensor's first axis is the examples.
DetectionBatch = dict[str, Tensor]
_Part = Literal["train", "val", "test"]
_PARTS: tuple[_Part, ...] = ("train", "val", "test")
# Steps of a pipeline that make another picture of an image.
_NOT_VARIED = {
    *("Albu", "CachedMixUp", "CachedMosaic", "CopyPaste", "CutOut", "Expand", "MinIoURandomCrop"),
    *("MixUp", "Mosaic", "PhotoMetricDistortion", "RandomAffine", "RandomChoice"),
    *("RandomChoiceResize", "RandomCrop", "RandomErasing", "RandomResize", "RandomShift"),
    *("YOLOXHSVRandomAug",),
}


@dataclass(frozen=True, slots=True)
class DetectionTask:
    """A detector with its data; see ``hawq.task.Task``.

    Images are read by the pipeline of the config's ``val_dataloader``, which has no randomness, and
    mirrored in training as often as its ``train_dataloader`` does; what else the latter varies is
    left out. ``"train"`` is the training data, ``"test"`` the data of ``test_dataloader``. The
    search split is the data of ``val_dataloader`` where that is another set, else images that are
    held out from the training data.

    An example's loss is normalized by its own boxes. Its score is a jackknife pseudo-value of
    COCO's mean average precision (``search.tasks.average_precision``): their mean is the split's.

    Attributes:
        config: mmdetection's config.
        root: Folder that takes the place of every ``data_root``; None leaves them.
        options: Dotted keys of the config to other values, as JSON.
        search_size: Training images to hold out, drawn with ``split_seed``.
        split_seed: Seed of the draw and of the network's first weights.
        from_checkpoint: Whether the network comes trained.
        beta: Of the smooth L1 loss (Girshick, 2015) that stands for boxes' L1 losses in the
            curvature; 1/9 is mmdetection's own where it uses that loss.
        smooth: Whether it does stand for them, here.
    """

    config: str
    root: str | None = None
    options: str = "{}"
    search_size: int = 500
    split_seed: int = 0
    from_checkpoint: bool = False
    beta: float = 1 / 9
    smooth: bool = False

    @property
    def score_name(self) -> str:
        """COCO's mean average precision of boxes, IoU 0.50 to 0.95, all areas."""
        return "mAP"

    @property
    def search_seen(self) -> bool:
        """Whether the network was trained on the images that are held out."""
        return self.from_checkpoint and self._holds_out

    @property
    def fingerprint(self) -> str:
        """Hash of the description, the config, the annotations and the images' names and sizes."""
        described = asdict(self) | {"root": None, "config": self._config.pretty_text}
        digests = [self._data(part).digest for part in _PARTS]
        text = json.dumps([described, digests], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self._data("train").classes

    def smoothed(self) -> tuple["DetectionTask", str]:
        """Return the same with smooth L1 losses for boxes' L1 losses, and say so."""
        return replace(self, smooth=True), smoothing(self.model(), self.beta)

    def remarks(self) -> list[str]:
        """Say what of the data is not used."""
        found = []
        for part in _PARTS:
            dropped = self._data(part).dropped
            if dropped:
                found.append(
                    f"{dropped} boxes of {part} are dropped: of no area, less than a pixel wide or "
                    "high, or outside their image"
                )
        steps = dataset_of(self._config.train_dataloader, None)["pipeline"]
        left_out = [step["type"] for step in steps if step["type"] in _NOT_VARIED]
        if left_out:
            found.append(f"images are not varied by {', '.join(left_out)}, only mirrored")
        return found

    def model(self) -> nn.Module:
        """Build the detector with seeded random weights, in eval mode.

        Raises:
            InputError: If it cannot be built, or its head has other classes than the data.
        """
        model = build_detector(self._config, self.split_seed)
        heads = [m for m in model.modules() if hasattr(m, "num_classes") and hasattr(m, "loss_cls")]
        for head in heads[-1:]:  # the last stage's: a region proposal network knows one class
            if head.num_classes != len(self.classes):
                raise InputError(
                    f"task.detector.config: num_classes must be {len(self.classes)}, as the data "
                    f"has ({', '.join(self.classes)}), got {head.num_classes}"
                )
        return model

    def size(self, split: str) -> int:
        """Count the images of a split."""
        return len(self._indices(split))

    def batch(self, split: str, indices: Tensor) -> DetectionBatch:
        """Return images on the set's canvas, normalized, with their boxes.

        ``images`` (N, C, H, W); ``size`` (N, 2), height and width within the canvas; ``boxes``
        (N, G, 4), ``labels`` (N, G), −1 where there is no box, ``ignored`` (N, G); ``true_boxes``
        (N, G, 4) in pixels of the files; ``scale`` (N, 2); ``seed`` (N,): the image's
        number in its set; ``part`` (N,): the set's.
        """
        part = self._part(split)
        data = self._data(part)
        chosen = self._indices(split)[indices].tolist()
        examples = [data.example(i) for i in chosen]
        height, width = data.canvas
        return {
            "images": torch.stack([self._on_canvas(e["image"], height, width) for e in examples]),
            "size": torch.tensor([e["image"].shape[-2:] for e in examples]),
            "boxes": _padded([e["boxes"] for e in examples], data.most_boxes, 0),
            "labels": _padded([e["labels"] for e in examples], data.most_boxes, -1),
            "ignored": _padded([e["ignored"] for e in examples], data.most_boxes, 0),
            "true_boxes": _padded([e["true_boxes"] for e in examples], data.most_boxes, 0),
            "scale": torch.stack([e["scale"] for e in examples]),
            "seed": torch.tensor(chosen),
            "part": torch.full((len(chosen),), _PARTS.index(part)),
        }

    def augment(self, batch: DetectionBatch, generator: torch.Generator) -> DetectionBatch:
        """Mirror some images left to right, within their own width."""
        probability = flip_probability(dataset_of(self._config.train_dataloader, None))
        mirrored = torch.rand(len(batch["images"]), generator=generator) < probability
        width = batch["size"][:, 1, None]
        x = torch.arange(batch["images"].shape[-1]).expand(len(mirrored), -1)
        x = torch.where(mirrored[:, None] & (x < width), width - 1 - x, x)
        images = batch["images"].gather(3, x[:, None, None].expand_as(batch["images"]))
        left, top, right, bottom = batch["boxes"].unbind(-1)
        other = torch.stack([width - right, top, width - left, bottom], -1)
        there = (batch["labels"] >= 0) & mirrored[:, None]
        boxes = torch.where(there[..., None], other.to(left.dtype), batch["boxes"])
        return batch | {"images": images, "boxes": boxes}

    def inputs(self, batch: DetectionBatch) -> Tensor:
        """Return the images."""
        return batch["images"]

    def losses(self, model: nn.Module, batch: DetectionBatch) -> Tensor:
        """Return each image's loss, the sum of the detector's own, shape (N,).

        Raises:
            InputError: If one is NaN or infinite, outside of training, where that is divergence.
        """
        found = image_losses(
            model,
            batch["images"],
            self._samples(batch),
            smooth=self.beta if self.smooth else None,
            seeds=batch["seed"].tolist(),
        )
        wrong = ~torch.isfinite(found.detach())
        if not model.training and bool(wrong.any()):
            raise InputError(
                f"task.detector: the loss of {self._names(batch)[int(wrong.nonzero()[0])]} must be "
                f"finite, got {found.detach()[wrong][0]:g}: check its boxes and the checkpoint"
            )
        return found

    def curvature(
        self, model: nn.Module, batch: DetectionBatch
    ) -> tuple[Tensor, Sequence[Factor]] | None:
        """Return what the losses are of, shape (N, M), and the factors of their Hessian."""
        return output_factors(
            model,
            batch["images"],
            self._samples(batch),
            smooth=self.beta if self.smooth else None,
            seeds=batch["seed"].tolist(),
        )

    @torch.no_grad()
    def scores(self, model: nn.Module, batch: DetectionBatch) -> Tensor:
        """Return each image's best detections, matched with its boxes, for ``pooled``."""
        found = model.predict(batch["images"], self._samples(batch))  # type: ignore[operator]
        rows = []
        for n, sample in enumerate(found):
            there = batch["labels"][n] >= 0
            rows.append(
                matched(
                    sample.pred_instances.bboxes.cpu(),
                    sample.pred_instances.scores.cpu(),
                    sample.pred_instances.labels.cpu(),
                    batch["true_boxes"][n][there].cpu(),
                    batch["labels"][n][there].cpu(),
                    batch["ignored"][n][there].cpu(),
                    num_classes=len(self.classes),
                )
            )
        return torch.stack(rows)

    def pooled(self, values: Tensor) -> Tensor:
        """Return each image's pseudo-value of the mAP, shape (N,)."""
        return pseudo_values(values)

    def _names(self, batch: DetectionBatch) -> list[str]:
        """Return the files of a batch's images."""
        infos = self._data(_PARTS[int(batch["part"][0])]).infos
        return [str(infos[index]["img_path"]) for index in batch["seed"].tolist()]

    def picture(self, split: str, index: int) -> tuple[NDArray[np.uint8], Boxes]:
        """Return an image, RGB, shape (H, W, 3), with its annotated boxes."""
        data = self._data(self._part(split))
        example = data.example(int(self._indices(split)[index]))
        plain = ~example["ignored"]
        boxes = Boxes(
            boxes=example["boxes"][plain].tolist(), labels=example["labels"][plain].tolist()
        )
        return example["image"].flip(0).permute(1, 2, 0).numpy(), boxes  # read as blue, green, red

    @torch.no_grad()
    def found(self, model: nn.Module, split: str, index: int) -> Boxes:
        """Return the boxes that a network finds in that image, with their scores."""
        batch = moved(self.batch(split, torch.tensor([index])), next(model.parameters()).device)
        (sample,) = model.predict(batch["images"], self._samples(batch), rescale=False)  # type: ignore[operator]
        found = sample.pred_instances
        return Boxes(
            boxes=found.bboxes.tolist(), labels=found.labels.tolist(), scores=found.scores.tolist()
        )

    @property
    def _config(self) -> Any:
        return detector_config(self.config, json.loads(self.options))

    @property
    def _holds_out(self) -> bool:
        val, test = (
            dataset_of(self._config[f"{part}_dataloader"], None)["ann_file"]
            for part in ("val", "test")
        )
        return bool(val == test)

    def _part(self, split: str) -> _Part:
        if split not in {"train", "search", "test"}:
            raise ValueError(f"split must be 'train', 'search' or 'test', got {split!r}")
        if split == "test":
            return "test"
        return "train" if split == "train" or self._holds_out else "val"

    def _data(self, part: _Part) -> DetectionData:
        return _load(self.config, self.options, self.root, part)

    def _indices(self, split: str) -> Tensor:
        """Return the images of a split as indices into its part."""
        num = len(self._data(self._part(split)))
        if split == "test" or not self._holds_out:
            return torch.arange(num)
        generator = torch.Generator().manual_seed(self.split_seed)
        drawn = torch.randperm(num, generator=generator)
        if split == "search":
            return drawn[: self.search_size]
        return drawn[self.search_size :].sort().values

    def _on_canvas(self, image: Tensor, height: int, width: int) -> Tensor:
        """Normalize an image as the config's preprocessor does, and put it into the corner."""
        given = self._config.model.data_preprocessor
        pixels = image.flip(0) if given.get("bgr_to_rgb") else image
        normal = pixels.float()
        if given.get("mean") is not None:
            mean, std = (torch.tensor(given[key]).view(-1, 1, 1) for key in ("mean", "std"))
            normal = (normal - mean) / std
        canvas = normal.new_full((len(normal), height, width), float(given.get("pad_value", 0)))
        canvas[:, : image.shape[1], : image.shape[2]] = normal
        return canvas

    def _samples(self, batch: DetectionBatch) -> list[Any]:
        """Return what mmdetection wants to know of the images."""
        structures = import_module("mmengine.structures")
        sample = import_module("mmdet.structures").DetDataSample
        canvas = tuple(batch["images"].shape[-2:])
        found = []
        for n in range(len(batch["images"])):
            height, width = batch["size"][n].tolist()
            described = sample(
                metainfo={
                    "img_id": int(batch["seed"][n]),
                    "img_shape": (height, width),
                    "ori_shape": (height, width),
                    "pad_shape": canvas,
                    "batch_input_shape": canvas,
                    "scale_factor": tuple(batch["scale"][n].tolist()),
                }
            )
            for name, there in (
                ("gt_instances", ~batch["ignored"][n]),
                ("ignored_instances", batch["ignored"][n]),
            ):
                chosen = (batch["labels"][n] >= 0) & there
                # Targets are as exact as anchors, which are float32 in any network.
                boxes, labels = batch["boxes"][n][chosen].float(), batch["labels"][n][chosen]
                setattr(described, name, structures.InstanceData(bboxes=boxes, labels=labels))
            found.append(described)
        return found


@lru_cache(maxsize=6)
def _load(config: str, options: str, root: str | None, part: _Part) -> DetectionData:
    """Load a set; a process does so once."""
    found = detector_config(config, json.loads(options))
    where = f"task.detector.config: {config}: {part}_dataloader"
    # Also trained on by the pipeline without randomness; what is wrapped around the set repeats it.
    pipeline = dataset_of(found.val_dataloader, None)["pipeline"]
    divisor = int(found.model.data_preprocessor.get("pad_size_divisor", 1))
    return DetectionData(dataset_of(found[f"{part}_dataloader"], root), pipeline, divisor, where)


def _padded(values: Sequence[Tensor], length: int, fill: float) -> Tensor:
    """Stack tensors of different lengths, shape (N, length, …)."""
    first = values[0]
    found = first.new_full((len(values), length, *first.shape[1:]), fill)
    for row, value in zip(found, values, strict=True):
        row[: len(value)] = value
    return found
