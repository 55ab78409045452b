"""``hawq allocate``: tables in, bits out, and every mistake in one line."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from oracles import ResidualNet

from hawq.reads import network_space, read_network
from search.artefacts import GroupTables, LayerLatency, OperationEntry, StageCost, TablesArtefact
from search.cli import main
from search.commands.allocate import allocate
from search.errors import InputError
from search.folder import RunFolder
from search.searchers import Rules
from search.tables import Tables

WEIGHTS, ACTIVATIONS = (1, 2, 4, 8), (2, 4, 8)
READS = read_network(ResidualNet(), torch.zeros(1, 2, 5, 5))


def groups(by_channel):
    """Tables whose Ω falls by four a bit, from traces of their own."""
    space = network_space(READS, WEIGHTS, ACTIVATIONS, by_channel=by_channel)
    traces = np.random.default_rng(int(by_channel)).lognormal(size=len(space))
    table = np.where(space.allowed(), traces[:, None] * 4.0 ** -np.array(space.widths), np.inf)
    return {
        "space": space.to_json(),
        "space_fingerprint": space.fingerprint,
        "widths": list(space.widths),
        "sensitivity": [[v if np.isfinite(v) else None for v in row] for row in table.tolist()],
        "squared_error": np.zeros(table.shape).tolist(),
        "trace": traces.tolist(),
        "trace_error": (0.1 * traces).tolist(),
        "num_scales": [1] * len(space),
    }


def tables(*, channels=True, latency=False):
    prices = [
        LayerLatency(layer=layer.name, weight_bits=w, activation_bits=a, ns=100 * w * a)
        for layer in READS.layers
        for w in WEIGHTS
        for a in ACTIVATIONS
    ]
    return TablesArtefact(
        **groups(False),
        operations=[
            OperationEntry(weight=f"w:{r.layer}", activation=f"a:{r.activation}", macs=r.macs)
            for r in READS.reads
        ],
        alive=[[f"a:{name}" for name in step] for step in READS.alive],
        latency_ns=prices if latency else None,
        channels=GroupTables(**groups(True)) if channels else None,
    )


@pytest.fixture
def run(tmp_path):
    def make(artefact=None):
        cost = StageCost(stage="tables", seconds=0, cpu_seconds=0)
        (tmp_path / "config.yaml").write_text("seed: 0\n")
        RunFolder(tmp_path).save("tables", {"config": {}}, artefact or tables(), cost)
        return tmp_path

    return make


@pytest.mark.parametrize("method", ["exact", "monotone", "uniform", "channel"])
def test_every_method_stays_within_every_budget(run, method):
    budget = ["average_bits=3", "activation_average_bits=4"]
    found, used = allocate(run(), budget, method=method)
    assert found.average_bits <= 3
    assert found.activation_average_bits <= 4
    assert found.sensitivity == pytest.approx(
        sum(
            used.sensitivity[i, used.space.widths.index(found.bits[name])]
            for i, name in enumerate(used.space.names)
        )
    )
    assert (found.granularity == "channel") == (method == "channel")


def test_costs_are_what_they_are_by_hand(run):
    found, _ = allocate(run(tables(latency=True)), ["average_bits=3", "gbops=0.00002"])
    bits = found.bits
    assert found.costs["bops"] == sum(
        r.macs * bits[f"w:{r.layer}"] * bits[f"a:{r.activation}"] for r in READS.reads
    )
    assert found.costs["bops"] <= 20_000
    assert found.costs["latency_ns"] == sum(
        100 * bits[f"w:{r.layer}"] * bits[f"a:{r.activation}"] for r in READS.reads
    )
    sizes = {f"a:{a.name}": a.num_elements for a in READS.activations}
    assert found.costs["activation_bits"] == sum(n * bits[name] for name, n in sizes.items())
    assert found.costs["peak_activation_bits"] == max(
        sum(sizes[f"a:{name}"] * bits[f"a:{name}"] for name in step) for step in READS.alive
    )
    weights = sum(layer.num_elements * bits[f"w:{layer.name}"] for layer in READS.layers)
    assert found.costs["weight_bits"] == weights
    assert found.costs["stored_bits"] == weights + 16 * len(bits)
    assert found.bound == pytest.approx(found.sensitivity)


def test_a_channel_s_width_and_scale_are_stored_too(run):
    found, _ = allocate(run(), ["average_bits=3"], method="channel")
    weights = [name for name in found.bits if name.startswith("w:")]
    tensors = [name for name in found.bits if name.startswith("a:")]
    # Two bits tell one of four widths, and one of three.
    overhead = (16 + 2) * (len(weights) + len(tensors))
    assert found.costs["stored_bits"] == found.costs["weight_bits"] + overhead
    assert found.bound <= found.sensitivity


def test_channels_follow_the_rules_that_hardware_has(run):
    found, _ = allocate(run(), ["average_bits=3"], method="channel", rules=Rules(max_widths=2))
    for layer in READS.layers:
        mine = {b for name, b in found.bits.items() if name.startswith(f"w:{layer.name}[")}
        assert len(mine) <= 2


def test_more_budget_is_never_worse(run):
    folder = run()
    omegas = [
        allocate(folder, [f"average_bits={bits}", "gbops=0.0001"])[0].sensitivity
        for bits in (2, 3, 4, 6)
    ]
    assert omegas == sorted(omegas, reverse=True)


def test_pins_and_ties_of_the_command_hold(run):
    found, _ = allocate(
        run(), ["average_bits=4"], pins=["conv1=8", "a:linear=2"], ties=["conv2,linear"]
    )
    assert found.bits["w:conv1"] == 8
    assert found.bits["a:linear#0"] == 2
    assert found.bits["w:conv2"] == found.bits["w:linear"]


def test_tables_of_a_part_are_the_rows_of_their_kind():
    whole = Tables.of(tables())
    part = whole.part("activations")
    assert [whole.space.names[i] for i in part.rows] == list(part.space.names)
    assert part.space.widths == ACTIVATIONS
    assert np.array_equal(part.sensitivity, whole.sensitivity[part.rows][:, 1:])
    assert np.array_equal(part.cost(whole.costs["activation_bits"]), part.size)
    only = network_space(READS, WEIGHTS)
    assert (
        Tables(only, whole.sensitivity[:3], {}, whole.traces, whole.traces).part("activations")
        is None
    )


@pytest.mark.parametrize(
    ("budget", "options", "message"),
    [
        ([], {}, "--budget: give KEY=VALUE with weight_mib, compression"),
        (["weight_mib"], {}, "--budget: must be KEY=VALUE, such as weight_mib=0.08, got 'weight"),
        (["average_bits=3", "average_bits=4"], {}, "--budget: average_bits must be given once"),
        (["average_bit=3"], {}, "--budget: average_bit: unknown key, did you mean 'average_bits'"),
        (["average_bits=x"], {}, "--budget: average_bits: input should be a valid number"),
        (["average_bits=-1"], {}, "--budget: average_bits: input should be greater than 0"),
        (["average_bits=.nan"], {}, "--budget: average_bits: "),
        (["average_bits=3", "compression=8"], {}, "--budget: give one of weight_mib, compression"),
        (["average_bits=0.5"], {}, "budget 0.5 bits: must allow 1 bits at least for weights"),
        (
            ["average_bits=3", "gbops=0.000001"],
            {},
            "bit operations at 1e-06 GBOPs cannot be, even alone: at least",
        ),
        (["latency_ms=1"], {}, "latency_ns cannot be limited here, for there is no latency table"),
        (["gbops=1"], {"method": "channel"}, "bops cannot be limited here, for it does not add up"),
        (["average_bits=3"], {"method": "best"}, "--method: 'best' is not known; known are"),
        (
            ["average_bits=3"],
            {"method": "exact", "granularity": "channel"},
            "--method: must be channel for --granularity channel, got exact",
        ),
        (["average_bits=3"], {"pins": ["conv1=3"]}, "conv1=3: bits must be among (1, 2, 4, 8)"),
        (["average_bits=3"], {"pins": ["conv1"]}, "a pin must be GLOB=BITS, got 'conv1'"),
        (["average_bits=3"], {"pins": ["stem=8"]}, "'stem' must match a layer of the weights"),
        (["average_bits=3"], {"ties": ["conv1"]}, "must join two layers or more, got conv1"),
        (["average_bits=3"], {"ties": ["conv1,a:conv1"]}, "a tie must be of weights or of"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(run, budget, options, message):
    with pytest.raises(InputError) as caught:
        allocate(run(), budget, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_run_and_a_run_without_tables_are_refused(tmp_path, run):
    with pytest.raises(InputError, match=r"must be the folder of a run, got no config\.yaml"):
        allocate(tmp_path, ["average_bits=3"])
    (run() / "tables.json").unlink()
    with pytest.raises(InputError, match="has no tables yet"):
        allocate(tmp_path, ["average_bits=3"])


def test_a_run_without_channels_says_how_to_have_them(run):
    with pytest.raises(InputError, match="holds no traces of channels: run the search with chan"):
        allocate(run(tables(channels=False)), ["average_bits=3"], granularity="channel")


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda tables: tables["sensitivity"][1].__setitem__(0, float("nan")), "sensitivity.1.0"),
        (lambda tables: tables["sensitivity"][1].__setitem__(0, -1.0), "sensitivity.1.0"),
        (lambda tables: tables["operations"][0].update(macs=-5), "operations.0.macs"),
    ],
)
def test_tables_that_make_no_sense_are_refused_by_their_place(run, change, where):
    path = run() / "tables.json"
    document = json.loads(path.read_text())
    change(document["result"])
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=rf"tables\.json .* another form of {re.escape(where)} "):
        allocate(path.parent, ["average_bits=3"])


@pytest.mark.parametrize("method", ["exact", "monotone", "uniform"])
def test_a_table_where_no_width_is_faster_is_kept_or_refused(run, method):
    # As measured on a processor, which computes with eight bits whatever it is given.
    whole = tables(latency=True)
    flat = [entry.model_copy(update={"ns": 1000}) for entry in whole.latency_ns]
    folder = run(whole.model_copy(update={"latency_ns": flat}))
    found, _ = allocate(folder, ["average_bits=3", "latency_ms=0.003"], method=method)
    assert found.costs["latency_ns"] == 3000
    with pytest.raises(InputError, match=r"latency at 0\.0029 ms cannot be, even alone"):
        allocate(folder, ["average_bits=3", "latency_ms=0.0029"], method=method)


@pytest.mark.parametrize(("method", "what"), [("monotone", "fronts"), ("uniform", "bits")])
def test_a_method_hands_out_nothing_that_is_not_its_own(run, method, what):
    # Only 2 bits for the layer of the largest average trace and 8 for the others are in time.
    whole = tables(latency=True)
    part = Tables.of(whole).part("weights")
    average = part.traces / [group.num_elements for group in part.space.groups]
    keep = {group.owner: 8 for group in part.space.groups}
    keep[part.space.groups[int(average.argmax())].owner] = 2
    prices = [
        entry.model_copy(update={"ns": 1000 if entry.weight_bits == keep[entry.layer] else 5000})
        for entry in whole.latency_ns
    ]
    folder = run(whole.model_copy(update={"latency_ns": prices}))
    budget = ["average_bits=8", "latency_ms=0.003"]
    found, _ = allocate(folder, budget)
    assert {layer: found.bits[f"w:{layer}"] for layer in keep} == keep
    with pytest.raises(InputError, match=f"{what}.* are within the budgets, others are"):
        allocate(folder, budget, method=method)


def test_a_latency_table_that_lacks_a_layer_is_refused(run):
    whole = tables(latency=True)
    lacking = [entry for entry in whole.latency_ns if entry.layer != "conv2"]
    with pytest.raises(InputError, match="latency: the latency table must hold layer conv2"):
        allocate(run(whole.model_copy(update={"latency_ns": lacking})), ["average_bits=3"])


def test_the_command_prints_the_allocation_and_writes_it(run, monkeypatch, capsys, tmp_path):
    out = tmp_path / "found.json"
    command = ["hawq", "allocate", run(), "--budget", "average_bits=3", "--out", out]
    monkeypatch.setattr(sys, "argv", [str(part) for part in command])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in {0, None}
    printed = capsys.readouterr().out
    assert "proved optimal" in printed
    assert "a:linear#0" in printed
    assert json.loads(out.read_text())["average_bits"] <= 3
