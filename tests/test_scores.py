"""Scores without training: what attach and evaluate give, cheaper, whatever was scored before."""

import json
import math
import pickle
import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import NetTask, ResidualNet, TinyTask
from torch import nn

from hawq.allocation import Allocation
from hawq.finetune import (
    ActivationQuantizer,
    attach,
    evaluate,
    reestimate,
    sample_activations,
)
from hawq.finetune.batch_norm import statistics_batches
from hawq.finetune.requantized import Requantized
from hawq.quantizers import Scheme, Schemes
from hawq.reads import network_space, read_network
from search.artefacts import ModelArtefact, StageCost
from search.cli import main
from search.commands.score import score_spec
from search.errors import InputError
from search.folder import RunFolder
from search.scores import CheapScores, ScoreSpec
from search.tasks.checkpoint import save_state
from search.trials import calibration_inputs


class Branches(nn.Module):
    """Two layers read one tensor, a head runs twice, a batch-norm follows."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3)
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x):
        x = torch.relu(x)
        y = self.norm(self.left(x) + self.right(x)).relu()
        return self.head(y.mean((2, 3))) + self.head(3 * y.amax((2, 3)))


@dataclass(frozen=True)
class BranchesTask(NetTask):
    make: type = Branches


TASKS = {"residual": TinyTask(num_examples=40), "branches": BranchesTask(num_examples=40)}
MENU = (2, 3, 4, 8)


def space_of(task, by_channel=False):
    example = task.inputs(task.batch("train", torch.arange(1)))
    return network_space(read_network(task.model(), example), MENU, MENU, by_channel=by_channel)


def allocation(task, seed, by_channel=False):
    space = space_of(task, by_channel)
    return Allocation.of(space, np.random.default_rng(seed).choice(MENU, len(space)).tolist())


@pytest.fixture
def make_spec(tmp_path):
    def make(task=TASKS["residual"], **changes):
        save_state(tmp_path / "weights.safetensors", task.model().state_dict())
        given = {"num_examples": 30, "statistics_batches": 2, "statistics_batch_size": 16}
        return ScoreSpec(task, tmp_path / "weights.safetensors", **(given | changes))

    return make


def straightforward(spec, chosen):
    """Each example's score, by attach, with ranges of the unquantized network."""
    task, model = spec.task, spec.task.model().eval()
    bits = dict(zip(chosen.names, chosen.bits, strict=True))
    example = task.inputs(task.batch("train", torch.arange(1)))
    sampled = task.model().eval()
    attach(sampled, {k: b for k, b in bits.items() if k[0] == "a"}, example, spec.schemes)
    samples = sample_activations(sampled, calibration_inputs(task, "cpu"))
    attach(model, bits, example, spec.schemes)
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.calibrate(samples[module.name])
    if spec.fidelity == "batch_norm":
        batches = (spec.statistics_batches, spec.statistics_batch_size)
        reestimate(model, statistics_batches(task, *batches, spec.seed, "cpu"))
    return evaluate(model, task, "search", batch_size=spec.batch_size)[: spec.num_examples], model


SCHEMES = {
    "lsq": Schemes(),
    "asymmetric": Schemes(Scheme(symmetric=False), Scheme(per="tensor", symmetric=False)),
    "channels": Schemes(Scheme("dorefa"), Scheme(per="channel", range="minmax")),
}


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("fidelity", ["none", "batch_norm"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scores_are_those_of_the_straightforward_way(make_spec, name, by_channel, fidelity, scheme):
    spec = make_spec(TASKS[name], fidelity=fidelity, schemes=SCHEMES[scheme])
    scores = CheapScores(spec)
    for seed in (0, 1):
        chosen = allocation(TASKS[name], seed, by_channel)
        found = scores.score(chosen)
        expected, model = straightforward(spec, chosen)
        assert torch.equal(found.examples, expected)
        assert found.evaluation.score == pytest.approx(float(expected.mean()))
        # Scores are few and coarse: outputs tell more.
        images = TASKS[name].batch("test", torch.arange(9))[0]
        assert torch.equal(scores._network.model(images), model(images))


@settings(max_examples=10)
@given(seeds=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=5))
def test_what_was_quantized_before_does_not_matter(seeds):
    task = TASKS["branches"]
    images = task.batch("test", torch.arange(9))[0]

    def fresh():
        inputs = [task.inputs(task.batch("train", torch.arange(16)))]
        # Room for hardly anything: what is dropped is made again.
        return Requantized(task.model().eval(), lambda: inputs, memory_bytes=600)

    used = fresh()
    for seed, by_channel in seeds:
        chosen = allocation(task, seed, by_channel)
        bits = dict(zip(chosen.names, chosen.bits, strict=True))
        alone = fresh()
        for network in (used, alone):
            network.quantize(bits)
        assert torch.equal(used.model(images), alone.model(images))
        reestimate(used.model, [images])  # as scoring does
    used.quantize({})
    assert torch.equal(used.model(images), task.model().eval()(images))


def test_scoring_in_another_order_gives_the_same_scores(make_spec):
    chosen = [allocation(TASKS["residual"], seed, seed % 2 == 1) for seed in range(4)]
    first, second = CheapScores(make_spec()), CheapScores(make_spec())
    forward = {a.digest: first.score(a).examples for a in chosen}
    backward = {a.digest: second.score(a).examples for a in reversed(chosen)}
    assert all(torch.equal(forward[digest], backward[digest]) for digest in forward)


def test_fixed_activations_are_quantized_too(make_spec):
    task = TASKS["residual"]
    weights = Allocation.of(space_of(task).part("weights"), [8, 8, 8])
    names = {name: 1 for name in space_of(task).names if name[0] == "a"}
    free, fixed = CheapScores(make_spec()), CheapScores(make_spec(fixed=names))
    images = task.batch("test", torch.arange(9))[0]
    for scores in (free, fixed):
        scores.score(weights)
    assert free.key(weights) != fixed.key(weights)
    assert not torch.equal(free._network.model(images), fixed._network.model(images))


@dataclass(frozen=True)
class Counting(TinyTask):
    """Notes every batch that is scored."""

    seen: tuple[list[int], ...] = ([],)

    def scores(self, model, batch):
        self.seen[0].append(len(batch[1]))
        return super().scores(model, batch)


def test_equal_allocations_cost_one_evaluation_across_processes(make_spec, tmp_path):
    task = Counting(num_examples=40, seen=([],))
    spec = make_spec(task, folder=tmp_path / "scores", batch_size=30)
    chosen = allocation(task, 0)
    first = CheapScores(spec).score(chosen)
    assert task.seen[0] == [30]
    again = CheapScores(spec).score(chosen)  # as another process would, or one after a restart
    assert task.seen[0] == [30]
    assert torch.equal(again.examples, first.examples)
    assert again.evaluation == first.evaluation
    assert again.standard_error == first.standard_error
    (path,) = (tmp_path / "scores").iterdir()
    assert path.name == f"{CheapScores(spec).key(chosen)}.json"
    assert path.stat().st_size < 500
    CheapScores(spec).score(allocation(task, 1))
    assert task.seen[0] == [30, 30]


@pytest.mark.parametrize(
    "changes",
    [
        {"fidelity": "none"},
        {"num_examples": 20},
        {"seed": 1},
        {"statistics_batches": 1},
        {"schemes": Schemes(Scheme(range="minmax"))},
        {"fixed": {"a:conv1#0": 3}},
    ],
)
def test_another_way_of_scoring_has_another_key(make_spec, changes):
    chosen = allocation(TASKS["residual"], 0)
    assert CheapScores(make_spec()).key(chosen) != CheapScores(make_spec(**changes)).key(chosen)


def test_the_error_is_that_of_a_mean(make_spec):
    found = CheapScores(make_spec()).score(allocation(TASKS["residual"], 0))
    values = found.examples.double().numpy()
    assert len(values) == 30
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(30))
    assert found.evaluation.fidelity == "batch_norm"
    assert found.evaluation.seconds > 0


@dataclass(frozen=True)
class Undefined(TinyTask):
    def scores(self, model, batch):
        return super().scores(model, batch) / 0


def test_scores_that_are_not_finite_are_a_failure_with_its_reason(make_spec, tmp_path):
    spec = make_spec(Undefined(num_examples=40), folder=tmp_path / "scores")
    for _ in range(2):  # computed each time: it may have been the machine
        found = CheapScores(spec).score(allocation(spec.task, 0))
        assert found.evaluation.status == "failed"
        assert found.evaluation.reason == "the scores of some examples are not finite"
        assert len(found.examples) == 0
    assert not (tmp_path / "scores").exists()
    with pytest.raises(ValueError, match="a score must be there to have an error"):
        found.standard_error  # noqa: B018


def test_a_specification_travels_and_builds_the_same_scores(make_spec):
    spec = make_spec(TASKS["branches"])
    chosen = allocation(TASKS["branches"], 0)
    travelled = pickle.loads(pickle.dumps(spec))
    assert len(pickle.dumps(spec)) < 2000
    assert torch.equal(
        CheapScores(travelled).score(chosen).examples, CheapScores(spec).score(chosen).examples
    )


def test_what_makes_no_sense_is_refused(make_spec):
    with pytest.raises(ValueError, match="num_examples must be at least 2, got 1"):
        make_spec(num_examples=1)
    task = TinyTask("dropout", num_examples=40)
    chosen = allocation(task, 0)
    with pytest.raises(ValueError, match="fidelity must be none for a network without"):
        CheapScores(make_spec(task)).score(chosen)
    CheapScores(make_spec(task, fidelity="none")).score(chosen)
    network = Requantized(ResidualNet().eval(), lambda: [torch.zeros(1, 2, 5, 5)])
    for bits, message in (
        ({"w:nowhere": 4}, r"must name quantizable layers .* got \['w:nowhere'\]"),
        ({"a:nowhere#0[0]": 4}, r"got \['a:nowhere#0'\]"),
        ({"w:conv1[0]": 4}, "w:conv1 must have bits for 3 channels, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            network.quantize(bits)


# --- hawq allocate --score ----------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """A run's folder with tables and weights, as far as scoring looks into it."""
    from test_allocate_command import tables  # noqa: PLC0415

    task = TinyTask(num_examples=40)
    (tmp_path / "config.yaml").write_text(
        "task: {factory: oracles:TinyTask, arguments: {num_examples: 40}}\n"
        "budgets: [{average_bits: 3, activation_average_bits: 4}]\n"
    )
    cost = StageCost(stage="tables", seconds=0, cpu_seconds=0)
    folder = RunFolder(tmp_path)
    folder.save("tables", {"config": {}}, tables(), cost)
    model = ModelArtefact(
        weights_sha256="",
        num_parameters=1,
        num_quantizable=1,
        source="checkpoint",
        train_size=40,
        search_size=40,
        search_seen=True,
        score_name="accuracy",
        search_score=0.5,
    )
    folder.save("model", {"config": {}}, model, cost)
    save_state(tmp_path / "model.safetensors", task.model().state_dict())
    return tmp_path


@pytest.mark.parametrize("method", ["exact", "channel"])
def test_the_command_prints_the_score_beside_omega(run, monkeypatch, capsys, method):
    arguments = ["--budget", "average_bits=3", "--method", method, "--score"]
    shown = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["hawq", "allocate", str(run), *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        shown.append(" ".join(capsys.readouterr().out.split()))
    assert re.search(
        r"measured accuracy \d+\.\d+ ± \d+\.\d+ % without training, batch-norm statistics "
        r"estimated again, on 40 examples of the search split, on which the network was trained: "
        r"it only ranks \(unquantized 50.00 %\), in",
        shown[0],
    )
    (path,) = (run / "scores").iterdir()
    document = json.loads(path.read_text())
    assert f"{100 * document['score']:.2f} ±" in shown[0]
    assert "predicted" in shown[0]
    assert shown[1].split("measured")[1] == shown[0].split("measured")[1]


def test_a_score_of_some_examples_says_what_the_unquantized_one_is_of(run, monkeypatch, capsys):
    arguments = ["--budget", "average_bits=3", "--score", "--score-examples", "8"]
    monkeypatch.setattr(sys, "argv", ["hawq", "allocate", str(run), *arguments])
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "on 8 examples of the search split" in shown
    assert "(unquantized 50.00 %, on all 40)" in shown


def test_a_run_without_weights_cannot_be_scored(run):
    assert score_spec(run, num_examples=7).num_examples == 7
    assert score_spec(run).fixed == {}
    (run / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"must hold the weights to score, got no model"):
        score_spec(run)


def test_what_the_config_keeps_in_floating_point_is_not_quantized_for_a_score(run):
    config = run / "config.yaml"
    config.write_text(
        "task: {factory: oracles:TinyTask, arguments: {num_examples: 40}}\n"
        "budgets: [{average_bits: 3}]\n"
    )
    every = score_spec(run).fixed
    kept = list(every)[1]
    config.write_text(
        config.read_text() + f"activations: {{keep: ['{kept.removeprefix('a:')}']}}\n"
    )
    assert score_spec(run).fixed == {name: b for name, b in every.items() if name != kept}
