"""Built-in tasks keep the contract; checkpoints are read safely or refused with the reason."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.datasets import CIFAR10

from hawq.finetune import evaluate
from hawq.testing import check_task
from search.config import TaskConfig
from search.errors import InputError
from search.tasks.build import build_task
from search.tasks.checkpoint import load_weights, read_state, save_state, state_sha256
from search.tasks.classification import ClassificationTask
from search.tasks.images import load_images
from search.tasks.networks import SmallResNet

DIGITS = ClassificationTask(data="digits", root=None, network="resnet8", search_size=100)


def test_digits_keep_the_contract():
    check_task(DIGITS)


def test_the_splits_share_no_image_and_together_are_all():
    train, search = DIGITS._indices("train").tolist(), DIGITS._indices("search").tolist()
    assert not set(train) & set(search)
    assert sorted(train + search) == list(range(DIGITS.size("train") + DIGITS.size("search")))
    assert DIGITS.size("train") + DIGITS.size("search") + DIGITS.size("test") == 1797


def test_another_seed_holds_out_other_images_and_changes_the_fingerprint():
    other = ClassificationTask("digits", None, "resnet8", 100, split_seed=1)
    assert other.fingerprint != DIGITS.fingerprint
    assert other._indices("search").tolist() != DIGITS._indices("search").tolist()


def test_augmentation_moves_images_over_black_by_at_most_its_shift():
    pixels, labels = DIGITS.batch("train", torch.arange(32))
    moved, same = DIGITS.augment((pixels, labels), torch.Generator().manual_seed(0))
    assert torch.equal(labels, same)
    black = float(-load_images("digits", None).mean / load_images("digits", None).std)
    padded = torch.nn.functional.pad(pixels, [1] * 4, value=black)
    for i in range(32):
        crops = [padded[i, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        assert any(torch.allclose(moved[i], crop, atol=1e-6) for crop in crops)
    assert not torch.equal(moved, pixels)


def test_named_search_images_are_held_out(tmp_path):
    path = tmp_path / "unseen.json"
    path.write_text(json.dumps([5, 3, 8]))
    config = TaskConfig(data="digits", checkpoint="x.pt", search_indices=str(path))
    task = build_task(config, seed=0)
    assert task.size("search") == 3
    assert not task.search_seen


@pytest.mark.parametrize("text", ["[1, 1]", "[-1]", "[99999]", "[]", "{}", "[1.5]", "nonsense"])
def test_a_bad_list_of_search_images_is_refused(tmp_path, text):
    path = tmp_path / "unseen.json"
    path.write_text(text)
    task = ClassificationTask("digits", None, "resnet8", 100, search_indices=str(path))
    with pytest.raises(InputError, match=r"unseen\.json"):
        task.size("search")


def test_a_checkpoint_has_seen_a_drawn_search_split():
    config = TaskConfig(data="digits", checkpoint="x.pt", search_size=50)
    assert build_task(config, seed=0).search_seen


def cifar_batches(folder):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    counts = {"data_batch_1": 3, "test_batch": 2}
    return {
        name: {
            "data": rng.integers(0, 256, (n, 3072), np.uint8),
            "labels": list(range(n)),
        }
        for name, n in counts.items()
    }


def test_the_mosaics_are_cut_row_by_row(tmp_path):
    tiles = np.random.default_rng(0).integers(0, 256, (5000, 3, 32, 32), np.uint8)
    grid = np.zeros((1600, 3200, 3), np.uint8)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, 100)
        grid[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32] = tile.transpose(1, 2, 0)
    for split in ("train", "test"):
        Image.fromarray(grid).save(tmp_path / f"{split}_00.webp", lossless=True)
    labels = np.arange(5000, dtype=np.uint8) % 10
    np.savez(tmp_path / "labels.npz", train=labels, test=labels)
    images = load_images("cifar10", str(tmp_path))
    assert torch.equal(images.images["train"], torch.from_numpy(tiles))
    assert images.num_classes == 10


def test_an_incomplete_set_of_mosaics_is_refused(tmp_path):
    np.savez(tmp_path / "labels.npz", train=np.zeros(5, np.uint8), test=np.zeros(5, np.uint8))
    with pytest.raises(InputError, match=r"must hold 5 train images in train_\*\.webp, got 0"):
        load_images("cifar10", str(tmp_path))


def test_the_official_python_batches_are_read_through_torchvision(tmp_path, monkeypatch):
    folder = tmp_path / CIFAR10.base_folder
    batches = cifar_batches(folder)
    for name, batch in batches.items():
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = {"label_names": [str(i) for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta))
    # The files' checksums are those of the real set; ours is a small one of the same form.
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    images = load_images("cifar10", str(tmp_path))
    expected = batches["data_batch_1"]["data"].reshape(3, 3, 32, 32)
    assert torch.equal(images.images["train"], torch.from_numpy(expected))
    assert images.labels["test"].tolist() == [0, 1]


@pytest.mark.parametrize("root", [None, "/nowhere"])
def test_a_missing_data_folder_is_named(root):
    with pytest.raises(InputError, match=r"task\.root: the folder of CIFAR-10 must exist"):
        load_images("cifar10", root)


def test_an_empty_data_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="got neither"):
        load_images("cifar10", str(tmp_path))


@pytest.mark.data
def test_the_trained_resnet20_has_its_published_test_accuracy(data_root):
    task = ClassificationTask("cifar10", str(data_root / "cifar10"), "resnet20", 5000)
    model = task.model()
    load_weights(model, data_root / "checkpoints" / "resnet20_cifar10.safetensors")
    assert int(evaluate(model, task, "test").sum()) == 9173


# checkpoints


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}])
def test_a_torch_file_loads_with_and_without_wrapping(tmp_path, wrap):
    source, target = SmallResNet(8), SmallResNet(8)
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save(wrap(state), tmp_path / "net.pt")
    load_weights(target, tmp_path / "net.pt")
    assert state_sha256(target.state_dict()) == state_sha256(source.state_dict())


def test_a_checkpoint_of_another_network_names_the_first_five_of_each_kind(tmp_path):
    save_file(SmallResNet(14).state_dict(), tmp_path / "net.safetensors")
    with pytest.raises(InputError) as caught:
        load_weights(SmallResNet(8, num_classes=7), tmp_path / "net.safetensors")
    message = str(caught.value)
    assert "net.safetensors must fit SmallResNet" in message
    assert message.count("layer1.1") == 5
    assert "linear.weight is (10, 64), not (7, 64)" in message


class Code:
    def __reduce__(self):
        return print, ("this checkpoint ran code",)


def test_a_checkpoint_with_code_in_it_is_refused_and_never_run(tmp_path, capsys):
    torch.save({"weight": Code()}, tmp_path / "net.pt")
    with pytest.raises(InputError, match=r"of tensors alone \(it holds .*print, .*state_dict"):
        load_weights(SmallResNet(8), tmp_path / "net.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps({"weight": Code()}, protocol=2))
    with pytest.raises(InputError, match=r"of tensors alone \(it .* code.* is not run.*state_dict"):
        load_weights(SmallResNet(8), tmp_path / "bare.pt")
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
@pytest.mark.parametrize("content", [b"", b"root:x:0:0", b"PK\x03\x04broken", b"\x80\x02broken"])
def test_a_file_of_anything_else_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="must be"):
        load_weights(SmallResNet(8), tmp_path / name)


# a user's own


def make_digits(size: int) -> ClassificationTask:
    return ClassificationTask("digits", None, "resnet8", size)


def test_a_factory_makes_the_users_own_task():
    config = TaskConfig(factory=f"{__name__}:make_digits", arguments={"size": 9})
    assert build_task(config, seed=0).size("search") == 9


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("nowhere:make", "must be importable"),
        ("json:nothing", "must be importable"),
        ("json", "must be package.module:callable"),
        ("json:decoder", "must be callable"),
        ("builtins:dict", "must return a Task, got dict without"),
        (f"{__name__}:make_digits", "must accept"),
    ],
)
def test_a_factory_that_makes_no_task_is_refused(factory, message):
    with pytest.raises(InputError, match=message):
        build_task(TaskConfig(factory=factory), seed=0)


def test_tensors_with_several_names_are_saved_under_each(tmp_path):
    shared = torch.arange(3.0)
    save_state(tmp_path / "x.safetensors", {"a": shared, "b": shared, "c": shared[:2]})
    found = read_state(tmp_path / "x.safetensors")
    assert {name: value.tolist() for name, value in found.items()} == {
        "a": [0, 1, 2],
        "b": [0, 1, 2],
        "c": [0, 1],
    }
