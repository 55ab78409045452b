"""Latency tables: measured, modelled and hand-written ones, down to the cost of an allocation."""

import io
import json
import math
import sys
from itertools import product

import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import NETWORKS, ResidualNet
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hawq.allocation import Allocation
from hawq.cost import Operation, latency
from hawq.quantizers import quantize
from hawq.ranges import best_scales
from hawq.space import Group, Space
from search.commands.profile import latency_view, profile
from search.errors import InputError
from search.latency import (
    LatencyEntry,
    LatencyTable,
    LayerCall,
    layer_shapes,
    measure,
    read_latency,
    roofline,
)
from search.latency.graphs import Codes, float_graph, integer_graph
from search.latency.stopwatch import Timing, timed_in_turns

ENTRY = {"weight_bits": 8, "activation_bits": 8, "ns": 5}
OWN = {"schema_version": 1, "layers": {"conv1": [ENTRY]}}
CONV = LayerCall((16, 4, 3, 3), (2, 8, 5, 5), (2, 16, 5, 5), (1, 1), (1,) * 4, (1, 1), 2)
MENUS = {"weight_bits": [2, 4, 8], "activation_bits": [4, 8]}
RATES = {"peak_tops": {4: 4.0, 8: 2.0}, "bandwidth_gbps": 100.0, "batch_size": 2}


class Mixed(nn.Module):
    """A depthwise, a grouped and a 1-d convolution, a linear layer called twice, one never."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, groups=2, bias=False)
        self.sequence = nn.Conv1d(8, 6, 3, padding="same")
        self.twice = nn.Linear(9, 9)
        self.never = nn.Linear(2, 2)

    def forward(self, x):
        h = self.grouped(self.depthwise(x)).flatten(2)
        return self.twice(self.twice(input=self.sequence(h)))


IMAGES = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def mixed():
    """The calls of that network, and what they were measured at."""
    calls = layer_shapes(Mixed(), IMAGES)
    return calls, measure(calls, **MENUS, batch_size=2, seconds=0.01)


@pytest.fixture
def table_file(tmp_path):
    def write(content):
        path = tmp_path / "times.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return write


# --- the table ---


def test_a_hand_written_table_needs_its_version_and_layers_only(table_file):
    table = read_latency(table_file(OWN))
    assert table.kind == "given"
    assert table.by_bits() == {"conv1": {(8, 8): 5}}


def test_entries_without_activation_bits_hold_at_any(table_file):
    entries = [{"weight_bits": 4, "ns": 3}, {"weight_bits": 8, "activation_bits": None, "ns": 5}]
    table = read_latency(table_file({"schema_version": 1, "layers": {"fc": entries}}))
    assert table.by_bits() == {"fc": {4: 3, 8: 5}}


def test_a_layer_that_reads_several_tensors_is_priced_at_the_slowest_activation():
    entries = [
        LatencyEntry(weight_bits=w, activation_bits=a, ns=10 * w + a)
        for w, a in [(4, 8), (4, 4), (8, 4), (8, 8)]
    ]
    table = LatencyTable(schema_version=1, layers={"head": entries, "conv": entries})
    assert table.by_bits(["head"]) == {
        "head": {4: 48, 8: 88},
        "conv": {(4, 4): 44, (4, 8): 48, (8, 4): 84, (8, 8): 88},
    }


def entry(**changes):
    return {"schema_version": 1, "layers": {"conv1": [{**ENTRY, **changes}]}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the latency table must be JSON, got Expecting property name"),
        ("[1]", "must be an object with schema_version and layers, got list"),
        ({"layers": OWN["layers"]}, "schema_version: must be 1, got nothing"),
        ({**OWN, "schema_version": 2}, "schema_version: must be 1, got 2"),
        ({**OWN, "kind": "guessed"}, "kind: must be measured, roofline or given, got"),
        ({"schema_version": 1}, "layers: must be an object of layer names"),
        ({**OWN, "layers": {}}, "layers: must hold at least one layer, got none"),
        ({**OWN, "layers": {"fc": []}}, "layers.fc: must hold at least one entry, got none"),
        ({**OWN, "layers": {"fc": 3}}, "layers.fc: input should be a valid list, got 3"),
        ({**OWN, "layer": {}}, "layer: unknown key, did you mean 'layers'?"),
        (entry(bits=8), "layers.conv1.0.bits: unknown key, did you mean 'weight_bits'?"),
        (entry(ns=-1), "layers.conv1.0.ns: must be whole nanoseconds from 0 to 10^15, got -1"),
        (entry(ns=1.5), "layers.conv1.0.ns: must be whole nanoseconds from 0 to 10^15, got 1.5"),
        (entry(ns=2.0), "layers.conv1.0.ns: must be whole nanoseconds from 0 to 10^15, got 2.0"),
        (entry(ns=math.nan), "layers.conv1.0.ns: must be whole nanoseconds from 0 to 10^15, got N"),
        (entry(ns=math.inf), "layers.conv1.0.ns: must be whole nanoseconds from 0 to 10^15, got I"),
        (entry(ns=True), "layers.conv1.0.ns: must be whole nanoseconds from 0 to 10^15, got true"),
        (entry(ns=10**19), "layers.conv1.0.ns: must be whole nanoseconds from 0 to 10^15, got 10"),
        (entry(weight_bits=9), "layers.conv1.0.weight_bits: must be whole bits within 1..8, got 9"),
        (
            entry(activation_bits=0),
            "layers.conv1.0.activation_bits: must be whole bits within 1..8, or null for any width",
        ),
        (
            {**OWN, "layers": {"conv1": [{"weight_bits": 8}]}},
            "layers.conv1.0.ns: must be whole nanoseconds from 0 to 10^15, got nothing",
        ),
        (
            {**OWN, "layers": {"conv1": [ENTRY, {**ENTRY, "ns": 6}]}},
            "layers.conv1: must hold one entry for each precision, got several for weight_bits 8 "
            "with activation_bits 8",
        ),
        (
            {**OWN, "layers": {"fc": [{"weight_bits": 4, "ns": 1}] * 2}},
            "layers.fc: must hold one entry for each precision, got several for weight_bits 4",
        ),
        (
            {**OWN, "layers": {"fc": [{"weight_bits": 4, "ns": 1}, ENTRY]}},
            "layers.fc: activation_bits must be given in all entries or in none, got both",
        ),
        (
            '{"schema_version": 1, "layers": {"a": [], "a": []}}',
            "a: must be given once, got it 2 times",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_file_key_and_remedy(table_file, content, message):
    path = table_file(content)
    with pytest.raises(InputError) as caught:
        read_latency(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"no\.json: the latency table must be readable \(No such"):
        read_latency(tmp_path / "no.json")


def test_of_many_mistakes_the_first_are_told(table_file):
    path = table_file({**OWN, "layers": {"conv1": [{**ENTRY, "ns": -1}] * 40}})
    with pytest.raises(InputError) as caught:
        read_latency(path)
    assert len(str(caught.value).splitlines()) == 6
    assert str(caught.value).endswith("and 35 more such mistakes")


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1)
PAIRS = st.tuples(st.integers(1, 8), st.integers(1, 8))


@given(
    st.dictionaries(
        NAMES, st.dictionaries(PAIRS, st.integers(0, 10**15), min_size=1), min_size=1, max_size=3
    )
)
def test_what_is_written_reads_back_as_itself(tmp_path_factory, times):
    table = LatencyTable(
        schema_version=1,
        layers={
            layer: [
                LatencyEntry(weight_bits=w, activation_bits=a, ns=ns)
                for (w, a), ns in widths.items()
            ]
            for layer, widths in times.items()
        },
    )
    path = tmp_path_factory.mktemp("table") / "times.json"
    path.write_text(table.model_dump_json(), encoding="utf-8")
    assert read_latency(path) == table
    assert read_latency(path).by_bits() == times


# --- the calls ---


def test_every_call_of_every_layer_is_recorded_with_its_shapes():
    calls = layer_shapes(Mixed(), IMAGES)
    assert calls["depthwise"] == (
        LayerCall((4, 1, 3, 3), (2, 4, 7, 7), (2, 4, 7, 7), (1, 1), (1,) * 4, (1, 1), 4),
    )
    assert calls["grouped"] == (
        LayerCall((8, 2, 3, 3), (2, 4, 7, 7), (2, 8, 3, 3), (2, 2), (0,) * 4, (1, 1), 2),
    )
    assert calls["sequence"] == (LayerCall((6, 8, 3), (2, 8, 9), (2, 6, 9), (1,), (1, 1), (1,), 1),)
    assert calls["twice"] == (LayerCall((9, 9), (12, 9), (12, 9)),) * 2
    assert calls["never"] == ()


def test_layers_that_share_a_weight_are_recorded_together():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert {name: len(seen) for name, seen in layer_shapes(model, torch.ones(1, 3)).items()} == {
        "0": 2
    }


def test_recording_leaves_the_network_as_it_was():
    model = ResidualNet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layer_shapes(model, torch.randn(2, 2, 5, 5))
    assert model.bn1.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_one_example_without_a_batch_is_a_batch_of_one():
    (calls,) = layer_shapes(nn.Sequential(nn.Conv1d(2, 3, 3)), torch.randn(2, 9)).values()
    assert (calls[0].input, calls[0].output) == ((1, 2, 9), (1, 3, 7))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("options", "pads", "grown"),
    [
        ({"padding": "same", "dilation": (2, 3)}, (2, 4, 2, 5), (0, 0)),
        ({"padding": "valid"}, (0, 0, 0, 0), (0, 0)),
        ({"padding": (2, 0), "stride": 2}, (2, 0, 2, 0), (0, 0)),
        ({"padding": "same", "padding_mode": "reflect"}, (0, 0, 0, 0), (2, 3)),
    ],
)
def test_zeros_around_the_input_are_counted_on_each_side(options, pads, grown):
    layer = nn.Conv2d(1, 1, (3, 4), **options)
    ((call,),) = layer_shapes(nn.Sequential(layer), torch.ones(1, 1, 9, 9)).values()
    assert call.pads == pads
    assert call.input[2:] == (9 + grown[0], 9 + grown[1])


@st.composite
def layers(draw):
    """A layer of any kind, with a batch of what it reads."""
    rank = draw(st.integers(0, 3))
    batch, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    bias = draw(st.booleans())
    if not rank:
        rows = draw(st.lists(st.integers(1, 4), max_size=2))
        x = torch.randn(batch, *rows, 5, generator=generator)
        return nn.Linear(5, draw(st.integers(1, 6)), bias=bias), x
    sizes = draw(st.lists(st.integers(5, 8), min_size=rank, max_size=rank))
    kernel = draw(st.lists(st.sampled_from([1, 3]), min_size=rank, max_size=rank))
    stride = draw(st.integers(1, 2))
    if draw(st.integers(0, 3)) == 0:
        transposed = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][rank - 1](
            4,
            4 * draw(st.integers(1, 2)),
            tuple(kernel),
            stride=stride,
            padding=draw(st.integers(0, 1)),
            output_padding=draw(st.integers(0, stride - 1)),
            groups=groups,
            bias=bias,
        )
        return transposed, torch.randn(batch, 4, *sizes, generator=generator)
    mode = draw(st.sampled_from(["zeros", "circular"]))
    choices = [0, 1, "valid", "same"] if stride == 1 else [0, 1, "valid"]
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][rank - 1](
        4,
        4 * draw(st.integers(1, 2)),
        tuple(kernel),
        stride=stride,
        padding=draw(st.sampled_from(choices)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=bias,
        padding_mode=mode,
    )
    return layer, torch.randn(batch, 4, *sizes, generator=generator)


@settings(max_examples=60)
@given(layers())
def test_multiply_accumulates_are_half_the_operations_that_torch_counts(case):
    layer, x = case
    ((call,),) = layer_shapes(nn.Sequential(layer), x).values()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    assert 2 * call.macs == counter.get_total_flops()


# --- the graphs ---


def execute(graph, x):
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (y,) = session.run(None, {"x": np.ascontiguousarray(x)})
    return y


def padded(layer, x):
    """What a convolution's window moves over, where that is not zeros around ``x``."""
    if isinstance(layer, nn.Linear) or layer.padding_mode == "zeros":
        return x
    return nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)


@settings(max_examples=60)
@given(layers())
def test_the_graphs_compute_what_the_layer_does(case):
    layer, x = case
    ((call,),) = layer_shapes(nn.Sequential(layer), x).values()
    weight = layer.weight.detach()
    bias = torch.zeros(call.output[1]) if layer.bias is None else layer.bias.detach()
    read = padded(layer, x).reshape(call.input)

    y = layer(x).detach().reshape(call.output)
    float_y = execute(float_graph(call, weight.numpy(), bias.numpy()), read.numpy())
    np.testing.assert_allclose(float_y, y, atol=1e-5)

    if call.is_transposed:
        return  # no integer kernel

    # Seven bits, because processors without VNNI add pairs of eight-bit products in 16 bits.
    weight_scale = best_scales(weight.flatten(1), 7).view(-1, *[1] * (weight.ndim - 1))
    input_scale = best_scales(x.reshape(1, -1), 8).item()
    bias_scale = weight_scale.flatten() * input_scale
    with torch.no_grad():
        layer.weight.copy_(quantize(weight, weight_scale, 7))
        if layer.bias is not None:
            layer.bias.copy_((bias / bias_scale).round() * bias_scale)
        wanted = layer(quantize(x, torch.tensor(input_scale), 8)).reshape(call.output)
    output_scale = wanted.abs().max().item() / 127 + 1e-6
    codes = Codes(
        weight=(layer.weight.detach() / weight_scale).round().to(torch.int8).numpy(),
        weight_scale=weight_scale.flatten().numpy(),
        bias=(bias / bias_scale).round().to(torch.int32).numpy(),
        input_scale=input_scale,
        input_zero=128,
        output_scale=output_scale,
        output_zero=128,
    )
    read = quantize(read, torch.tensor(input_scale), 8).div(input_scale).round() + 128
    if not call.is_linear:
        read, wanted = read.movedim(1, -1), wanted.movedim(1, -1)
    found = execute(integer_graph(call, codes), read.to(torch.uint8).numpy())
    steps = (found.astype(np.float64) - 128) - wanted.double().numpy() / output_scale
    assert np.abs(steps).max() < 0.51  # rounding, and float32's own


# --- the roofline ---


@pytest.mark.parametrize(
    ("widths", "num_bytes", "tops"),
    [((2, 4), 144 + 600, 4.0), ((4, 4), 288 + 600, 4.0), ((2, 8), 144 + 1200, 2.0)],
)
def test_a_call_takes_its_arithmetic_or_its_traffic(widths, num_bytes, tops):
    # 576 weights; 400 inputs and 800 outputs; 50 positions of 576 products each.
    macs = 28_800
    assert CONV.macs == macs
    for bandwidth in (1.0, 7.5, 1e6):
        rates = {**RATES, "bandwidth_gbps": bandwidth}
        found = roofline({"conv": [CONV]}, **MENUS, **rates).by_bits()["conv"][widths]
        assert found == max(round(2 * macs / (1e3 * tops)), round(num_bytes / bandwidth))
    assert found == round(2 * macs / (1e3 * tops))


def test_a_pair_runs_at_the_least_peak_that_holds_both():
    menus = {"weight_bits": range(1, 9), "activation_bits": range(1, 9)}
    rates = {"peak_tops": {2: 16.0, 4: 4.0, 8: 1.0}, "bandwidth_gbps": 1e9, "batch_size": 1}
    found = roofline({"conv": [CONV]}, **menus, **rates).by_bits()["conv"]
    for w, a in product(range(1, 9), repeat=2):
        tops = 16 if max(w, a) <= 2 else 4 if max(w, a) <= 4 else 1
        assert found[w, a] == round(2 * CONV.macs / tops / 1e3)


def test_calls_add_up_and_a_batch_is_priced_whole():
    one = roofline({"a": [CONV]}, **MENUS, **RATES)
    three = roofline({"a": [CONV] * 3}, **MENUS, **{**RATES, "bandwidth_gbps": 1e6})
    alone = roofline({"a": [CONV]}, **MENUS, **{**RATES, "bandwidth_gbps": 1e6})
    assert one.macs == {"a": 14_400}
    assert three.macs == {"a": 43_200}
    for pair, ns in alone.by_bits()["a"].items():
        assert three.by_bits()["a"][pair] == pytest.approx(3 * ns, abs=2)


def test_floating_activations_take_32_bits_and_the_peak_of_floats():
    rates = {"peak_tops": {8: 2.0, 32: 0.5}, "bandwidth_gbps": 1.0, "batch_size": 2}
    table = roofline({"conv": [CONV]}, weight_bits=[4, 8], activation_bits=[], **rates)
    assert table.by_bits() == {"conv": {4: 288 + 4800, 8: 576 + 4800}}
    assert table.fp32_ns == {"conv": 2304 + 4800}
    rates["bandwidth_gbps"] = 1e6
    table = roofline({"conv": [CONV]}, weight_bits=[4], activation_bits=[], **rates)
    assert table.by_bits()["conv"] == {4: round(2 * CONV.macs / 500)}
    assert not roofline({"conv": [CONV]}, **MENUS, **RATES).fp32_ns


@given(
    st.dictionaries(st.sampled_from([1, 2, 4, 6]), st.floats(0.1, 10)),
    st.floats(0.1, 10),
    st.floats(1, 1000),
)
def test_where_narrow_peaks_are_higher_fewer_bits_are_never_slower(narrow, slowest, bandwidth):
    peaks = {8: slowest}
    for bits in sorted(narrow, reverse=True):
        peaks[bits] = max(narrow[bits], *peaks.values())
    table = roofline(
        {"conv": [CONV]},
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        peak_tops=peaks,
        bandwidth_gbps=bandwidth,
        batch_size=2,
    )
    found = table.by_bits()["conv"]
    for w, a in product(range(1, 8), repeat=2):
        assert found[w, a] <= found[w + 1, a]
        assert found[w, a] <= found[w, a + 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peak_tops": {4: 1.0}}, "--peak: must hold a rate for 8 bits or more, .* got 4"),
        ({"peak_tops": {}}, "--peak: must hold a rate for 8 bits or more, .* got none"),
        ({"peak_tops": {8: 0.0}}, "--peak: must be positive Tops .* got 8=0"),
        ({"peak_tops": {8: 1.0, 4: -2.0}}, "--peak: must be positive Tops .* got 4=-2"),
        ({"peak_tops": {8: math.nan}}, "--peak: must be positive Tops .* got 8=nan"),
        ({"peak_tops": {8: 1.0, 0: 1.0}}, "--peak: .* of a width within 1..64 bits, got 0=1"),
        ({"bandwidth_gbps": 0.0}, "--bandwidth: must be positive GB/s, got 0"),
        ({"bandwidth_gbps": math.inf}, "--bandwidth: must be positive GB/s, got inf"),
        ({"activation_bits": []}, "32 bits or more, for activations stay floating, got 4, 8"),
    ],
)
def test_a_roofline_needs_positive_rates_for_all_widths(changes, message):
    with pytest.raises(InputError, match=message):
        roofline({"conv": [CONV]}, **{**MENUS, **RATES, **changes})


# --- the measurement ---


def test_every_pair_of_the_menus_is_measured_and_says_at_what(mixed):
    calls, table = mixed
    assert list(table.layers) == ["depthwise", "grouped", "sequence", "twice"]
    for entries in table.layers.values():
        widths = [(e.weight_bits, e.activation_bits) for e in entries]
        assert widths == list(product([2, 4, 8], [4, 8]))
        # No kernel has fewer than eight bits, and the table does not pretend that one had.
        assert len({e.ns for e in entries}) == 1
        assert entries[0].ns > 0
        assert entries[0].standard_error_ns is not None
    assert table.fp32_ns.keys() == table.fp32_standard_error_ns.keys() == table.layers.keys()
    assert min(table.fp32_ns.values()) > 0
    assert "fewer bits are not faster here" in table.notes[0]
    assert table.notes[-1] == "Never called as modules, hence not in the table: never."
    assert table.macs == {layer: sum(c.macs for c in calls[layer]) // 2 for layer in table.layers}
    assert (table.kind, table.batch_size, table.threads) == ("measured", 2, 1)
    assert table.versions["onnxruntime"] == onnxruntime.__version__


def test_all_but_the_times_is_the_same_again(mixed):
    calls, table = mixed

    def without_times(found):
        document = found.model_dump()
        for key in ("finished", "fp32_ns", "fp32_standard_error_ns"):
            document.pop(key)
        for entries in document["layers"].values():
            for one in entries:
                one["ns"] = one["standard_error_ns"] = None
        return document

    again = measure(calls, **MENUS, batch_size=2, seconds=0.01)
    assert without_times(again) == without_times(table)


def test_calls_of_one_shape_are_measured_once_and_add_up():
    call = LayerCall((9, 9), (12, 9), (12, 9))
    told = []
    table = measure(
        {"once": [call], "thrice": [call] * 3},
        weight_bits=[8],
        activation_bits=[8],
        batch_size=1,
        seconds=0.01,
        progress=lambda *how: told.append(how),
    )
    assert table.layers["thrice"][0].ns == 3 * table.layers["once"][0].ns
    assert table.fp32_ns["thrice"] == 3 * table.fp32_ns["once"]
    assert told == [(0, 1, "shapes", ""), (1, 1, "shapes", "")]


def test_floating_activations_run_in_fp32_whatever_the_weights_bits(mixed):
    calls, _ = mixed
    table = measure(calls, weight_bits=[2, 8], activation_bits=[], batch_size=2, seconds=0.01)
    assert table.by_bits() == {layer: {2: ns, 8: ns} for layer, ns in table.fp32_ns.items()}
    assert "run in fp32" in table.notes[0]


class Work:
    """Pieces of work on a clock of their own; every fifth call meets with a long interruption."""

    def __init__(self):
        self.now, self.order = 0, []

    def piece(self, name, ns):
        def run():
            self.order.append(name)
            self.now += ns + 100_000 * (len(self.order) % 5 == 0)

        return run


def test_work_is_timed_in_turns_against_an_empty_call():
    work = Work()
    runs = [work.piece("short", 350), work.piece("long", 1100)]
    short, long = timed_in_turns(runs, work.piece("empty", 100), 0, clock=lambda: work.now)
    warm_up, rounds = work.order[:15], work.order[15:]
    turn = ["empty", "short", "long"]
    assert warm_up == turn * 5
    assert rounds == [*(turn[::-1] + turn) * 4, *turn[::-1]]
    assert (short, long) == (Timing(250, 0), Timing(1000, 0))  # whatever else the machine did


def test_rounds_fill_the_time_that_is_given():
    work = Work()
    timed_in_turns([work.piece("a", 900)], work.piece("empty", 100), 1e-3, clock=lambda: work.now)
    rounds = len(work.order) // 2 - 5
    assert rounds == pytest.approx(1e6 / (1000 + 2 * 100_000 / 5), abs=3)


def test_the_error_of_a_median_is_that_of_normal_repeats():
    draws = np.random.default_rng(0).normal(10_000, 500, 2000)
    work, durations = Work(), iter([1.0] * 5 + draws.tolist())

    def noisy():
        work.now += round(next(durations))

    (found,) = timed_in_turns([noisy], lambda: None, 1.0, clock=lambda: work.now)
    assert found.error_ns == pytest.approx(1.2533 * 500 / 2000**0.5, rel=0.1)
    assert abs(found.ns - 10_000) < 4 * found.error_ns


def test_a_call_that_takes_nothing_counts_one_nanosecond():
    work = Work()
    (found,) = timed_in_turns([lambda: None], work.piece("empty", 9), 0, clock=lambda: work.now)
    assert found.ns == 1


# --- from a table to the cost of an allocation ---

SPACE = Space(
    (
        Group("w:grouped", 144, 1, (2, 4, 8)),
        Group("w:twice", 81, 1, (2, 8)),
        Group("w:sequence", 144, 1, (2, 4, 8)),
        Group("a:grouped#0", 196, 0, (4, 8)),
        Group("a:twice#0", 9, 0, (4, 8)),
        Group("a:twice#1", 9, 0, (4, 8)),
    )
)
READS = [
    Operation("w:grouped", "a:grouped#0", 1),
    Operation("w:twice", "a:twice#0", 1),
    Operation("w:twice", "a:twice#1", 1),
    Operation("w:sequence", 8, 1),
]


def test_the_cost_of_an_allocation_is_the_sum_of_its_layers():
    table = roofline(layer_shapes(Mixed(), IMAGES), **MENUS, **{**RATES, "bandwidth_gbps": 0.5})
    cost = latency(SPACE, READS, table.by_bits(read_several=["twice"]))
    allocation = Allocation.of(SPACE, [4, 2, 2, 4, 4, 8])
    ns = {
        (layer, e.weight_bits, e.activation_bits): e.ns
        for layer, entries in table.layers.items()
        for e in entries
    }
    by_hand = ns["grouped", 4, 4] + ns["twice", 2, 8] + ns["sequence", 2, 8]
    assert cost.of(SPACE, allocation) == by_hand
    assert len({entry.ns for entry in table.layers["grouped"]}) > 1


def test_a_measured_table_costs_any_allocation_the_same(mixed):
    _, table = mixed
    cost = latency(SPACE, READS, table.by_bits(read_several=["twice"]))
    layers = ("grouped", "twice", "sequence")
    expected = sum(table.layers[layer][-1].ns for layer in layers)
    for bits in ([2, 2, 2, 4, 4, 4], [8, 8, 8, 8, 8, 8]):
        assert cost.of(SPACE, Allocation.of(SPACE, bits)) == expected


def test_a_layer_that_the_table_lacks_is_named_when_the_cost_is_made(table_file):
    table = read_latency(table_file(OWN))
    with pytest.raises(ValueError, match="the latency table must hold layer grouped at"):
        latency(SPACE, READS, table.by_bits())


# --- the command ---

CONFIG = {
    "task": {"data": "digits", "network": "resnet8", "search_size": 100, "pretrain": {"epochs": 1}},
    "weights": {"bits": [2, 4, 8], "pin": {"conv1": 6}},
    "budgets": [{"average_bits": 3}],
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return path


def shown(table):
    console = Console(width=120, file=io.StringIO())
    console.print(latency_view(table))
    return console.file.getvalue()


def test_the_command_prices_the_config_s_network_at_all_of_its_widths(config_file, tmp_path):
    out, events = tmp_path / "deep" / "times.json", []
    table = profile(config_file, [], out, seconds=0.001, listeners=[events.append])
    assert read_latency(out) == table
    assert len(table.layers) == 8
    assert list(table.by_bits()["conv1"]) == list(product([2, 4, 6, 8], range(2, 9)))
    assert events[-1].done == events[-1].total > 0
    text = shown(table)
    assert all(layer in text for layer in table.layers)
    assert text.splitlines()[2].split() == ["layer", "MACs", "fp32", "8/8", "speed-up"]
    assert "fewer bits are not faster here" in " ".join(text.split())


def test_a_roofline_needs_no_runtime(config_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    options = {"peaks": ["8=2.4", "4=4.8", "32=0.3"], "bandwidth": 1e6, "batch_size": 3}
    table = profile(config_file, ["activations.bits=2"], tmp_path / "times.json", **options)
    assert table.kind == "roofline"
    macs = 16 * 9 * 8 * 8  # 16 filters of 3 × 3 on images of 8 × 8
    assert table.macs["conv1"] == macs
    assert table.fp32_ns["conv1"] == round(3 * 2 * macs / 300)
    found = table.by_bits()["conv1"]
    assert (found[2, 2], found[6, 2]) == (round(3 * 2 * macs / 4800), round(3 * 2 * macs / 2400))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peaks": ["8"], "bandwidth": 1.0}, "--peak: must be BITS=TOPS, such as 8=2.4, got '8'"),
        ({"peaks": ["8=x"], "bandwidth": 1.0}, "--peak: must be BITS=TOPS"),
        ({"peaks": ["8=1", "8=2"], "bandwidth": 1.0}, "--peak: must be given once .* got 8 twice"),
        ({"peaks": ["8=1"]}, "a roofline needs both, got only one"),
        ({"bandwidth": 1.0}, "a roofline needs both, got only one"),
        ({"batch_size": 0}, "--batch: must be positive, got 0"),
        ({"batch_size": 10**6}, "--batch: must be at most the 1338 training examples, got 1000000"),
        ({"threads": 0}, "--threads: must be positive, got 0"),
        ({"seconds": math.nan}, "--seconds: must be positive, got nan"),
    ],
)
def test_a_wrong_option_is_named(config_file, tmp_path, options, message):
    out = tmp_path / "times.json"
    with pytest.raises(InputError, match=message):
        profile(config_file, [], out, **options)
    assert not out.exists()


def test_without_the_runtime_the_remedy_is_told(config_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    message = r"hawq profile needs onnxruntime: pip install 'hawq-search\[export\]'"
    with pytest.raises(InputError, match=message):
        profile(config_file, [], tmp_path / "times.json")
    with pytest.raises(InputError, match=message):
        measure({"conv": [CONV]}, **MENUS, batch_size=2)


def test_columns_that_are_equal_are_shown_once():
    entries = [
        LatencyEntry(weight_bits=w, activation_bits=a, ns=1000 * max(w, a) if w > 2 else 8000)
        for w, a in product([2, 4, 8], [4, 8])
    ]
    table = LatencyTable(schema_version=1, layers={"a": entries, "b": entries})
    lines = [line.split() for line in shown(table).splitlines() if line.strip()]
    assert lines[1] == ["layer", "MACs", "fp32", "4/4", "8/8", "speed-up"]
    assert lines[3] == ["a", "4.000", "8.000", "2.00×"]
    assert lines[-1] == ["all", "8.000", "16.0", "2.00×"]


def test_a_network_without_called_layers_is_refused(config_file, tmp_path, monkeypatch):
    monkeypatch.setitem(NETWORKS, "plain", nn.Flatten)
    task = {"factory": "oracles:TinyTask", "arguments": {"network": "plain"}}
    config_file.write_text(yaml.safe_dump({**CONFIG, "task": task}))
    with pytest.raises(InputError, match="must call a convolution or a linear layer, got none"):
        profile(config_file, [], tmp_path / "times.json")
