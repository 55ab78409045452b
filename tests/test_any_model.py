"""Networks that nobody here has seen: given as a user gives them, searched to the end."""

import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import yaml
from oracles import TinyTask
from torch import nn

import hawq
import search
from hawq.attention import project_attention
from hawq.curvature import choose_estimator
from hawq.factors import softmax_factor
from hawq.finetune import attach
from hawq.reads import network_space, read_network
from hawq.testing import check_task
from search.commands.evaluate import evaluate_file
from search.commands.export import chosen, export
from search.config import SearchConfig, TaskConfig
from search.errors import InputError
from search.pipeline import run as run_config
from search.tasks.build import build_task
from search.tasks.given import Stored, given, given_task, store
from search.tasks.portable import packed, unpacked

SETTINGS = {
    "curvature": {"examples": 24, "batch_size": 8, "rtol": 0.3, "max_probes": 8},
    "weights": {"bits": [2, 4, 8]},
    "calibration": {"examples": 8, "choices": 2, "draws": 2},
    "finetune": {"epochs": 1, "batch_size": 32, "lr": 0.01},
    "methods": ["exact"],
    "ray": {"dashboard": False},
}


class Depthwise(nn.Module):
    """ReLU6 and depthwise layers, as of MobileNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.spatial = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mix = nn.Conv2d(8, 12, 1)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = F.relu6(self.norm(self.stem(x)))
        x = F.relu6(self.mix(F.relu6(self.spatial(x))))
        return self.head(x.mean((2, 3)))


class Excited(nn.Module):
    """SiLU, a squeeze and an excitation, and a sum."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.squeeze = nn.Conv2d(8, 2, 1)
        self.excite = nn.Conv2d(2, 8, 1)
        self.mix = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.silu(self.stem(x))
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head((x + self.mix(x * gate)).mean((2, 3)))


class Attentive(nn.Module):
    """A block of a transformer over patches."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Linear(48, width)
        self.place = nn.Parameter(torch.randn(4, width) / 10)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.wide, self.narrow = nn.Linear(width, 16), nn.Linear(16, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 4, 48)
        x = self.embed(patches) + self.place
        y = self.first(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.narrow(F.gelu(self.wide(self.second(x))))
        return self.head(x.mean(1))


class Reading(nn.Module):
    """Words and their places, as of a language model's first layer, and a convolution over them."""

    def __init__(self, width=6):
        super().__init__()
        self.words, self.places = nn.Embedding(12, width, padding_idx=0), nn.Embedding(6, width)
        self.near = nn.Conv1d(width, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        embedded = self.words(x) + self.places(torch.arange(6, device=x.device))
        return self.head(F.relu(self.near(embedded.transpose(1, 2))).mean(2))


def sentences(num, seed):
    """Words at random, two of them of the sentence's class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    x = torch.randint(4, 12, (num, 6), generator=generator)
    x[:, 5] = 0
    x[:, 1] = x[:, 3] = labels + 1
    return x, labels


def pictures(num, seed):
    """Noise with one colour stronger: its class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % 3
    x = torch.randn(num, 3, 8, 8, generator=generator) / 2
    x[torch.arange(num), labels] += 1.5
    return x, labels


def splits():
    return {"train": pictures(96, 0), "test": pictures(30, 1)}


def mirrored(x, generator):
    flips = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(flips[:, None, None, None], x.flip(3), x)


@pytest.mark.ray
@pytest.mark.parametrize("kind", [Depthwise, Excited, Attentive])
def test_a_network_that_nobody_has_seen_is_searched_to_the_end(ray_cluster, tmp_path, kind):
    # This module is nowhere on the workers: its classes and functions must travel themselves.
    summary = search.run(
        kind,
        splits(),
        budgets=[{"average_bits": 4}],
        augment=mirrored,
        settings=SETTINGS | {"task": {"pretrain": {"epochs": 8, "batch_size": 24, "lr": 0.1}}},
        out=tmp_path / "run",
    )
    (found,) = summary.candidates.candidates
    assert found.average_bits <= 4
    assert summary.test.unquantized.score > 0.6
    assert found.key in summary.test.scores
    assert summary.model.search_size == 9
    expected = {Depthwise: "gauss_newton"}.get(kind, "corrected_gauss_newton")
    assert summary.curvature.estimator.endswith(expected)
    if kind is Attentive:
        assert {f"w:attention.{name}_proj" for name in ("q", "k", "v", "out")} < found.bits.keys()
    if kind is not Depthwise:
        return
    # Later commands find everything in the folder, and nothing is done again.
    config = SearchConfig.model_validate(yaml.safe_load((tmp_path / "run/config.yaml").read_text()))
    assert run_config(config, tmp_path / "run", name="run") == summary


@pytest.mark.ray
def test_a_network_that_reads_words_is_searched_and_exported(ray_cluster, tmp_path):
    bits = {"weights": {"bits": [2, 4, 8]}, "activations": {"bits": 8}}
    summary = search.run(
        Reading,
        {"train": sentences(96, 0), "test": sentences(30, 1)},
        budgets=[{"average_bits": 4}],
        settings=SETTINGS
        | bits
        | {"task": {"pretrain": {"epochs": 8, "batch_size": 24, "lr": 0.1}}},
        out=tmp_path / "run",
    )
    (found,) = summary.candidates.candidates
    assert set(found.bits) == {"w:words", "w:places", "w:near", "w:head"}
    assert found.average_bits <= 4
    assert summary.tables.float_weights == {}
    assert summary.test.unquantized.score > 0.6
    assert found.key in summary.test.scores
    # All examples have the same places, whose gradient is that of all of them.
    assert summary.curvature.estimator == "gauss_newton"
    tested = summary.test.scores[found.key]
    for to in ("packed", "onnx"):
        export(chosen(tmp_path / "run", "exact"), tmp_path / to, to)
        measured = evaluate_file(tmp_path / to, tmp_path / "run/config.yaml", seconds=0)
        assert measured.score == pytest.approx(tested.score, abs=0.04), to


def test_fused_attention_is_differentiated_twice():
    torch.manual_seed(0)
    model = project_attention(Attentive())
    found = hawq.traces(
        model, [pictures(8, 0)], num_examples=8, batch_size=4, rtol=0.3, max_probes=8
    )
    assert found.estimator == "corrected_gauss_newton", found.reason


def test_a_backbone_that_freezes_itself_is_traced_all_the_same():
    class Frozen(Depthwise):
        """As mmdetection's ResNet, whose first stages do not train."""

        def train(self, mode=True):
            self.stem.weight.requires_grad_(False)
            return super().train(mode)

    torch.manual_seed(0)
    found = hawq.traces(
        Frozen(), [pictures(8, 0)], layers=["stem"], num_examples=8, batch_size=4, rtol=0.3
    )
    assert found["stem"][0] > 0


def test_a_given_network_keeps_the_contract(tmp_path):
    torch.manual_seed(0)
    for loss in (None, nn.CrossEntropyLoss(label_smoothing=0.1), squared):
        found = given(Depthwise(), splits(), loss, None, augment=mirrored)
        check_task(given_task(Stored(str(store(found, tmp_path)))))


def squared(outputs, targets):
    return (outputs - F.one_hot(targets, 3)).square().sum(1)


def test_losses_of_torch_are_taken_apart_by_example(tmp_path):
    torch.manual_seed(0)
    model, data = Depthwise().eval(), splits()
    weight = torch.tensor([1.0, 2.0, 3.0])
    batch = tuple(part[:5] for part in data["test"])
    outputs = model(batch[0])
    for loss, expected in [
        (nn.CrossEntropyLoss(), F.cross_entropy(outputs, batch[1], reduction="none")),
        (
            nn.CrossEntropyLoss(weight=weight),
            F.cross_entropy(outputs, batch[1], weight, reduction="none"),
        ),
        (F.cross_entropy, F.cross_entropy(outputs, batch[1], reduction="none")),
        (squared, squared(outputs, batch[1])),
    ]:
        task = given_task(Stored(str(store(given(model, data, loss), tmp_path))))
        torch.testing.assert_close(task.losses(task.model(), batch), expected)


def test_a_loss_of_images_is_the_mean_over_their_pixels(tmp_path):
    data = {split: (rows[0], rows[0]) for split, rows in splits().items()}
    found = given(nn.Conv2d(3, 3, 1), data, nn.MSELoss(), closeness)
    task = given_task(Stored(str(store(found, tmp_path))))
    model, batch = task.model(), task.batch("test", torch.arange(4))
    expected = (model(batch[0]) - batch[1]).square().mean((1, 2, 3))
    torch.testing.assert_close(task.losses(model, batch), expected)
    assert task.curvature(model, batch) is None  # 192 outputs, and the loss is not known
    assert task.score_name == "closeness"


def closeness(outputs, targets):
    return -(outputs - targets).abs().mean((1, 2, 3))


def test_batches_and_whole_splits_are_the_same_examples():
    x, y = pictures(50, 0)
    whole = given(Depthwise, {"train": (x, y), "test": (x[:9], y[:9])})
    parts = list(zip(x.split(16), y.split(16), strict=True))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[:9], y[:9]), 4)
    assert given(Depthwise, {"train": parts, "test": loader}).fingerprint == whole.fingerprint
    assert whole.search_seen
    own = given(Depthwise, {"train": (x, y), "search": (x, y), "test": (x, y)})
    assert not own.search_seen


def test_the_held_out_examples_are_a_part_of_the_training_ones():
    found = given(Depthwise, splits(), search_size=20, seed=3)
    train, held = found.splits["train"][0], found.splits["search"][0]
    assert (len(train), len(held)) == (76, 20)
    rows = {tuple(x.flatten().tolist()) for x in torch.cat([train, held])}
    assert rows == {tuple(x.flatten().tolist()) for x in pictures(96, 0)[0]}


def test_the_fingerprint_is_of_weights_examples_and_functions():
    x, y = pictures(20, 0)
    data = {"train": (x, y), "test": (x, y)}
    found = {
        given(Depthwise, data).fingerprint,
        given(Depthwise, data, seed=1).fingerprint,
        given(Depthwise, data | {"test": (x + 1, y)}).fingerprint,
        given(Depthwise, data, squared).fingerprint,
        given(Depthwise, data, augment=mirrored).fingerprint,
    }
    assert len(found) == 5
    assert given(Depthwise, data).fingerprint in found


# What is wrong is said in a sentence.


class TwoInputs(nn.Module):
    def forward(self, image, mask):
        return image


class Keywords(nn.Module):
    def forward(self, *, image):
        return image


class Pair(Depthwise):
    def forward(self, x):
        return super().forward(x), x


class Keyed(Depthwise):
    def forward(self, batch):
        return super().forward(batch.get("image"))


def breaking():
    raise OSError("no such weights")


def data_with(split="train", **changes):
    x, y = pictures(20, 0)
    return splits() | {split: (changes.get("x", x), changes.get("y", y))}


MISSHAPEN = [pictures(4, 0), (torch.zeros(1, 3, 9, 9), torch.tensor([1]))]
SHAPE = r"\(2, 3, 8, 8\)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((TwoInputs(), splits()), r"model: forward must take one tensor, got image, mask: wrap"),
        ((Keywords(), splits()), r"forward must take one tensor, got image: wrap .*task\.factory"),
        ((breaking, splits()), r"model: must not fail, got OSError: no such weights"),
        ((dict, splits()), r"model: must be or return an nn\.Module, got dict"),
        (("resnet", splits()), r"model: must be or return an nn\.Module, got str"),
        ((Depthwise, {"train": pictures(5, 0)}), r"must map 'train' and 'test'.*got train"),
        ((Depthwise, [1]), r"must map 'train' and 'test'.*got <class 'list'>"),
        ((Depthwise, splits() | {"val": 1}), r"batches: must map.*got train, test, val"),
        (
            (Depthwise, splits() | {"train": [({"x": torch.zeros(1)}, torch.zeros(1))]}),
            r"batches\['train'\]: inputs must be one tensor, got dict: put them into one",
        ),
        (
            (Depthwise, splits() | {"train": ((torch.zeros(3), torch.zeros(3)), torch.zeros(3))}),
            r"batches\['train'\]: inputs must be one tensor, got tuple: put them into one",
        ),
        ((Depthwise, splits() | {"train": [1]}), r"must be inputs and targets, .* got int"),
        ((Depthwise, data_with(y=torch.zeros(3))), r"must have one row an example, got 20, 3"),
        ((Depthwise, splits() | {"train": []}), r"\['train'\]: must hold examples, got none"),
        (
            (Depthwise, splits() | {"test": MISSHAPEN}),
            r"examples must have one shape, got \(3, 8, 8\), \(3, 9, 9\)",
        ),
        (
            (Depthwise, splits(), F.mse_loss, squared),
            r"loss of outputs \(2, 3\): must not fail, got RuntimeError",
        ),
        (
            (Depthwise, splits(), lambda o, t: o.mean()),
            r"loss: must be one value an example, shape \(2,\), got \(\); .* reduction='none'",
        ),
        (
            (Depthwise, splits(), None, lambda o, t: 0.5),
            r"metric: must be one value an example.*got float",
        ),
        (
            (Pair, splits(), None, squared),
            r"loss: must be given where outputs are no tensor, got outputs tuple: a function of",
        ),
        (
            (Pair, splits(), lambda o, t: o[0].sum(1)),
            r"metric: must be given where outputs are no classes.*, got outputs tuple: a function",
        ),
        (
            (Keyed, splits()),
            rf"given one tensor of shape {SHAPE}: must not fail.*wrap it in a module whose forward",
        ),
        ((nn.Linear(7, 2), splits()), rf"given one tensor of shape {SHAPE}: must not fail"),
        ((Depthwise, splits(), lambda o, t: o.sum(1) / 0), r"loss: must be finite, got"),
    ],
)
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_does_not_fit_is_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        given_task(Stored(str(store(given(*arguments), tmp_path))))


class Weighed(nn.Module):
    """A photograph and what a scale said, as their network takes them."""

    def __init__(self):
        super().__init__()
        self.seen, self.weighed = nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, picture, weights):
        return self.head(F.relu(self.seen(picture).mean((2, 3)) + self.weighed(weights)))


class Apart(nn.Module):
    """Hands on the parts of one tensor."""

    def __init__(self):
        super().__init__()
        self.network = Weighed()

    def forward(self, together):
        picture, weights = together.split((192, 2), 1)
        return self.network(picture.view(-1, 3, 8, 8), weights)


class WeighedTask(TinyTask):
    """Two tensors an example: a batch has both, and ``inputs`` packs them into one."""

    fingerprint = "weighed"

    def model(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Apart().eval()

    def batch(self, split, indices):
        x, y = pictures(self.size(split), len(split))
        weights = torch.stack([y, y % 2], 1).float()
        return x[indices], weights[indices], y[indices]

    def augment(self, batch, generator):
        return mirrored(batch[0], generator), *batch[1:]

    def inputs(self, batch):
        return torch.cat([batch[0].flatten(1), batch[1]], 1)

    def losses(self, model, batch):
        return F.cross_entropy(model(self.inputs(batch)), batch[2], reduction="none")

    def curvature(self, model, batch):
        logits = model(self.inputs(batch))
        return logits, [softmax_factor(logits)]

    def scores(self, model, batch):
        return (model(self.inputs(batch)).argmax(1) == batch[2]).float()


def test_a_network_of_two_tensors_is_searched_by_a_task_that_packs_them():
    task = build_task(TaskConfig(factory=f"{__name__}:WeighedTask"), seed=0)
    check_task(task)
    model, batch = task.model(), task.batch("train", torch.arange(8))
    reads = read_network(model, task.inputs(batch))
    layers = ["network.seen", "network.weighed", "network.head"]
    assert [layer.name for layer in reads.layers] == layers
    choice = choose_estimator(task, model, layers, batch)
    assert choice.estimator == "gauss_newton", choice.reason
    space = network_space(reads, [4], [8])
    attach(
        model,
        dict.fromkeys(space.names[:3], 4) | dict.fromkeys(space.names[3:], 8),
        task.inputs(batch),
    )
    assert len(space) == 6
    assert torch.isfinite(task.losses(model, batch)).all()


class Unbuilt(TinyTask):
    def model(self):
        raise OSError("no such weights")


class Formless(TinyTask):
    def model(self):
        return None


class Undivided(TinyTask):
    def model(self):
        return TwoInputs()


class Bundled(TinyTask):
    def inputs(self, batch):
        return {"image": batch[0]}


class Boxed(TinyTask):
    """Its network returns a dict, of which its losses know nothing."""

    def model(self):
        class Dict(nn.Sequential):
            def forward(self, x):
                return {"logits": super().forward(x)}

        return Dict(nn.Flatten(), nn.Linear(50, 4))


class Mean(TinyTask):
    def losses(self, model, batch):
        return super().losses(model, batch).mean()


class Gone(TinyTask):
    def batch(self, split, indices):
        raise FileNotFoundError("photographs.npz")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Unbuilt, r"Unbuilt: model: must not fail, got OSError: no such weights"),
        (Formless, r"Formless: model: must be or return an nn\.Module, got NoneType"),
        (Undivided, r"model: forward must take one tensor, got image, mask: wrap the network in"),
        (Bundled, r"inputs must return one tensor, got dict: pack its parts into one"),
        (Boxed, r"Boxed: losses: must not fail, got TypeError"),
        (Mean, r"losses must return one value an example, shape \(1,\) for one, got \(\)"),
        (Gone, r"Gone: batch: must not fail, got FileNotFoundError: photographs\.npz"),
    ],
)
def test_a_task_of_ones_own_that_is_broken_is_refused_by_name(kind, message):
    with pytest.raises(InputError, match=rf"^task\.factory: .*{message}"):
        build_task(TaskConfig(factory=f"{__name__}:{kind.__name__}"), seed=0)


def test_a_search_size_of_all_examples_is_refused():
    with pytest.raises(InputError, match=r"search_size: must be within 1\.\.95, got 96"):
        given(Depthwise, splits(), search_size=96)


def test_a_folder_that_is_gone_is_named(tmp_path):
    with pytest.raises(InputError, match=r"must hold what search\.run left there"):
        build_task(
            TaskConfig(
                factory="search.tasks.given:stored", arguments={"folder": str(tmp_path / "x")}
            ),
            0,
        )


def test_an_open_file_in_a_network_is_named(tmp_path):
    class Holding(Depthwise):
        def __init__(self):
            super().__init__()
            self.lock = __import__("threading").Lock()

    with pytest.raises(InputError, match="model: must be picklable to travel, got"):
        packed(Holding(), "model")


def test_a_wrong_setting_is_named_as_in_a_config(tmp_path):
    with pytest.raises(InputError, match=r"finetune\.epoch: unknown key, did you mean 'epochs'"):
        search.run(
            Depthwise,
            splits(),
            budgets=[{"average_bits": 3}],
            settings={"finetune": {"epoch": 1}},
            out=tmp_path,
        )


def test_a_script_travels_that_is_there_under_two_names(monkeypatch):
    # As a script's module is, once multiprocessing has looked at it.
    monkeypatch.setitem(sys.modules, "__mp_main__", sys.modules[__name__])
    for _ in range(2):
        assert b"one_hot" in packed(squared, "loss")


def test_code_of_ones_own_travels_and_what_is_installed_goes_by_name(tmp_path):
    content = packed((squared, nn.Linear), "loss")
    assert b"torch.nn.modules.linear" in content
    # Another process, which cannot import this module.
    (tmp_path / "loss.pkl").write_bytes(content)
    script = (
        "import pickle, sys, torch\n"
        f"loss, _ = pickle.loads(open({str(tmp_path / 'loss.pkl')!r}, 'rb').read())\n"
        "assert 'test_any_model' not in sys.modules\n"
        "print(loss(torch.ones(1, 3), torch.tensor([0])).item())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert found.stdout.split() == ["2.0"]
    assert unpacked(content)[1] is nn.Linear
    assert pickle.loads(pickle.dumps(content)) == content
