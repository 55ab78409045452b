"""Photographs in a folder a class: drawn, decoded once, prepared as torchvision prepares them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import InterpolationMode

from hawq.reads import read_network
from hawq.testing import check_task
from search.config import TaskConfig
from search.config_file import load_config
from search.errors import InputError
from search.spaces import space_of
from search.tasks.build import build_task
from search.tasks.imagenet import _opened, decoded
from search.tasks.zoo import Preprocessing, ZooNetwork

ROOT = Path(__file__).parents[1]

# Three of ImageNet's classes, at places 0, 1 and 999.
CLASSES = ("n01440764", "n01443537", "n15075141")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Photographs of several shapes, 8 a class to train and 3 to test."""
    folder = tmp_path_factory.mktemp("imagenet")
    rng = np.random.default_rng(0)
    for part, num in (("train", 8), ("val", 3)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for i in range(num):
                height, width = rng.integers(40, 90, 2)
                coarse = rng.integers(0, 256, (7, 9, 3), np.uint8)
                image = Image.fromarray(coarse).resize((int(width), int(height)), 2)
                image.save(folder / part / name / f"{part}_{i}.JPEG", quality=95)
    return folder


def build(root, cache, **changes):
    keys = {
        "data": "imagenet",
        "root": str(root),
        "cache": str(cache),
        "model": f"{__name__}:network",
        "arguments": {"num_outputs": 3},
        "resolution": 32,
        "search_size": 6,
    }
    return build_task(TaskConfig(**(keys | changes)), seed=0)


def network(num_outputs):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 4),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, num_outputs),
    )


def test_a_task_of_photographs_keeps_the_contract(root, tmp_path):
    task = build(root, tmp_path)
    check_task(task)
    assert [task.size(split) for split in ("train", "search", "test")] == [18, 6, 9]
    assert (
        task.batch("test", torch.arange(9))[1].sort().values.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    )


def test_images_are_what_torchvision_makes_of_them(root, tmp_path):
    for how, mode in [
        (Preprocessing(32, 37), InterpolationMode.BILINEAR),
        (Preprocessing(24, 32, "bicubic", (0.5,) * 3, (0.4,) * 3), InterpolationMode.BICUBIC),
    ]:
        preset = ImageClassification(
            crop_size=how.size,
            resize_size=how.resize,
            mean=how.mean,
            std=how.std,
            interpolation=mode,
        )
        paths = sorted((root / "val").rglob("*.JPEG"))
        name = decoded([(path, 0) for path in paths], how, tmp_path, root)
        pixels, _ = _opened(str(tmp_path), name)
        for path, bytes_ in zip(paths, pixels, strict=True):
            expected = preset(Image.open(path))
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (how.mean, how.std))
            found = (torch.tensor(bytes_) / 255 - mean) / std
            torch.testing.assert_close(found, expected)


def test_the_splits_share_no_image_and_a_part_is_drawn_by_the_seed(root, tmp_path):
    task = build(root, tmp_path, train_size=10, test_size=4)
    assert [task.size(split) for split in ("train", "search", "test")] == [10, 6, 4]
    rows = [task.batch(split, torch.arange(task.size(split)))[0] for split in ("train", "search")]
    together = torch.cat(rows).flatten(1)
    assert len(torch.unique(together, dim=0)) == 16
    assert build(root, tmp_path, train_size=11).fingerprint != task.fingerprint
    again = build(root, tmp_path, train_size=10, test_size=4)
    assert again.fingerprint == task.fingerprint


def test_a_set_is_decoded_once_and_again_where_a_file_changed(root, tmp_path):
    build(root, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    build(root, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    build(root, tmp_path, resolution=40)
    assert len(list(tmp_path.iterdir())) == 2 * len(before)
    assert not [path for path in tmp_path.iterdir() if path.name[0] == "."]


def test_augmentation_cuts_parts_out_by_its_generator_alone(root, tmp_path):
    task = build(root, tmp_path)
    images, labels = task.batch("train", torch.arange(18))
    first, same = task.augment((images, labels), torch.Generator().manual_seed(0))
    again, _ = task.augment((images, labels), torch.Generator().manual_seed(0))
    other, _ = task.augment((images, labels), torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(labels, same)
    # Parts of an image, so within its range; bilinear interpolation makes nothing new.
    assert (first.amax((1, 2, 3)) <= images.amax((1, 2, 3)) + 1e-5).all()
    assert (first.amin((1, 2, 3)) >= images.amin((1, 2, 3)) - 1e-5).all()
    ramp = torch.arange(32.0).expand(200, 3, 32, 32)
    moved, _ = task.augment((ramp, torch.zeros(200)), torch.Generator().manual_seed(2))
    mirrored = moved[:, 0, 0, 0] > moved[:, 0, 0, -1]
    assert 60 < int(mirrored.sum()) < 140


def test_a_part_of_imagenets_classes_has_their_places_among_the_thousand(root, tmp_path):
    task = build(root, tmp_path, arguments={"num_outputs": 1000})
    labels = task.batch("test", torch.arange(9))[1]
    assert set(labels.tolist()) == {0, 1, 999}


def test_what_the_folders_lack_is_said(root, tmp_path):
    cases = {
        "flat": r"val must hold a folder a class .*got images side by side: move each into",
        "none": r"must hold train and val, .* lacks train",
        "odd": r"train must hold the classes of val, lacks zebra",
        "broken": r"a\.jpg must be an image",
    }
    for name in cases:
        for part in ("train", "val") if name != "none" else ("val",):
            folder = tmp_path / name / part / "cat"
            folder.mkdir(parents=True)
            for letter in "abc":
                Image.new("RGB", (40, 40)).save(folder / f"{letter}.jpg")
    (tmp_path / "flat/val/cat").rename(tmp_path / "flat/cat")
    Image.new("RGB", (40, 40)).save(tmp_path / "flat/val/a.png")
    (tmp_path / "odd/val/cat").rename(tmp_path / "odd/val/zebra")
    (tmp_path / "broken/train/cat/a.jpg").write_bytes(b"nothing")
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            build(tmp_path / name, tmp_path / "cache", search_size=1)
    assert not list((tmp_path / "cache").glob("*.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_size": 19}, r"task\.train_size: with search_size 6 must be within the 24 images"),
        ({"search_size": 24}, r"task\.train_size: with search_size 24"),
        ({"test_size": 10}, r"task\.test_size: must be within the 9 images of"),
        ({"arguments": {"num_outputs": 2}}, r"must hold at most the network's 2 classes, got 3"),
        ({"arguments": {}}, r"task\.model: .*network: must not fail, got TypeError"),
        ({"resolution": 2}, r"the network, given one tensor of shape \(2, 3, 2, 2\): must not"),
    ],
)
def test_what_does_not_fit_is_refused(root, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        build(root, tmp_path, **changes)


def test_a_cache_that_a_worker_cannot_see_is_named(root, tmp_path):
    task = build(root, tmp_path)
    _opened.cache_clear()
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(
        InputError, match=r"task\.cache: .* must be on storage that all workers share"
    ):
        task.size("train")


@pytest.mark.parametrize(
    ("name", "compression", "mib", "off"),
    # HAWQ-V2's table 1 (Dong et al., 2020), which counts a megabyte as 2^20 bytes. Its SqueezeNext
    # has 10.1 of them; pytorchcv's has 9.86, and 9.72 without biases and batch-norm.
    [
        ("resnet50", 12.24, 7.99, 0.01),
        ("inception_v3", 12.04, 7.57, 0.01),
        ("squeezenext", 9.40, 1.07, 0.04),
    ],
)
def test_the_papers_configs_have_the_papers_sizes(name, compression, mib, off, monkeypatch):
    config = paper(name, monkeypatch)
    assert config.budgets[0].compression == compression
    assert config.task.pretrained
    network = ZooNetwork(config.task.network)
    size = network.preprocessing().size
    reads = read_network(network.build(0), torch.zeros(1, 3, size, size))
    limits = config.budgets[0].limits(space_of(config, reads, by_channel=False))
    assert limits["weight_bits"] / 8 / 2**20 == pytest.approx(mib, rel=off)


def test_a_papers_config_reads_photographs(root, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGENET", str(root))
    here = {
        "cache": str(tmp_path),
        "pretrained": False,
        "pretrain": {"epochs": 1},
        "search_size": 4,
        "train_size": 8,
    }
    overrides = [f"task.{key}={json.dumps(value)}" for key, value in here.items()]
    config = load_config(ROOT / "configs" / "imagenet" / "squeezenext.yaml", overrides)
    task = build_task(config.task, config.seed)
    images, labels = task.batch("train", torch.arange(2))
    assert images.shape == (2, 3, 224, 224)
    assert set(labels.tolist()) <= {0, 1, 999}
    assert torch.isfinite(task.losses(task.model(), (images, labels))).all()


def paper(name, monkeypatch):
    monkeypatch.setenv("IMAGENET", "/data/imagenet")
    return load_config(ROOT / "configs" / "imagenet" / f"{name}.yaml")
