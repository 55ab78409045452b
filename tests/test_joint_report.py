"""The report of a search over activations too, and over channels: what it shows besides."""

import re
import shutil
import subprocess
from typing import Any

import pytest
from rich.console import Console
from test_report import Page, changed, figures_of, make_summary

from search.artefacts import Summary
from search.report import render
from search.report.bits_map import bits_map
from search.report.caveats import caveats
from search.report.cost_columns import cost_columns
from search.report.figures import fronts
from search.report.findings import searched, verdicts
from search.report.width_figure import channel_widths
from search.terminal import result_table

LAYERS = ["conv1", "layer1.conv", "fc"]
# Elements of each tensor, which the layer of its place reads first.
TENSORS = {"conv1#0": 100, "layer1.conv#0": 300, "fc#0": 600}
CHANNELS = {"w:conv1": [8, 8, 3, 3], "w:layer1.conv": [2, 2, 2, 2], "w:fc": [0, 4]}
TENSOR_CHANNELS = {"a:conv1#0": [8, 8], "a:layer1.conv#0": [3, 4], "a:fc#0": [5, 5]}


def make_joint(name: str = "joint", tensors: dict[str, int] | None = None) -> Summary:
    """Make up a run over activations of 4 bits on average, with a method for channels."""
    tensors = TENSORS if tensors is None else tensors
    summary = make_summary(LAYERS, ("uniform", "exact", "channel"), budgets=(3, 4), name=name)
    elements = sum(tensors.values())
    document = summary.model_dump(mode="json")
    curvature = document["curvature"]
    curvature["activations"] = {
        **{key: value for key, value in curvature.items() if key not in {"activations", "blocks"}},
        "layers": list(tensors),
        "num_elements": list(tensors.values()),
    }
    document["tables"]["space"] += [
        {"name": f"a:{tensor}", "num_elements": n, "macs": n, "menu": [2, 5, 8][i:], "tie": None}
        for i, (tensor, n) in enumerate(tensors.items())
    ]
    for budget in document["candidates"]["budgets"]:
        budget["limits"]["activation_bits"] = 4 * elements
    document["candidates"]["fronts"] += [
        {
            "method": method,
            "of": kind,
            "bits": [2 * size, 4 * size, 8 * size],
            "sensitivity": [1.0, 0.1, 0.01],
            "is_hull": method == "channel",
        }
        for method, kind, size in (
            ("exact", "activations", elements),
            ("channel", "activations", elements),
            ("channel", "weights", summary.model.num_quantizable),
        )
    ]
    document["candidates"]["fronts"] = [
        front
        for front in document["candidates"]["fronts"]
        if (front["method"], front["is_hull"]) != ("channel", False)
    ]
    for candidate in document["candidates"]["candidates"]:
        candidate |= {
            "activation_average_bits": 3.9,
            "activation_compression": 32 / 3.9,
            "activation_sensitivity": 0.25 * candidate["sensitivity"],
        }
        candidate["costs"] |= {"activation_bits": round(3.9 * elements)}
        if candidate["method"] == "channel":
            candidate["granularity"] = "channel"
            candidate["bits"] = {
                f"{owner}[{c}]": bits
                for owner, channels in (CHANNELS | TENSOR_CHANNELS).items()
                for c, bits in enumerate(channels)
            }
            candidate["bound"] = 0.9 * candidate["sensitivity"]
        else:
            candidate["bits"] |= {f"a:{tensor}": 5 for tensor in tensors}
            candidate["costs"]["bops"] = 123_000_000
    return Summary.model_validate(document)


def with_candidates(summary: Summary, **values: Any) -> Summary:
    """Copy a summary with every candidate changed."""
    candidates = summary.model_dump(mode="json")["candidates"]["candidates"]
    return changed(summary, candidates={"candidates": [c | values for c in candidates]})


def headings(summary: Summary) -> list[tuple[str, str]]:
    return [(column.heading, column.unit) for column in cost_columns(summary)]


def test_a_column_stands_where_some_candidate_has_something_to_say():
    of_all = [("Weights", "MiB"), ("Stored", "MiB"), ("Smaller", "×"), ("Bits", "weights")]
    plain, joint = headings(make_summary()), headings(make_joint())
    assert plain == [*of_all, ("Ω", ""), ("Gap", "% of Ω")]
    more = [("Bits", "activations"), ("GBOPs", "an example")]
    assert joint == [*of_all, *more, ("Ω", ""), ("Gap", "% of Ω")]
    timed = with_candidates(make_joint(), costs={"weight_bits": 1, "latency_ns": 2_500_000})
    assert ("Latency", "ms") in headings(timed)
    assert ("Stored", "MiB") not in headings(timed)
    assert ("Gap", "% of Ω") not in headings(with_candidates(make_joint(), bound=None))


def test_every_column_has_a_cell_in_every_row():
    page = Page(render(make_joint()))
    rows = [row for row in page.rows if len(row) > 2]
    assert len(rows) == 2 + 6
    assert {len(row) for row in rows} == {1 + 8 + 6}


def test_a_candidates_costs_are_in_its_row():
    page = Page(render(make_joint()))
    exact, channel = page.row("exact"), page.row("channel")
    assert (exact[5], exact[6], exact[8]) == ("3.90", "0.123", "optimal")
    assert (channel[5], channel[6], channel[8]) == ("3.90", "—", "10.0")
    assert page.row("unquantized")[5:7] == ["32.00", "—"]


@pytest.mark.parametrize(
    ("omega", "bound", "cell"),
    [
        (2.0, 2.0, "optimal"),
        (2.0, 2.0 * (1 - 0.9e-9), "optimal"),
        (2.0, 2.0 * (1 - 1.1e-9), "1.1e−7"),
        (2.0, 1.5, "25.0"),
        (2.0, 2.0 + 1e-12, "optimal"),
        (0.0, 0.0, "optimal"),
        (2.0, None, "—"),
    ],
)
def test_a_gap_is_named_optimal_where_only_rounding_is_left(omega, bound, cell):
    summary = with_candidates(make_joint(), sensitivity=omega, bound=0.5)
    [column] = [column for column in cost_columns(summary) if column.heading == "Gap"]
    candidate = summary.candidates.candidates[0].model_copy(update={"bound": bound})
    assert column.cell(candidate) == cell


def test_activations_have_a_front_of_their_own():
    summary = make_joint()
    figure = fronts(summary.candidates, "activations")
    traces = {(trace.meta, trace.mode): trace for trace in figure.data}
    line, marks = traces["exact", "lines"], traces["exact", "markers"]
    assert list(line.x) == pytest.approx([b * 1000 / 8 / 2**20 for b in (2, 4, 8)])
    assert list(marks.x) == pytest.approx([3900 / 8 / 2**20] * 2)
    chosen = [c for c in summary.candidates.candidates if c.method == "exact"]
    assert list(marks.y) == pytest.approx([0.25 * c.sensitivity for c in chosen])
    of_weights = {(t.meta, t.mode): t for t in fronts(summary.candidates).data}
    assert list(of_weights["exact", "markers"].y) == pytest.approx(
        [0.75 * c.sensitivity for c in chosen]
    )
    for found, of in ((of_weights, "weights"), (traces, "activations")):
        for front in summary.candidates.fronts:
            if front.of == of:
                mib = [bits / 8 / 2**20 for bits in front.bits]
                assert list(found[front.method, "lines"].x) == pytest.approx(mib)
    assert [shape.x0 for shape in figure.layout.shapes] == pytest.approx([4000 / 8 / 2**20] * 2)
    assert traces["channel", "lines"].line.shape == "linear"
    assert line.line.shape == "hv"


def test_both_fronts_share_one_legend():
    html = render(make_joint())
    section = html[html.index('<section id="fronts">') : html.index('<section id="bits">')]
    assert section.count('class="legend"') == 1
    assert section.count('class="figure"') == 2
    assert "The line of channel is the lower convex hull" in " ".join(section.split())
    assert "each point of it is one" in " ".join(section.split())


def test_the_maps_keep_layers_and_tensors_apart():
    summary = make_joint()
    weights, activations = bits_map(summary), bits_map(summary, "activations")
    assert [column.name for column in weights.columns] == LAYERS
    assert [column.name for column in activations.columns] == list(TENSORS)
    assert [column.share for column in activations.columns] == ["10", "30", "60"]
    assert [column.is_pinned for column in activations.columns] == [False, False, True]
    rows = {row.method: row for row in activations.groups[0][1]}
    assert [cell.text for cell in rows["exact"].cells] == ["5", "5", "5"]
    assert rows["exact"].average_bits == 3.9
    assert Page(render(summary)).text["h3"].count("Activations, tensor by tensor") == 1


def test_a_run_of_weights_has_one_map_and_no_channels():
    summary = make_summary()
    assert bits_map(summary, "activations") is None
    assert channel_widths(summary) == ({}, [])
    page = Page(render(summary))
    assert "Activations, tensor by tensor" not in page.text["h3"]
    assert not [attrs for tag, attrs in page.elements if tag == "td" and "title" in attrs]


def test_channels_are_shown_as_their_mean_with_their_histogram():
    summary = make_joint()
    row = {row.method: row for row in bits_map(summary).groups[0][1]}["channel"]
    assert [cell.text for cell in row.cells] == ["5.5", "2", "2.0"]
    assert [cell.histogram for cell in row.cells] == ["3:2 8:2", "2:4", "0:1 4:1"]
    titles = [
        a["title"] for tag, a in Page(render(summary)).elements if tag == "td" and "title" in a
    ]
    assert titles[:3] == ["3:2 8:2", "2:4", "0:1 4:1"]
    assert titles[3:6] == ["3:2 8:2", "2:4", "0:1 4:1"]  # of the other budget
    assert titles[6:9] == ["8:2", "3:1 4:1", "5:2"]


def test_a_map_of_very_many_channels_reads_each_of_them_once():
    class Counting(dict):
        """A dictionary that counts how often it is gone through."""

        passes = 0

        def items(self):
            Counting.passes += 1
            return super().items()

        def __iter__(self):
            Counting.passes += 1
            return super().__iter__()

    summary = make_joint()
    bits = Counting({f"w:{layer}[{c}]": 1 + c % 8 for layer in LAYERS for c in range(9000)})
    candidate = summary.candidates.candidates[2].model_copy(update={"bits": bits})
    found = summary.candidates.model_copy(update={"candidates": [candidate]})
    [(_, [row]), _] = bits_map(summary.model_copy(update={"candidates": found})).groups
    assert [cell.text for cell in row.cells] == ["4.5"] * 3
    assert Counting.passes == 1


def test_the_shares_of_a_layers_channels_are_stacked():
    summary = make_joint()
    figures, sizes = channel_widths(summary)
    assert list(figures) == ["channel, 3 bits", "channel, 4 bits"]
    assert len(sizes) == 2
    figure = figures["channel, 3 bits"]
    names = [*LAYERS, *TENSORS]
    assert list(figure.layout.xaxis.categoryarray) == names
    assert figure.layout.barmode == "stack"
    by_name = {bar.name: dict(zip(bar.x, bar.y, strict=True)) for bar in figure.data}
    assert list(by_name) == ["pruned", "2 bits", "3 bits", "4 bits", "5 bits", "8 bits"]
    assert by_name["8 bits"]["conv1"] == 50
    assert by_name["pruned"]["fc"] == 50
    assert by_name["5 bits"]["fc#0"] == 100
    for name in names:
        assert sum(shares[name] for shares in by_name.values()) == pytest.approx(100)
    text = {bar.name: dict(zip(bar.x, bar.text, strict=True)) for bar in figure.data}
    assert text["8 bits"]["conv1"] == "2 of 4 channels: 8 bits"


def test_widths_have_the_same_shade_in_the_map_and_in_the_figure():
    summary = make_joint()
    row = {row.method: row for row in bits_map(summary).groups[0][1]}["channel"]
    figure = channel_widths(summary)[0]["channel, 3 bits"]
    shade = {bar.name: bar.marker.color for bar in figure.data}
    assert row.cells[1].background == shade["2 bits"]


def test_channels_need_a_runtime_that_takes_their_widths():
    [caveat] = caveats(make_joint())
    assert caveat.startswith("Allocations of channel need a runtime that takes a width for every")
    assert caveat in Page(render(make_joint())).text["li"]


def test_a_latency_is_the_tables():
    costs = {"weight_bits": 1, "activation_bits": 1, "latency_ns": 2_500_000}
    summary = with_candidates(changed(make_joint()), costs=costs, granularity="layer")
    [caveat] = caveats(summary)
    assert caveat.startswith("Latencies are sums of the layers’ in the latency table: what runs")
    summary = changed(summary, config={"latency": "a/b.json"})
    assert "in the latency table a/b.json: what" in caveats(summary)[0]


def test_traces_of_activations_that_did_not_converge_are_told_as_those_of_weights():
    summary = make_joint()
    traced = summary.curvature.activations.model_copy(
        update={"converged": False, "num_negative": 1, "trace": [1.0, -1.0, 1.0]}
    )
    document = summary.model_dump(mode="json")
    document["curvature"]["activations"] = traced.model_dump(mode="json") | {
        "probe_error": [1.0, 0.0, 0.0]
    }
    first, second, _ = caveats(Summary.model_validate(document))
    assert "after 48 probes: 1 activation tensor (conv1#0) has a probe error above" in first
    assert second.startswith("1 of 3 traces is negative (layer1.conv#0) and counts as zero")


def test_activations_are_told_in_words_with_their_own_widths():
    text = searched(make_joint())
    assert "from 2, 3, 4, 6, 8: 3 methods" in text
    assert "With them, those of 3 activation tensors, from 2, 5, 8." in text
    assert "Of the methods, channel gives every channel bits of its own." in text
    assert "channel" not in searched(make_summary())


def test_a_budget_is_named_with_all_the_sizes_that_it_limits():
    found = verdicts(make_joint())[0].budget
    assert re.fullmatch(
        r"3 bits \(weights 0\.0\d+ MiB, 3\.00 bits on average; "
        r"activations 0\.000477 MiB, 4\.00 bits on average\)",
        found,
    )
    assert re.fullmatch(
        r"3 bits \(0\.\d+ MiB, 3\.00 bits on average\)", verdicts(make_summary())[0].budget
    )


def test_names_of_tensors_cannot_break_out_of_the_page():
    evil = "<b>x</b><script>alert(1)</script>"
    summary = make_joint(tensors={evil: 10, "b": 10, "c": 10})
    candidates = summary.model_dump(mode="json")["candidates"]["candidates"]
    for candidate in candidates:
        candidate["bits"] = {
            name.replace("a:conv1#0", f"a:{evil}"): bits for name, bits in candidate["bits"].items()
        }
    summary = changed(summary, candidates={"candidates": candidates})
    html = render(summary)
    page = Page(html)
    assert not [tag for tag, _ in page.elements if tag == "b"]
    assert [tag for tag, _ in page.elements].count("script") == 3
    for figure in channel_widths(summary)[0].values():
        assert not [name for bar in figure.data for name in bar.x if "<b>" in name]
    assert evil in page.text["span"]


def printed(summary: Summary, width: int = 120) -> list[str]:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(result_table(summary))
    return capture.get().splitlines()


def relabeled(summary: Summary, label: str) -> Summary:
    document = summary.model_dump(mode="json")
    old = document["candidates"]["budgets"][0]["label"]
    document["candidates"]["budgets"][0]["label"] = label
    for candidate in document["candidates"]["candidates"]:
        if candidate["budget"] == old:
            candidate["budget"] = label
    return Summary.model_validate(document)


def test_the_terminal_shows_activations_where_they_are_searched():
    plain, joint = "\n".join(printed(make_summary())), "\n".join(printed(make_joint()))
    for heading in ("act.", "GBOPs"):
        assert heading in joint
        assert heading not in plain
    assert "stored" in plain
    assert "stored" in joint
    exact = next(line for line in printed(make_joint()) if "exact" in line)
    assert {"3.9", "0.123"} <= set(exact.split())


def test_the_terminals_table_fits_120_columns_with_nothing_cut_off():
    label = "13.11×, activations 10×, activations' peak 0.25 MiB"
    summary = with_candidates(relabeled(make_joint(), label), sensitivity=1.23e-5)
    lines = printed(summary)
    assert max(map(len, lines)) <= 120
    assert "…" not in "".join(lines)
    scores = summary.test.scores
    for candidate in summary.candidates.candidates:
        drop = f"{100 * scores[candidate.digest].drop:.2f} ± 0.17"
        assert any(drop in line and candidate.method in line for line in lines)
    assert label in " ".join(" ".join(line[:26] for line in lines).split())


def test_every_candidate_is_a_line_of_the_terminals_table():
    lines = printed(relabeled(make_joint(), "3 bits, activations 4 bits"))
    starts = [line.strip().split("  ")[0] for line in lines if "±" in line]
    assert starts[1:4] == ["3 bits,", "activations 4 bits", "channel"]


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_figure_and_needs_no_sideways_scrolling(tmp_path):
    html = render(make_joint())
    width = "`${document.documentElement.scrollWidth} of ${innerWidth}`"
    html += f"<script>document.title = {width}</script>"
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --disable-sync --no-first-run "
        "--disable-background-networking --disable-component-update --hide-scrollbars "
        "--window-size=500,900 --virtual-time-budget=8000 --dump-dom"
    )
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command.append((tmp_path / "report.html").as_uri())
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>500 of 500</title>" in dom
    assert dom.count(" svg-container") == len(figures_of(html)) == 9


def test_a_method_looks_the_same_in_both_fronts():
    summary = make_joint()
    colors: dict[str, set[str]] = {}
    for kind in ("weights", "activations"):
        for trace in fronts(summary.candidates, kind).data:
            colors.setdefault(trace.meta, set()).add(trace.line.color or trace.marker.color)
    assert set(colors) == {"uniform", "exact", "channel"}
    assert {len(found) for found in colors.values()} == {1}
