"""``hawq export`` and ``hawq import``: from a run's folder to files, and mistakes in one line."""

import json
import sys

import onnx
import pytest
import torch
from oracles import TinyTask
from test_allocate_command import tables

from hawq.finetune import Recipe, evaluate
from hawq.quantizers import Schemes
from search.artefacts import (
    CandidatesArtefact,
    Score,
    SeededTrial,
    StageCost,
    TestArtefact,
    TrialsArtefact,
)
from search.cli import main
from search.commands.allocate import allocate
from search.commands.export import chosen, export, given
from search.commands.imported import imported, pinned
from search.config_file import load_config
from search.errors import InputError
from search.exported import network_of, read_exported
from search.folder import RunFolder
from search.spaces import reads_of, space_of
from search.stages.candidates import candidate as best_within
from search.tables import Tables
from search.tasks.checkpoint import read_state, save_state
from search.trials import TrialSpec, quantized_model
from search.trials.running import run_trial

TASK = TinyTask(num_examples=40)
BUDGETS = {"13.11×": "average_bits=3", "4 bits": "average_bits=4"}
NOTHING = StageCost(stage="", seconds=0, cpu_seconds=0)


def written(path):
    """A run's folder with everything that an export looks into: one method was fine-tuned."""
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(
        "task: {factory: oracles:TinyTask, arguments: {num_examples: 40}}\n"
        "budgets: [{average_bits: 3, activation_average_bits: 4}]\n"
    )
    folder = RunFolder(path)
    folder.save("tables", {"config": {}}, tables(), NOTHING)
    save_state(path / "model.safetensors", TASK.model().state_dict())
    candidates = [
        allocate(path, [size, "activation_average_bits=4"], method=method)[0].model_copy(
            update={"budget": label}
        )
        for label, size in BUDGETS.items()
        for method in ("exact", "channel")
    ]
    folder.save(
        "candidates", {}, CandidatesArtefact(budgets=[], fronts=[], candidates=candidates), NOTHING
    )
    trials, scores = [], {}
    for candidate in candidates[:2]:
        spec = TrialSpec(
            candidate.digest,
            candidate.bits,
            Recipe(epochs=1, batch_size=20, lr=0.01),
            seed=3,
            folder=path / "trials" / candidate.digest,
            schemes=Schemes(),
        )
        trial = run_trial(TASK, TASK.model().state_dict(), spec, device="cpu")
        trials.append(SeededTrial(**trial.model_dump(), seed=3))
        model = trained(path, candidate.bits, trials[-1])
        mean = float(evaluate(model, TASK, "test").mean())
        scores[candidate.key] = score(mean)
    failed = trials[0].model_copy(
        update={"digest": candidates[2].digest, "status": "failed", "reason": "loss is NaN"}
    )
    folder.save("trials", {}, TrialsArtefact(trials=[*trials, failed]), NOTHING)
    test = TestArtefact(num_examples=40, unquantized=score(0.5), scores=scores, differences=[])
    folder.save("test", {}, test, NOTHING)
    return path


def score(mean):
    zeros = {"standard_error": 0, "drop": 0, "drop_standard_error": 0}
    return Score(score=mean, **zeros, seeds=[3], seed_scores=[mean], digests=[""])


def trained(run, bits, trial):
    spec = TrialSpec(trial.digest, bits, Recipe(epochs=1, batch_size=20, lr=0.01), 3, run)
    model = quantized_model(TASK, TASK.model().state_dict(), spec)
    model.load_state_dict(read_state(run / "trials" / trial.folder / "model.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return written(tmp_path_factory.mktemp("exports") / "run")


@pytest.mark.parametrize("method", ["exact", "channel"])
def test_a_packed_file_is_the_network_of_the_trial(run, tmp_path, method):
    what = chosen(run, method, "13.11x")
    export(what, tmp_path / "file", "packed")
    found = network_of(read_exported(tmp_path / "file"), TASK)
    inputs = TASK.inputs(TASK.batch("test", torch.arange(20)))
    assert torch.equal(found(inputs), trained(run, what.bits, what.trial)(inputs))


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_graphs_and_programs_compute_the_same(run, tmp_path, to, batch):
    what = chosen(run, "exact", "13.11")
    export(what, tmp_path / "file", to, batch=batch)
    file = read_exported(tmp_path / "file")
    inputs = TASK.inputs(TASK.batch("test", torch.arange(20)))
    found, expected = network_of(file, TASK)(inputs), trained(run, what.bits, what.trial)(inputs)
    assert file.batch == batch
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.9
    if to == "onnx":
        assert file.about["max_error"] < 1
        assert file.about["notes"]


def test_a_graph_without_onnx_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "hawq.export.onnx_graph", raising=False)
    with pytest.raises(InputError, match=r"onnx must be installed .*hawq-search\[export\]"):
        export(chosen(run, "exact", "13.11"), tmp_path / "file", "onnx")


def test_where_a_file_came_from_goes_with_it(run, tmp_path):
    export(chosen(run, "exact", "13.11×"), tmp_path / "file", "packed")
    about = read_exported(tmp_path / "file").about
    assert (about["method"], about["budget"], about["seed"]) == ("exact", "13.11×", 3)
    assert about["task"] == TASK.fingerprint
    assert 0 <= about["test"] <= 1


def test_what_is_only_quantized_is_exported_when_asked_for(run, tmp_path):
    what = chosen(run, "exact", "4 bits", is_trained=False)
    lines = export(what, tmp_path / "file", "packed")
    assert "not trained" in lines[0]
    about = read_exported(tmp_path / "file").about
    assert about["seed"] is None
    assert "test" not in about


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "exakt", "budget": "4 bits"}, "did you mean 'exact'"),
        ({"method": "exact"}, "--budget: must be one of '13.11×', '4 bits', got none"),
        ({"method": "exact", "budget": "5"}, "--budget: must be one of .* got '5'"),
        ({"method": "exact", "budget": "13.11", "seed": 0}, "--seed: must be one of 3, got 0"),
        ({"method": "exact", "budget": "4 bits"}, "failed: loss is NaN: .*--untrained"),
        ({"method": "channel", "budget": "4 bits"}, "must have a finished trial, got none"),
    ],
)
def test_a_wrong_choice_is_told_what_there_is(run, given, message):
    with pytest.raises(InputError, match=message):
        chosen(run, **given)


def test_a_run_without_trials_offers_what_is_only_quantized(run, tmp_path):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "candidates.json").write_text((run / "candidates.json").read_text())
    with pytest.raises(InputError, match=r"must have finished its trials, got none: .*--untrained"):
        chosen(tmp_path, "exact", "4 bits")
    with pytest.raises(InputError, match=r"must be the folder of a run"):
        chosen(tmp_path / "none", "exact")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04", "must be a file that hawq export wrote"),
        (b"some text that is no graph", "must be a file that hawq export wrote"),
        (b"\x02\0\0\0\0\0\0\0{}", "must be a packed network"),
        (b"", "must be a file that hawq export wrote"),
    ],
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_exported(tmp_path / "file")


def test_a_graph_without_our_metadata_is_refused(tmp_path):
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "plain", ends[:1], ends[1:])
    (tmp_path / "file").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    with pytest.raises(InputError, match="an ONNX graph without the metadata"):
        read_exported(tmp_path / "file")


def test_a_missing_file_is_a_mistake(tmp_path):
    with pytest.raises(InputError, match="must be an exported network"):
        read_exported(tmp_path / "none")


def test_the_command_line_says_what_the_file_holds(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "file"
    given = ["export", str(run), "--method", "exact", "--budget", "13.11×", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["hawq", *given])
    with pytest.raises(SystemExit, match="0"):
        main()
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{out.stat().st_size:,} bytes" in printed
    assert "the table counts" in printed


def test_imported_bits_are_priced_by_the_tables_of_the_run(run, tmp_path, monkeypatch, capsys):
    own = chosen(run, "exact", "13.11").candidate
    (tmp_path / "bits.json").write_text(json.dumps(own.bits))
    out = tmp_path / "allocation.json"
    given = ["import", str(tmp_path / "bits.json"), str(run), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["hawq", *given])
    with pytest.raises(SystemExit, match="0"):
        main()
    found = json.loads(out.read_text())
    assert found["method"] == "imported"
    assert found["digest"] == own.digest
    assert found["costs"] == own.costs
    assert "predicted" in capsys.readouterr().out


def with_first_layer_at(run, tmp_path, bits):
    """A file of bits that no method of the run chose."""
    own = chosen(run, "exact", "13.11").candidate.bits
    path = tmp_path / "bits.json"
    path.write_text(json.dumps(own | {next(iter(own)): bits}))
    return path


@pytest.mark.parametrize("to", ["packed", "onnx"])
def test_imported_bits_are_exported_as_the_quantized_network(
    run, tmp_path, to, monkeypatch, capsys
):
    bits = with_first_layer_at(run, tmp_path, 8)
    path = tmp_path / "file"
    options = ["--allocation", str(bits), "--format", to, "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["hawq", "export", str(run), *options])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "imported at bits.json, only quantized, not trained" in capsys.readouterr().out
    file = read_exported(path)
    what = given(run, bits)
    assert (file.about["allocation"], file.about["seed"]) == (what.digest, None)
    if to == "packed":
        widths = {w.names[0]: set(w.widths.tolist()) for w in file.packed.weights}
        expected = {f"{n[2:]}.weight": {b} for n, b in what.bits.items() if n[0] == "w"}
        assert widths == expected
        assert 8 in set.union(*widths.values())


def test_bits_of_hawq_allocate_are_exported_too(run, tmp_path):
    found, _ = allocate(run, ["average_bits=5", "activation_average_bits=4"], method="channel")
    (tmp_path / "mine.json").write_text(found.model_dump_json())
    assert given(run, tmp_path / "mine.json").digest == found.digest


def test_a_config_with_pins_lets_a_search_choose_the_imported_bits(run, tmp_path):
    found, _, _ = imported(with_first_layer_at(run, tmp_path, 8), run)
    (tmp_path / "pinned.yaml").write_text(pinned(run, found))
    config = load_config(tmp_path / "pinned.yaml")
    space = space_of(config, reads_of(config, TASK, TASK.model()), by_channel=False)
    (budget,) = config.budgets
    again = best_within("exact", budget, Tables.of(tables(), space))
    assert again.bits == found.bits
    assert config.methods == ["exact"]


def test_bits_of_channels_are_no_pins(run):
    with pytest.raises(InputError, match=r"--pins: must be bits of layers.*export --allocation"):
        pinned(run, chosen(run, "channel", "13.11").candidate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either --method, of the run's, or --allocation, a file of bits"),
        (["--method", "exact", "--allocation", "x"], "give either --method"),
        (["--allocation", "x", "--seed", "1"], "--budget, --seed: are of the run's methods"),
        (["--allocation", "TRACES"], "must be a file of bits, got average traces"),
    ],
)
def test_an_export_of_a_method_or_a_file_is_asked_for(
    run, tmp_path, options, message, monkeypatch, capsys
):
    torch.save(torch.ones(2), tmp_path / "traces")
    options = [str(tmp_path / "traces") if o == "TRACES" else o for o in options]
    given = ["export", str(run), "--out", str(tmp_path / "file"), *options]
    monkeypatch.setattr(sys, "argv", ["hawq", *given])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_average_traces_are_taken_in_the_order_in_which_the_network_runs(run, tmp_path):
    artefact = tables()
    layers = [g["name"] for g in artefact.space if g["name"].startswith("w:")]
    order = list(dict.fromkeys(operation.weight for operation in artefact.operations))
    assert sorted(order) == sorted(layers)
    traces = torch.rand(len(order), generator=torch.Generator().manual_seed(0)) + 0.1
    torch.save(traces, tmp_path / "traces")
    budget = ["average_bits=3", "activation_average_bits=4"]
    found, used, _ = imported(tmp_path / "traces", run, budget)
    assert found.average_bits <= 3
    for name, trace in zip(order, traces.tolist(), strict=True):
        row = used.space.names.index(name)
        num_elements = used.space.groups[row].num_elements
        assert used.traces[row] == pytest.approx(trace * num_elements)


def test_traces_of_another_network_are_refused(run, tmp_path):
    torch.save(torch.ones(2), tmp_path / "traces")
    with pytest.raises(InputError, match=r"an average trace for each of \d+ layers, got 2"):
        imported(tmp_path / "traces", run, ["average_bits=3"])
