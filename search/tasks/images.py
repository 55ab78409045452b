"""Image sets held in memory as bytes: scikit-learn's digits and CIFAR-10."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from search.errors import InputError

__all__ = ["ImageSet", "load_images"]


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Training and test images of one set.

    Attributes:
        images: Split (``"train"`` or ``"test"``) to bytes, shape (N, C, H, W).
        labels: Split to class indices, shape (N,), int64.
        mean: Of the network's expected input in [0, 1], shape (C, 1, 1).
        std: Likewise.
        shift: Pixels by which augmentation may move an image.
        flips: Whether augmentation may mirror it.
    """

    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    mean: Tensor
    std: Tensor
    shift: int
    flips: bool

    @property
    def num_classes(self) -> int:
        """Classes; labels run from 0."""
        return int(self.labels["train"].max()) + 1

    def digest(self) -> str:
        """Hash every pixel and label."""
        digest = hashlib.sha256()
        for split in ("train", "test"):
            digest.update(self.images[split].numpy().data)
            digest.update(self.labels[split].numpy().data)
        return digest.hexdigest()[:16]


@lru_cache(maxsize=2)
def load_images(name: str, root: str | None) -> ImageSet:
    """Load a set by name; a process loads each once.

    Args:
        name: ``"digits"`` or ``"cifar10"``.
        root: Folder of the files, for sets that are read from disk.

    Raises:
        InputError: If the folder is missing or holds nothing that can be read.
    """
    loaders: dict[str, Callable[[str | None], ImageSet]] = {"digits": _digits, "cifar10": _cifar10}
    return loaders[name](root)


def _digits(_: str | None) -> ImageSet:
    from sklearn.datasets import load_digits  # noqa: PLC0415  half a second, only where it is used

    bunch = load_digits()
    pixels = torch.from_numpy((bunch.images * (255 / 16)).round().astype(np.uint8))[:, None]
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    # The set has no split of its own: one image in five is the test set.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = {"test": order[: len(labels) // 5], "train": order[len(labels) // 5 :]}
    return ImageSet(
        {split: pixels[part] for split, part in parts.items()},
        {split: labels[part] for split, part in parts.items()},
        torch.tensor([0.305]).view(1, 1, 1),
        torch.tensor([0.376]).view(1, 1, 1),
        shift=1,
        flips=False,
    )


def _cifar10(root: str | None) -> ImageSet:
    folder = Path(root or "")
    if root is None or not folder.is_dir():
        raise InputError(
            f"task.root: the folder of CIFAR-10 must exist, got {root!r}; it holds "
            "cifar-10-batches-py (the official python batches) or train_00.webp … (mosaics)"
        )
    if (folder / "labels.npz").is_file():
        images, labels = _mosaics(folder)
    else:
        images, labels = _python_batches(folder)
    return ImageSet(
        images,
        labels,
        torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
        shift=4,
        flips=True,
    )


def _mosaics(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read WebP files of 5000 tiles each, 50 rows of 100, row by row."""
    from PIL import Image  # noqa: PLC0415

    images, labels = {}, {}
    with np.load(folder / "labels.npz") as archive:
        for split in ("train", "test"):
            labels[split] = torch.from_numpy(archive[split].astype(np.int64))
            tiles = []
            for path in sorted(folder.glob(f"{split}_*.webp")):
                grid = np.asarray(Image.open(path).convert("RGB"))
                grid = grid.reshape(-1, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3)
                tiles.append(grid.reshape(-1, 3, 32, 32))
            found = sum(map(len, tiles))
            if found != len(labels[split]):
                raise InputError(
                    f"task.root: {folder} must hold {len(labels[split])} {split} images in "
                    f"{split}_*.webp, got {found}"
                )
            images[split] = torch.from_numpy(np.concatenate(tiles))
    return images, labels


def _python_batches(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from torchvision.datasets import CIFAR10  # noqa: PLC0415  a second, only where it is used

    images, labels = {}, {}
    for split in ("train", "test"):
        try:
            data = CIFAR10(str(folder), train=split == "train", download=False)
        except RuntimeError as error:
            raise InputError(
                f"task.root: {folder} must hold cifar-10-batches-py or train_00.webp …, "
                f"got neither ({error})"
            ) from error
        images[split] = torch.from_numpy(data.data.transpose(0, 3, 1, 2).copy())
        labels[split] = torch.tensor(data.targets)
    return images, labels
