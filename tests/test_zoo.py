"""Published networks by name: built, prepared for, or refused with the nearest name."""

import hashlib
import importlib.util
import json
import threading
import zipfile
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torchvision
from pytorchcv.models.common import model_store
from torch import nn

from hawq.reads import read_network
from hawq.testing import check_task
from search.config import TaskConfig
from search.errors import InputError
from search.stages.model import _described
from search.tasks.build import build_task
from search.tasks.zoo import Preprocessing, ZooNetwork

SMALL = "pytorchcv:sqnxt23_w1"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorchcv:resnet50", Preprocessing()),
        ("pytorchcv:inceptionv3", Preprocessing(299, 342)),
        ("pytorchcv:sqnxt23_w2", Preprocessing()),
        ("pytorchcv:mobilenetv2_w1", Preprocessing()),
        ("torchvision:resnet50", Preprocessing(224, 232)),
        ("torchvision:mobilenet_v2", Preprocessing(224, 232)),
        ("timm:mobilenetv2_100", Preprocessing(224, 256, "bicubic")),
    ],
)
def test_a_networks_images_are_prepared_as_its_library_says(name, expected):
    assert ZooNetwork(name).preprocessing() == expected


def test_another_resolution_keeps_the_share_that_is_cut_out():
    assert Preprocessing().at(112) == Preprocessing(112, 128)
    assert Preprocessing().at(None) == Preprocessing()


def test_a_network_of_the_papers_has_its_published_size():
    model = ZooNetwork("pytorchcv:sqnxt23_w2").build(0)
    # 10.1 MB in HAWQ-V2's table 1 (Dong et al., 2020); the count is pytorchcv's own.
    assert sum(p.numel() for p in model.parameters()) == 2_583_752
    assert not model.training


def test_the_same_seed_builds_the_same_weights_and_leaves_the_generator_alone():
    network = ZooNetwork(SMALL)
    torch.manual_seed(5)
    first = network.build(0).state_dict()
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    second, other = network.build(0).state_dict(), network.build(1).state_dict()
    name = next(name for name, value in first.items() if value.ndim == 4)
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


def test_a_task_of_small_images_takes_a_published_network():
    config = TaskConfig(
        data="digits",
        search_size=100,
        network="timm:test_vit",
        arguments={"num_classes": 10, "in_chans": 1, "img_size": 8, "patch_size": 4},
        pretrain={"epochs": 1},
    )
    task = build_task(config, seed=0)
    check_task(task)
    plain = build_task(
        TaskConfig(data="digits", search_size=100, network="resnet8", pretrain={}), seed=0
    )
    assert task.fingerprint != plain.fingerprint
    assert (
        len(read_network(task.model(), task.inputs(task.batch("train", torch.arange(1)))).layers)
        > 5
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorchcv:resnet51", r"pytorchcv must know the network, got 'resnet51': did you mean"),
        ("timm:mobilnetv2_100", r"did you mean mobilenetv2_\d+"),
        ("torchvision:resnet", r"did you mean resnet\d+"),
        ("torchvision:zzzz", r"it has \d+ others"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_ones(name, message):
    with pytest.raises(InputError, match=message):
        ZooNetwork(name).build(0)


def test_arguments_that_a_network_does_not_take_are_named():
    network = ZooNetwork(SMALL, arguments=json.dumps({"depth": 3}))
    with pytest.raises(
        InputError, match=r"pytorchcv:sqnxt23_w1\(depth=…\): must not fail, got Type"
    ):
        network.build(0)


def test_weights_that_cannot_be_loaded_are_an_error_of_the_users(tmp_path, monkeypatch):
    # A network that pytorchcv has no weights of: its own loading code says so, without a download.
    monkeypatch.setenv("HOME", str(tmp_path))
    network = ZooNetwork("pytorchcv:resnet10", pretrained=True, arguments='{"model_name": "none"}')
    with pytest.raises(
        InputError,
        match=r"resnet10, pretrained\(model_name=…\): must not fail, got .*: without weights from "
        r"pytorchcv, give a file of them as task.checkpoint",
    ):
        network.build(0)
    assert ZooNetwork(SMALL, pretrained=True).fingerprint != ZooNetwork(SMALL).fingerprint


# Weights as the libraries load them, from where these tests put them instead of their sites.


def saved(name, path):
    """Write another network's weights, as torch does; return them."""
    state = ZooNetwork(name).build(7).state_dict()
    torch.save(state, path)
    return state


def assert_loaded(network, state):
    found = network.build(0).state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


@contextmanager
def published(name, state, folder):
    """Let torchvision find weights in a file: URL, whose name has the start of the file's hash."""
    torch.save(state, folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()
    path = (folder / "weights.pth").rename(folder / f"{name}-{digest[:8]}.pth")
    weights = torchvision.models.get_model_weights(name).DEFAULT.value
    before = weights.url
    object.__setattr__(weights, "url", path.as_uri())  # it is frozen
    try:
        yield path
    finally:
        object.__setattr__(weights, "url", before)


def test_torchvision_loads_its_weights_and_refuses_damaged_ones(tmp_path, monkeypatch):
    state = ZooNetwork("torchvision:squeezenet1_1").build(7).state_dict()
    network = ZooNetwork("torchvision:squeezenet1_1", pretrained=True)
    with published("squeezenet1_1", state, tmp_path) as path:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
        assert_loaded(network, state)
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "another"))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(
            InputError, match=r"squeezenet1_1, pretrained: must not fail, got .*invalid hash value"
        ):
            network.build(0)


def test_heads_that_only_trained_a_network_go_once_its_weights_are_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    with_heads = torchvision.models.googlenet(aux_logits=True, init_weights=False).state_dict()
    with published("googlenet", with_heads, tmp_path):
        model = ZooNetwork("torchvision:googlenet", pretrained=True).build(0)
    expected = {name: value for name, value in with_heads.items() if not name.startswith("aux")}
    assert model.state_dict().keys() == expected.keys()
    assert torch.equal(model.fc.weight, expected["fc.weight"])
    assert isinstance(model.train()(torch.randn(2, 3, 64, 64)), torch.Tensor)


@pytest.mark.parametrize("source", ["file", "url"])
def test_timm_loads_its_weights(tmp_path, monkeypatch, source):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    path = tmp_path / "weights.pth"
    state = saved("timm:test_resnet", path)
    overlay = {"file": str(path)} if source == "file" else {"hf_hub_id": None, "url": path.as_uri()}
    arguments = json.dumps({"pretrained_cfg_overlay": overlay})
    assert_loaded(ZooNetwork("timm:test_resnet", True, arguments), state)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Say nothing."""


def test_pytorchcv_downloads_its_weights(tmp_path, monkeypatch):
    state = saved(SMALL, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    digest = hashlib.sha1(content).hexdigest()
    # Its table of weights, with the hash of ours, and its site.
    rows = model_store.load_csv(model_store.get_model_metainfos_file_path())
    ((_, count, error, _, *rest),) = [row for row in rows if row[0] == "sqnxt23_w1"]
    table = tmp_path / "table.csv"
    row = ["sqnxt23_w1", count, error, digest, "v1", *rest[1:]]
    table.write_text("\n".join(",".join(cells) for cells in (rows[0], row)))
    site = tmp_path / "site" / "releases" / "download" / "v1"
    site.mkdir(parents=True)
    file = f"sqnxt23_w1-{error}-{digest[:8]}.pth"
    with zipfile.ZipFile(site / f"{file}.zip", "w") as archive:
        archive.writestr(file, content)
    serve = partial(Quiet, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(model_store, "model_metainfos_file_name", str(table))
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(model_store, "imgclsmob_repo_url", url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        arguments = json.dumps({"root": str(tmp_path / "store")})
        assert_loaded(ZooNetwork(SMALL, True, arguments), state)
        server.shutdown()
    # Now that it is in the folder nothing is asked of the site.
    assert_loaded(ZooNetwork(SMALL, True, arguments), state)


def test_a_missing_library_says_which_extra_has_it(monkeypatch):
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert importlib.util.find_spec("pytorchcv") is not None
    with pytest.raises(
        InputError, match=r"timm must be installed .*pip install 'hawq-search\[zoo\]'"
    ):
        ZooNetwork("timm:resnet18").build(0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data": "cifar10", "network": "resnet50 "}, "network"),
        ({"data": "cifar10", "pretrained": True}, "pretrained is for published networks"),
        ({"data": "cifar10", "network": SMALL}, "got none"),
        (
            {"data": "cifar10", "network": SMALL, "pretrained": True, "pretrain": {}},
            "and pretrained",
        ),
        ({"data": "imagenet", "network": SMALL, "pretrained": True}, "needs root"),
        ({"data": "imagenet", "root": "r", "cache": "c", "pretrain": {}}, "needs model, or a publ"),
        ({"data": "digits", "pretrain": {}, "train_size": 5}, "train_size is for data: imagenet"),
        ({"batches": "a:b"}, "batches needs model"),
        ({"data": "digits", "model": "a:b", "loss": "a:b"}, "loss is for batches"),
        ({"factory": "a:b", "model": "a:b"}, "model needs data or batches"),
        ({"data": "digits", "model": "a:b", "checkpoint": "x", "pretrain": {}}, "give either"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig.model_validate(keys)


def test_a_run_of_an_earlier_version_goes_on_as_it_is():
    plain = _described(TaskConfig(data="digits", pretrain={}))
    assert not plain.keys() & {"model", "pretrained", "train_size", "cache", "root"}
    assert plain["factory"] is None
    own = _described(TaskConfig(data="digits", model="a:b"))
    assert own.keys() - plain.keys() == {"model"}


class Detector(nn.Module):
    def forward(self, x):
        return {"boxes": x}


def test_outputs_that_are_no_classes_are_refused():
    config = TaskConfig(data="digits", search_size=100, model=f"{__name__}:Detector")
    with pytest.raises(
        InputError, match=r"must return classes, shape \(2, C\), got dict: give bat"
    ):
        build_task(config, seed=0)


def test_a_network_of_ones_own_goes_with_built_in_images():
    def task_of(width, **more):
        keys = {"data": "digits", "search_size": 100, "model": f"{__name__}:linear"}
        return build_task(TaskConfig(**keys, arguments={"width": width}, **more), seed=0)

    task = task_of(12)
    check_task(task)
    assert task.search_seen  # a factory's weights are taken for trained ones
    assert not task_of(12, pretrain={}).search_seen
    assert task_of(13).fingerprint != task.fingerprint


def linear(width):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def test_a_network_of_ones_own_goes_with_ones_own_batches():
    config = TaskConfig(
        batches=f"{__name__}:rows",
        model=f"{__name__}:linear",
        arguments={"width": 6},
        loss=f"{__name__}:squared",
        metric=f"{__name__}:negative",
        search_size=5,
    )
    task = build_task(config, seed=0)
    check_task(task)
    assert [task.size(split) for split in ("train", "search", "test")] == [15, 5, 20]
    assert task.score_name == "negative"


def rows():
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    return {"train": (x, x[:, :10]), "test": (x, x[:, :10])}


def squared(outputs, targets):
    return (outputs - targets).square().sum(1)


def negative(outputs, targets):
    return -squared(outputs, targets)
