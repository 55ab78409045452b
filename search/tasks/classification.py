"""Image classification as a task: softmax cross-entropy, top-1 accuracy."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from search.errors import InputError
from search.tasks.cross_entropy import Classes
from search.tasks.factories import Network
from search.tasks.images import ImageSet, load_images
from search.tasks.networks import SmallResNet

__all__ = ["ClassificationTask"]

ImageBatch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class ClassificationTask(Classes):
    """A classifier of small images with its data; see ``hawq.task.Task``.

    Attributes:
        data: ``"digits"`` or ``"cifar10"``.
        root: Folder of the data; None for digits.
        network: ``"resnet20"`` and its siblings of depth 6n+2, or what builds another one.
        search_size: Training images held out as the search split, drawn with ``split_seed``.
        search_indices: JSON file with a list of training-image indices to be the search split
            instead, for a checkpoint that never saw them.
        split_seed: Seed of the draw.
        search_seen: Whether the network was trained on the search split.
    """

    data: str
    root: str | None
    network: str | Network
    search_size: int
    search_indices: str | None = None
    split_seed: int = 0
    search_seen: bool = False

    @property
    def fingerprint(self) -> str:
        """Hash of the description, the pixels and the labels, not of where they lie."""
        named = self.network if isinstance(self.network, str) else self.network.fingerprint
        description = asdict(self) | {"root": None, "search_indices": None, "network": named}
        split = self._indices("search").numpy().tobytes()
        text = json.dumps(description, sort_keys=True) + self._images().digest()
        return hashlib.sha256(text.encode() + split).hexdigest()[:16]

    def model(self) -> nn.Module:
        """Build the network with seeded random weights, in eval mode."""
        if not isinstance(self.network, str):
            return self.network.build(self.split_seed)
        images = self._images()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.split_seed)
            return SmallResNet(
                int(self.network.removeprefix("resnet")),
                in_channels=images.images["train"].shape[1],
                num_classes=images.num_classes,
            ).eval()

    def size(self, split: str) -> int:
        """Count the images of a split."""
        return len(self._indices(split))

    def batch(self, split: str, indices: Tensor) -> ImageBatch:
        """Return normalized images, shape (N, C, H, W), and labels, shape (N,)."""
        images = self._images()
        part = "test" if split == "test" else "train"
        chosen = self._indices(split)[indices]
        pixels = images.images[part][chosen].float().div_(255)
        return pixels.sub_(images.mean).div_(images.std), images.labels[part][chosen]

    def augment(self, batch: ImageBatch, generator: torch.Generator) -> ImageBatch:
        """Shift every image by a few pixels, black behind it, and mirror some."""
        pixels, labels = batch
        images = self._images()
        num, _, height, width = pixels.shape
        black = -images.mean / images.std
        padded = F.pad(pixels - black, [images.shift] * 4) + black
        rows = torch.randint(2 * images.shift + 1, (num, 1), generator=generator)
        columns = torch.randint(2 * images.shift + 1, (num, 1), generator=generator)
        y, x = rows + torch.arange(height), columns + torch.arange(width)
        if images.flips:
            mirrored = torch.rand(num, 1, generator=generator) < 0.5
            x = torch.where(mirrored, x.flip(1), x)
        n = torch.arange(num)[:, None, None]
        moved = padded[n, :, y[:, :, None], x[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous(), labels

    def _images(self) -> ImageSet:
        return load_images(self.data, self.root)

    def _indices(self, split: str) -> Tensor:
        """Return the images of a split as indices into the set's own part."""
        if split == "test":
            return torch.arange(len(self._images().labels["test"]))
        num_train = len(self._images().labels["train"])
        search = self._search(num_train)
        if split == "search":
            return search
        if split != "train":
            raise ValueError(f"split must be 'train', 'search' or 'test', got {split!r}")
        rest = torch.ones(num_train, dtype=torch.bool)
        rest[search] = False
        return rest.nonzero()[:, 0]

    def _search(self, num_train: int) -> Tensor:
        if self.search_indices is not None:
            return _read_indices(Path(self.search_indices), num_train)
        if not 0 < self.search_size < num_train:
            raise InputError(
                f"task.search_size: must be within 1..{num_train - 1} (training images), "
                f"got {self.search_size}"
            )
        generator = torch.Generator().manual_seed(self.split_seed)
        return torch.randperm(num_train, generator=generator)[: self.search_size]


def _read_indices(path: Path, num_train: int) -> Tensor:
    try:
        indices = np.array(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise InputError(
            f"task.search_indices: {path} must be a JSON list of training-image indices ({error})"
        ) from error
    valid = indices.ndim == 1 and indices.dtype.kind == "i" and 0 < len(indices) < num_train
    if (
        not valid
        or indices.min() < 0
        or indices.max() >= num_train
        or len(np.unique(indices)) < len(indices)
    ):
        raise InputError(
            f"task.search_indices: {path} must list different indices within 0..{num_train - 1}"
        )
    return torch.from_numpy(indices.astype(np.int64))
