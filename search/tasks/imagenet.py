"""Photographs in a folder a class, as ImageNet has them: decoded once, kept as bytes in a file.

``ROOT/train/CLASS/*`` and ``ROOT/val/CLASS/*``. What a search reads, and no more, is decoded by
threads at the network's resolution and mapped into memory from a cache that workers share.
"""

import hashlib
import importlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from search.errors import InputError
from search.folder import write_atomically
from search.tasks.cross_entropy import Classes
from search.tasks.factories import Network
from search.tasks.zoo import Preprocessing

__all__ = ["ImageNetTask", "decoded", "imagenet_task"]

ImageBatch = tuple[Tensor, Tensor]
# A photograph's path and its class.
Photograph = tuple[Path, int]

_ENDINGS = {".jpeg", ".jpg", ".png", ".webp", ".bmp"}
_SYNSET = re.compile(r"n\d{8}")
# Of the part that augmentation cuts out, as in the training of Inception but less: the network is
# trained already, and sees the center alone.
_AREA, _RATIO = (0.25, 1.0), (3 / 4, 4 / 3)


@dataclass(frozen=True, slots=True)
class ImageNetTask(Classes):
    """A classifier of photographs with its data; see ``hawq.task.Task``.

    Attributes:
        network: What builds it.
        preprocessing: How its images were prepared.
        cache: Folder of the decoded images.
        training: Name there of the images of the search split, then those of the training split.
        testing: Name of those of the test split.
        search_size: How many of the first are the search split.
        split_seed: Of the draw of the images, and of a network that is not trained.
        search_seen: Whether the network was trained on the search split.
    """

    network: Network
    preprocessing: Preprocessing
    cache: str
    training: str
    testing: str
    search_size: int
    split_seed: int = 0
    search_seen: bool = True

    @property
    def fingerprint(self) -> str:
        """Hash of the network, the images' names and sizes, and their preprocessing."""
        parts = [self.network.fingerprint, self.training, self.testing, self.search_size]
        return hashlib.sha256(json.dumps([*parts, self.split_seed]).encode()).hexdigest()[:16]

    def model(self) -> nn.Module:
        """Build the network."""
        return self.network.build(self.split_seed)

    def size(self, split: str) -> int:
        """Count the images of a split."""
        first, last = self._range(split)
        return last - first

    def batch(self, split: str, indices: Tensor) -> ImageBatch:
        """Return normalized images, shape (N, 3, S, S), and labels, shape (N,)."""
        pixels, labels = self._images(split)
        rows = (indices + self._range(split)[0]).numpy()
        images = torch.from_numpy(pixels[rows]).float().div_(255)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in self._normalization)
        return images.sub_(mean).div_(std), torch.from_numpy(labels[rows])

    def augment(self, batch: ImageBatch, generator: torch.Generator) -> ImageBatch:
        """Cut a random part out of every image, stretch it to the whole, and mirror some."""
        images, labels = batch
        size = images.shape[-1]
        draws = torch.rand(len(images), 5, generator=generator)
        found = []
        for image, (area, ratio, y, x, mirror) in zip(images, draws.tolist(), strict=True):
            side = size * math.sqrt(_AREA[0] + area * (_AREA[1] - _AREA[0]))
            low, high = (math.log(bound) for bound in _RATIO)
            stretch = math.exp((low + ratio * (high - low)) / 2)
            height, width = (min(size, max(1, round(s))) for s in (side / stretch, side * stretch))
            top, left = int(y * (size - height + 1)), int(x * (size - width + 1))
            part = image[None, :, top : top + height, left : left + width]
            part = part.flip(3) if mirror < 0.5 else part
            found.append(F.interpolate(part, (size, size), mode="bilinear", antialias=True))
        return torch.cat(found), labels

    @property
    def _normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.preprocessing.mean, self.preprocessing.std

    def _images(self, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        return _opened(self.cache, self.testing if split == "test" else self.training)

    def _range(self, split: str) -> tuple[int, int]:
        """Return the rows of a split in its file."""
        total = len(self._images(split)[1])
        ranges = {
            "train": (self.search_size, total),
            "search": (0, self.search_size),
            "test": (0, total),
        }
        if split not in ranges:
            raise ValueError(f"split must be 'train', 'search' or 'test', got {split!r}")
        return ranges[split]


def imagenet_task(
    network: Network,
    preprocessing: Preprocessing,
    *,
    root: str,
    cache: str,
    num_outputs: int,
    search_size: int,
    train_size: int | None,
    test_size: int | None,
    seed: int,
    search_seen: bool,
) -> ImageNetTask:
    """Draw the images of a search, decode those that the cache lacks, and make the task.

    Args:
        network: What builds the network.
        preprocessing: How its images are prepared.
        root: Folder of ``train`` and ``val``.
        cache: Folder for the decoded images.
        num_outputs: Classes that the network tells apart.
        search_size: Training images held out to rank candidates.
        train_size: Training images besides; None for all.
        test_size: Images of ``val``; None for all.
        seed: Of the draws.
        search_seen: Whether the network was trained on the training images.

    Raises:
        InputError: If the folders are not as they must be, or hold too few images.
    """
    train, test = (_photographs(Path(root), part) for part in ("train", "val"))
    if test.keys() - train.keys():
        odd = sorted(test.keys() - train.keys())
        raise InputError(f"task.root: {root}/train must hold the classes of val, lacks {odd[0]}")
    classes = _classes(sorted(train), num_outputs)
    pool = [(path, classes[name]) for name in sorted(train) for path in train[name]]
    wanted = len(pool) - search_size if train_size is None else train_size
    if wanted < 1 or search_size + wanted > len(pool):
        raise InputError(
            f"task.train_size: with search_size {search_size} must be within the {len(pool)} "
            f"images of {root}/train, got {wanted}"
        )
    tests = [(path, classes[name]) for name in sorted(test) for path in test[name]]
    if test_size is not None and test_size > len(tests):
        raise InputError(
            f"task.test_size: must be within the {len(tests)} images of {root}/val, got {test_size}"
        )
    training, testing = (
        decoded(_drawn(photographs, num, seed), preprocessing, Path(cache), Path(root))
        for photographs, num in ((pool, search_size + wanted), (tests, test_size))
    )
    return ImageNetTask(
        network,
        preprocessing,
        str(Path(cache).resolve()),
        training,
        testing,
        search_size,
        seed,
        search_seen,
    )


def decoded(
    photographs: Sequence[Photograph], preprocessing: Preprocessing, cache: Path, root: Path
) -> str:
    """Have photographs decoded in a file of the cache.

    Args:
        photographs: Paths below ``root``, and classes.
        preprocessing: Of which resolution and cut count here.
        cache: The folder.
        root: So that a set that was moved is found again.

    Returns:
        Their name there: ``NAME.npy`` holds bytes, shape (N, 3, S, S), ``NAME.json`` the labels.

    Raises:
        InputError: If one of them is no image.
    """
    listing = [(str(p.relative_to(root)), p.stat().st_size, label) for p, label in photographs]
    how = {k: v for k, v in asdict(preprocessing).items() if k not in {"mean", "std"}}
    name = hashlib.sha256(json.dumps([listing, how]).encode()).hexdigest()[:16]
    if not (cache / f"{name}.json").exists():  # written last
        with _new_array(cache / f"{name}.npy", len(photographs), preprocessing.size) as pixels:

            def decode(i: int) -> None:
                pixels[i] = _prepared(photographs[i][0], preprocessing)

            with ThreadPoolExecutor(os.cpu_count()) as threads:  # PIL lets go of the lock
                for _ in threads.map(decode, range(len(photographs))):
                    pass
        document = {"labels": [label for _, label in photographs], "preprocessing": how}
        write_atomically(cache / f"{name}.json", json.dumps(document))
    return name


def _photographs(root: Path, part: str) -> dict[str, list[Path]]:
    """List the images of each class, in order."""
    folder = root / part
    if not folder.is_dir():
        raise InputError(
            f"task.root: {root} must hold train and val, each with a folder a class, lacks {part}"
        )
    classes = {
        entry.name: sorted(f for f in entry.iterdir() if f.suffix.lower() in _ENDINGS)
        for entry in sorted(folder.iterdir())
        if entry.is_dir()
    }
    if not any(classes.values()):
        flat = any(f.suffix.lower() in _ENDINGS for f in folder.iterdir())
        remedy = "side by side: move each into a folder with the name of its class" if flat else ""
        raise InputError(
            f"task.root: {folder} must hold a folder a class (n01440764, …) with images in it, "
            f"got {f'images {remedy}' if flat else 'none'}"
        )
    return {name: files for name, files in classes.items() if files}


def _classes(names: Sequence[str], num_outputs: int) -> Mapping[str, int]:
    """Number the classes as the network does: in order, or by their place among ImageNet's 1,000.

    Raises:
        InputError: If there are more than outputs, or a part of the 1,000 that cannot be placed.
    """
    if len(names) > num_outputs:
        raise InputError(
            f"task.root: must hold at most the network's {num_outputs} classes, got {len(names)}"
        )
    if num_outputs != 1000 or len(names) == 1000 or not all(map(_SYNSET.fullmatch, names)):
        return {name: i for i, name in enumerate(names)}
    try:
        known = importlib.import_module("timm.data").ImageNetInfo().label_names()
    except ImportError as error:
        raise InputError(
            f"task.root: {len(names)} of ImageNet's classes need the list of all 1,000 ({error}): "
            "pip install 'hawq-search[zoo]'"
        ) from error
    places = {name: i for i, name in enumerate(known)}
    odd = [name for name in names if name not in places]
    if odd:
        raise InputError(f"task.root: {odd[0]} must be one of ImageNet's 1,000 classes")
    return {name: places[name] for name in names}


def _drawn(photographs: Sequence[Photograph], num: int | None, seed: int) -> list[Photograph]:
    order = torch.randperm(len(photographs), generator=torch.Generator().manual_seed(seed))
    return [photographs[i] for i in order[:num].tolist()]


def _prepared(path: Path, how: Preprocessing) -> NDArray[np.uint8]:
    """Return the center of a photograph, shape (3, S, S)."""
    from PIL import Image  # noqa: PLC0415

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL's own, and of a broken PNG
        raise InputError(f"task.root: {path} must be an image ({error})") from error
    # As torchvision: the longer side is cut down to a whole number, the corner rounded.
    width, height = image.size
    scale = how.resize / min(width, height)
    size = (
        how.resize if width <= height else int(how.resize * width / height),
        how.resize if height <= width else int(how.resize * height / width),
    )
    if scale != 1:
        image = image.resize(size, Image.Resampling[how.interpolation.upper()])
    left, top = (round((side - how.size) / 2) for side in image.size)
    box = (left, top, left + how.size, top + how.size)
    return np.asarray(image.crop(box), np.uint8).transpose(2, 0, 1)


@contextmanager
def _new_array(path: Path, num: int, size: int) -> Iterator[NDArray[np.uint8]]:
    """Yield an array in a file that has its name once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (num, 3, size, size))
        yield array
        array.flush()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@lru_cache(maxsize=8)
def _opened(cache: str, name: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    path = Path(cache)
    try:
        labels = json.loads((path / f"{name}.json").read_text())["labels"]
        return np.load(path / f"{name}.npy", mmap_mode="r"), np.array(labels, np.int64)
    except OSError as error:
        raise InputError(
            f"task.cache: {cache} must be on storage that all workers share, lacks {name} "
            f"({error.strerror})"
        ) from error
