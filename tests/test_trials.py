"""Trials: a function of their specification, whatever interrupts them."""

import json
import os
import signal
import struct
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import ray
import torch
from safetensors.torch import load_file
from tensorboardX.proto.event_pb2 import Event

from hawq.finetune import Recipe, evaluate, fixed_activations
from hawq.reads import read_network
from hawq.space import quantizable_layers
from search.artefacts import EpochRecord
from search.config import TrialsConfig
from search.errors import InputError
from search.fit import fit, read_progress, saved_epochs
from search.tasks.classification import ClassificationTask
from search.trials import BestSoFar, TrialSpec, quantized_model, run_trial, run_trials
from search.trials.tracking import refuse_untrackable

TASK = ClassificationTask(data="digits", root=None, network="resnet8", search_size=100)
RECIPE = Recipe(epochs=3, batch_size=64, lr=0.02, examples_per_epoch=256)
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def state():
    """A network that knows the digits a little."""
    model = TASK.model()
    torch.set_num_threads(1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    model.train()
    for i in range(15):
        batch = TASK.batch("train", torch.arange(i * 64, i * 64 + 64))
        optimizer.zero_grad()
        TASK.losses(model, batch).mean().backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def make_spec(folder, *, bits=3, recipe=RECIPE, digest="d"):
    return TrialSpec(digest, all_bits(bits), recipe, 0, folder)


def all_bits(bits):
    """One width for the weights; 4 bits for what layers read, 8 for the network's own input."""
    model = TASK.model()
    reads = read_network(model, TASK.inputs(TASK.batch("train", torch.arange(1))))
    weights = {f"w:{name}": bits for name in quantizable_layers(model)}
    return weights | fixed_activations(reads, 4, 8)


def results(trial):
    """What must not depend on interruptions: everything but times."""
    return [(record.epoch, record.loss, record.search_score) for record in trial.epochs]


def scalars(path):
    """What a TensorBoard file holds: by tag the values by step."""
    data, start, found = path.read_bytes(), 0, {}
    while start < len(data):  # a length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", data, start)
        event = Event.FromString(data[start + 12 : start + 12 + length])
        start += 16 + length
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


class Interrupted(Exception):
    pass


def test_a_trial_learns_and_its_file_holds_what_was_scored(tmp_path, state):
    spec = make_spec(tmp_path / "t")
    trial = run_trial(TASK, state, spec, device="cpu")
    assert trial.status == "finished"
    assert [record.epoch for record in trial.epochs] == [0, 1, 2, 3]
    assert trial.epochs[-1].search_score > trial.epochs[0].search_score
    model = quantized_model(TASK, state, spec)
    model.load_state_dict(load_file(tmp_path / "t" / "model.safetensors"))
    assert float(evaluate(model, TASK, "search").mean()) == trial.search_score
    assert read_progress(tmp_path / "t").done == 3


@pytest.mark.parametrize("epochs_before", [0, 1, 2])
def test_an_interrupted_trial_ends_with_the_same_bits(tmp_path, state, epochs_before):
    undisturbed = run_trial(TASK, state, make_spec(tmp_path / "a"), device="cpu")

    def interrupt(record):
        if record.epoch == epochs_before:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_trial(TASK, state, make_spec(tmp_path / "b"), device="cpu", on_epoch=interrupt)
    assert len(saved_epochs(tmp_path / "b")) == epochs_before + 1
    again = run_trial(TASK, state, make_spec(tmp_path / "b"), device="cpu")
    assert results(again) == results(undisturbed)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_diverging_trial_is_a_result_with_its_reason(tmp_path, state):
    recipe = Recipe(epochs=2, batch_size=64, lr=1e6, warmup=0.0)
    trial = run_trial(TASK, state, make_spec(tmp_path / "t", recipe=recipe), device="cpu")
    assert trial.status == "failed"
    assert "lower lr (now 1e+06)" in trial.reason
    assert len(trial.epochs) >= 1


def test_training_does_not_touch_the_global_random_state(tmp_path):
    before = torch.random.get_rng_state()
    fit(TASK.model(), TASK, Recipe(1, 64, 0.01), folder=tmp_path, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)


class Unscorable(ClassificationTask):
    """Has scores that overflow once it was trained."""

    def scores(self, model, batch):
        scores = ClassificationTask.scores(self, model, batch)
        return scores / 0 if model.linear.bias.any() else scores


def test_a_score_that_is_not_finite_ends_a_trial_with_its_reason(tmp_path, state):
    task = Unscorable(data="digits", root=None, network="resnet8", search_size=100)
    still = {name: torch.zeros_like(v) if "linear.bias" in name else v for name, v in state.items()}
    trial = run_trial(task, still, make_spec(tmp_path / "t"), device="cpu")
    assert trial.status == "failed"
    assert trial.reason.startswith("the score on the search split must be finite, got ")
    assert [record.epoch for record in trial.epochs] == [0]


def test_the_best_epoch_of_all_trials_is_exported_and_scores_what_it_says(tmp_path, state):
    best = BestSoFar(tmp_path / "best", {"weights": "w"}, {"d2": ["exact at 3 bits"]})
    trials = []
    for name, lr in (("1", 1e-6), ("2", 0.05), ("3", 1e-6)):
        recipe = replace(RECIPE, lr=lr)
        spec = make_spec(tmp_path / name, recipe=recipe, digest=f"d{name}")
        trials.append(run_trial(TASK, state, spec, device="cpu", best=best))
    exported = json.loads((tmp_path / "best" / "allocation.json").read_text())
    scores = {t.digest: [record.search_score for record in t.epochs] for t in trials}
    assert exported["search_score"] == max(map(max, scores.values()))
    assert exported["search_score"] == scores[exported["digest"]][exported["epoch"]]
    assert exported["digest"] == "d2"
    assert exported["methods"] == ["exact at 3 bits"]
    assert exported["recipe"]["lr"] == 0.05
    model = quantized_model(TASK, state, make_spec(tmp_path / "2"))
    model.load_state_dict(load_file(tmp_path / "best" / "model.safetensors"))
    assert float(evaluate(model, TASK, "search").mean()) == exported["search_score"]
    folders = [path for path in tmp_path.glob("best*") if path.is_dir() and not path.is_symlink()]
    assert len(folders) == 1  # those before it are gone


@pytest.mark.parametrize("function", ["symlink_to", "replace"])
def test_an_export_that_is_cut_short_leaves_the_pair_before_it(
    tmp_path, state, monkeypatch, function
):
    best = BestSoFar(tmp_path / "best", {"weights": "w"})
    spec, model = make_spec(tmp_path / "t"), TASK.model()

    def offer(epoch, score):
        best.offer(model, spec, EpochRecord(epoch=epoch, loss=1, search_score=score, seconds=1))

    def exported():
        weights = load_file(tmp_path / "best" / "model.safetensors")["linear.bias"]
        return json.loads((tmp_path / "best" / "allocation.json").read_text())["epoch"], weights[0]

    with torch.no_grad():
        model.linear.bias.fill_(1.0)
    offer(1, 0.5)
    with torch.no_grad():
        model.linear.bias.fill_(2.0)
    with monkeypatch.context() as patched:

        def die(*_, **__):
            raise Interrupted

        patched.setattr(*((Path, function) if function == "symlink_to" else (os, function)), die)
        with pytest.raises(Interrupted):
            offer(2, 0.75)
    assert exported() == (1, 1.0)
    offer(1, 0.25)
    offer(2, 0.5)  # a tie: the earlier epoch stays
    assert exported() == (1, 1.0)
    offer(2, 0.75)
    assert exported() == (2, 2.0)


def test_an_export_of_other_weights_gives_way(tmp_path):
    spec, model = make_spec(tmp_path / "t"), TASK.model()
    for name, score in (("w", 0.75), ("other", 0.25)):
        record = EpochRecord(epoch=1, loss=1, search_score=score, seconds=1)
        BestSoFar(tmp_path / "best", {"weights": name}).offer(model, spec, record)
    assert json.loads((tmp_path / "best" / "allocation.json").read_text())["search_score"] == 0.25


def test_tracking_without_mlflow_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"pip install 'hawq-search\[tracking\]'"):
        refuse_untrackable("sqlite:////tmp/mlflow.db")
    refuse_untrackable(None)


@pytest.mark.filterwarnings("ignore")  # MLflow's own
@pytest.mark.ray
def test_mlflow_gets_every_epoch_of_a_trial(ray_cluster, tmp_path, state):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    resources = TrialsConfig(cpus=1, mlflow=uri)
    spec = make_spec(tmp_path / "t")
    (trial,) = run_trials(TASK, state, [spec], resources=resources, storage=tmp_path / "tune")
    client = mlflow.MlflowClient(uri)
    (kept,) = client.search_runs([client.get_experiment_by_name("hawq-trials").experiment_id])
    told = [m.value for m in client.get_metric_history(kept.info.run_id, "search_score")]
    assert told == [record.search_score for record in trial.epochs]
    assert kept.data.params["trial/lr"] == str(RECIPE.lr)


@pytest.mark.ray
def test_tune_runs_every_trial_with_the_bits_of_this_process(ray_cluster, tmp_path, state):
    specs = [make_spec(tmp_path / str(bits), bits=bits, digest=str(bits)) for bits in (2, 4)]
    seen = []
    trials = run_trials(
        TASK,
        state,
        specs,
        resources=TrialsConfig(cpus=1),
        storage=tmp_path / "tune",
        on_progress=seen.append,
    )
    for trial, spec, bits in zip(trials, specs, (2, 4), strict=True):
        alone = run_trial(
            TASK, state, make_spec(tmp_path / f"alone{bits}", bits=bits), device="cpu"
        )
        assert (trial.digest, trial.status) == (spec.digest, "finished")
        assert results(trial) == results(alone)
    assert seen == sorted(seen)
    for trial, spec in zip(trials, specs, strict=True):
        (written,) = (tmp_path / "tune").glob(f"*/{spec.folder.name}/events.out.tfevents.*")
        told = scalars(written)
        scores = [record.search_score for record in trial.epochs]
        assert told["ray/tune/search_score"] == pytest.approx(dict(enumerate(scores, 1)))
        losses = [record.loss for record in trial.epochs[1:]]
        assert told["ray/tune/loss"] == pytest.approx(dict(enumerate(losses, 2)))
        rates = [RECIPE.rate((epoch - 0.5) / 3) for epoch in (1, 2, 3)]
        assert told["ray/tune/lr"] == pytest.approx(dict(enumerate(rates, 2)))
    again = run_trials(
        TASK, state, specs, resources=TrialsConfig(cpus=1), storage=tmp_path / "unused"
    )
    assert again == trials
    assert not (tmp_path / "unused").exists()


@pytest.mark.ray
def test_early_stopping_is_a_result_that_says_so(ray_cluster, tmp_path, state):
    recipe = Recipe(epochs=8, batch_size=64, lr=0.01, examples_per_epoch=128)
    specs = [
        TrialSpec(str(bits), all_bits(bits), recipe, 0, tmp_path / str(bits)) for bits in (8, 1)
    ]
    trials = run_trials(
        TASK,
        state,
        specs,
        # One after the other, so that there is something to compare the second with.
        resources=TrialsConfig(cpus=1, asha=True, max_concurrent=1),
        storage=tmp_path / "tune",
    )
    assert trials[0].status == "finished"
    assert trials[1].status == "stopped"
    assert trials[1].reason.startswith("stopped early after ")
    assert 0 < len(trials[1].epochs) < 9


class FullDisk(ClassificationTask):
    """Finds no space, whenever it is trained."""

    def augment(self, batch, generator):
        raise OSError(28, "No space left on device", "checkpoint.pt")


@pytest.mark.ray
def test_a_full_disk_is_told_and_is_no_result(ray_cluster, tmp_path, state):
    task = FullDisk(data="digits", root=None, network="resnet8", search_size=100)
    spec = make_spec(tmp_path / "t")
    with pytest.raises(OSError, match="No space left") as caught:
        run_trials(
            task,
            state,
            [spec],
            resources=TrialsConfig(cpus=1, max_failures=0),
            storage=tmp_path / "tune",
        )
    assert caught.value.errno == 28
    assert not (spec.folder / "result.json").exists()


class BrokenTask(ClassificationTask):
    """Has a mistake in its augmentation."""

    def augment(self, batch, generator):
        raise KeyError("no such thing")


@pytest.mark.ray
def test_a_trial_that_cannot_run_is_a_record_and_is_tried_again_next_time(
    ray_cluster, tmp_path, state
):
    settings = {"data": "digits", "root": None, "network": "resnet8", "search_size": 100}
    spec = make_spec(tmp_path / "t")
    resources = TrialsConfig(cpus=1, max_failures=0)
    arguments = {"resources": resources, "storage": tmp_path / "tune"}
    (trial,) = run_trials(BrokenTask(**settings), state, [spec], **arguments)
    assert trial.status == "failed"
    assert "no such thing" in trial.reason
    (again,) = run_trials(TASK, state, [spec], **arguments)
    assert again.status == "finished"


class MortalTask(ClassificationTask):
    """Kills the process that trains it, once, in the second epoch."""

    def augment(self, batch, generator):
        marker, checkpoint = os.environ["HAWQ_MARKER"], os.environ["HAWQ_CHECKPOINT"]
        epochs = saved_epochs(_parent(checkpoint)) if os.path.exists(checkpoint) else []
        if len(epochs) == 2 and not os.path.exists(marker):
            with open(marker, "w"):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        return ClassificationTask.augment(self, batch, generator)

    def __reduce__(self):
        # A crew's task travels twice: to the trial, and from there to the workers.
        paths = {name: os.environ[name] for name in ("HAWQ_MARKER", "HAWQ_CHECKPOINT")}
        return _mortal, (paths,)


def _parent(path):
    return Path(path).parent


@pytest.mark.ray
def test_a_trial_whose_worker_is_killed_goes_on_after_its_last_epoch(ray_cluster, tmp_path, state):
    spec = make_spec(tmp_path / "t")
    environment = {
        "HAWQ_MARKER": str(tmp_path / "died"),
        "HAWQ_CHECKPOINT": str(spec.folder / "checkpoint.pt"),
    }
    task = _Marked(environment)
    (trial,) = run_trials(
        task, state, [spec], resources=TrialsConfig(cpus=1), storage=tmp_path / "tune"
    )
    assert (tmp_path / "died").exists()
    assert trial.status == "finished"
    undisturbed = run_trial(TASK, state, make_spec(tmp_path / "alone"), device="cpu")
    assert results(trial) == results(undisturbed)


class _Marked:
    """Builds a mortal task in the worker, with the paths that it needs."""

    def __init__(self, environment):
        self._environment = environment

    def __reduce__(self):
        return _mortal, (self._environment,)


def _mortal(environment):
    os.environ.update(environment)
    return MortalTask(data="digits", root=None, network="resnet8", search_size=100)


@pytest.mark.ray
def test_two_workers_train_about_as_well_as_one_and_a_killed_one_resumes(
    ray_cluster, tmp_path, state
):
    spec = make_spec(tmp_path / "t", bits=4)
    environment = {
        "HAWQ_MARKER": str(tmp_path / "died"),
        "HAWQ_CHECKPOINT": str(spec.folder / "checkpoint.pt"),
    }
    (trial,) = run_trials(
        _Marked(environment),
        state,
        [spec],
        resources=TrialsConfig(cpus=1, workers=2),
        storage=tmp_path / "tune",
        best=BestSoFar(tmp_path / "best", {"weights": "w"}),
    )
    assert (tmp_path / "died").exists()
    assert trial.status == "finished"
    alone = run_trial(TASK, state, make_spec(tmp_path / "alone", bits=4), device="cpu")
    assert trial.epochs[0].search_score == pytest.approx(alone.epochs[0].search_score)
    for ours, theirs in zip(trial.epochs[1:], alone.epochs[1:], strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=0.1)
    assert trial.search_score == pytest.approx(alone.search_score, abs=0.05)
    exported = json.loads((tmp_path / "best" / "allocation.json").read_text())
    assert exported["search_score"] == max(record.search_score for record in trial.epochs)
