"""The pages of ``hawq trace``: what they show, what they warn of, and that they need nothing."""

import json
import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from search.artefacts import BlockEigenvalue
from search.quantities import significant
from search.report import render_eigenvalues, render_traces
from search.report.channel_figure import MAX_POINTS, channels, num_drawn
from search.report.eigenvalue_figure import eigenvalues, order
from search.report.estimators import ESTIMATORS
from search.report.share_figure import shares
from search.report.sites import sites_of
from search.report.trace_caveats import eigenvalue_caveats, trace_caveats
from search.report.trace_figure import traces
from search.report.trace_page import MAX_ROWS
from search.traced import EigenvalueDocument, LossSurface, TraceDocument, TraceGroup

LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "linear")
EVIL = "<script>alert(1)</script><b>%{x}&amp;"


def make_traces(layers=LAYERS, num_channels=0, **changes: Any) -> TraceDocument:
    """Make up a document; its average traces are well apart, and all channels positive."""
    draw = random.Random(0)
    of_channels = [
        [10.0 * 0.3**i * draw.uniform(0.5, 2.0) for _ in range(max(1, num_channels))]
        for i in range(len(layers))
    ]
    total = sum(map(sum, of_channels))
    sites, members = [], []
    for layer, own in zip(layers, of_channels, strict=True):
        sites.append(make_group(layer, 90 * len(own), sum(own), total))
        members += [make_group(f"{layer}[{c}]", 90, t, total) for c, t in enumerate(own)]
    values = {
        "name": "digits",
        "subject": "weights",
        "granularity": "channel" if num_channels else "layer",
        "estimator": "gauss_newton",
        "reason": "every operator is piecewise linear",
        "seed": 17,
        "num_sites": len(layers),
        "num_probes": 12,
        "num_examples": 256,
        "pool_size": 1024,
        "population_size": 1151,
        "rtol": 0.05,
        "converged": True,
        "num_negative": 0,
        "workers": 3,
        "seconds": 19.5,
        "cpu_seconds": 41.25,
        "finished": "2025-03-04T05:06:07+00:00",
        "machine": {"processor": "8 cores", "memory": "31 GiB"},
        "versions": {"python": "3.11.9", "torch": "2.11.0"},
        "groups": [*sites, *(members if num_channels else [])],
    }
    return TraceDocument.model_validate(values | changes)


def make_group(name: str, n: int, trace: float, total: float) -> TraceGroup:
    return TraceGroup(
        group=name,
        n=n,
        trace=trace,
        probe_error=0.021 * abs(trace),
        data_error=0.033 * abs(trace),
        share=trace / total,
        share_error=0.0123 * abs(trace / total),
    )


def with_group(found: TraceDocument, index: int, **values: Any) -> TraceDocument:
    """Copy a document with one group changed."""
    groups = list(found.groups)
    groups[index] = groups[index].model_copy(update=values)
    return found.model_copy(update={"groups": groups})


def make_eigenvalues(num: int = 3, **changes: Any) -> EigenvalueDocument:
    """Make up a document whose order by S is beyond doubt, and not the network's."""
    offsets = [-0.5, 0.0, 0.5]
    values = {
        "name": "digits",
        "weights_sha256": "ab" * 32,
        "seed": 17,
        "num_examples": 256,
        "pool_size": 1151,
        "population_size": 1151,
        "rtol": 0.05,
        "workers": 3,
        "seconds": 19.5,
        "cpu_seconds": 41.25,
        "finished": "2025-03-04T05:06:07+00:00",
        "machine": {"memory": "31 GiB"},
        "versions": {"torch": "2.11.0"},
        "blocks": [
            BlockEigenvalue(
                block=f"block{i}",
                layers=[f"block{i}.conv1", f"block{i}.conv2"],
                n=1000,
                eigenvalue=2.0 * 4**i,
                residual=0.02,
                data_error=0.03,
                iterations=5 + i,
                converged=True,
            )
            for i in range(num)
        ],
        "surfaces": [
            LossSurface(
                block=f"block{i}",
                eigenvalues=[2.0, 1.0],
                offsets=offsets,
                losses=[[0.1 + a * a + b * b for b in offsets] for a in offsets],
            )
            for i in dict.fromkeys((num - 1, 0))
        ],
    }
    return EigenvalueDocument.model_validate(values | changes)


def with_block(found: EigenvalueDocument, index: int, **values: Any) -> EigenvalueDocument:
    """Copy a document with one block changed."""
    blocks = list(found.blocks)
    blocks[index] = blocks[index].model_copy(update=values)
    return found.model_copy(update={"blocks": blocks})


class Page(HTMLParser):
    """A page's elements with their attributes, its tables by section, text, and its figures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.items: list[str] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self._section = ""
        self.feed(html)
        [found] = re.findall(r"const figures = (\{.*\});\n", html)
        self.figures = json.loads(found)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        tables = self.tables.setdefault(self._section, [])
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        elif tag == "table":
            tables.append([])
        elif tag == "tr":
            tables[-1].append([])
        elif tag in {"th", "td"}:
            tables[-1][-1].append("")
        elif tag == "li":
            self.items.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        self.text[tag] = self.text.get(tag, "") + data
        if {"th", "td"} & set(self._open):
            row = self.tables[self._section][-1][-1]
            row[-1] = (row[-1] + " ".join(data.split())).strip()
        elif "li" in self._open:
            self.items[-1] += data

    def ids(self) -> set[str | None]:
        return {attrs["id"] for _, attrs in self.elements if "id" in attrs}


def rendered(found: TraceDocument | EigenvalueDocument) -> str:
    return render_traces(found) if isinstance(found, TraceDocument) else render_eigenvalues(found)


MADE = pytest.mark.parametrize(
    "make",
    [make_traces, lambda: make_traces(num_channels=5), make_eigenvalues],
    ids=["layers", "channels", "eigenvalues"],
)


# --- any page -----------------------------------------------------------------------------------


@MADE
def test_equal_documents_give_equal_pages(make):
    assert rendered(make()) == rendered(make())


@MADE
def test_a_page_loads_nothing_and_holds_plotly_once(make):
    html = rendered(make())
    page = Page(html)
    loading = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
    assert not [(tag, attrs) for tag, attrs in page.elements if loading & attrs.keys()]
    assert "@import" not in page.text["style"]
    assert "url(" not in page.text["style"]
    assert html.count(get_plotlyjs()) == 1
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


@MADE
def test_every_figure_has_its_place_titled_axes_and_numbers(make):
    page = Page(rendered(make()))
    assert page.figures.keys() <= page.ids()
    for figure in page.figures.values():
        assert figure["layout"]["xaxis"]["title"]["text"]
        assert figure["layout"]["yaxis"]["title"]["text"]
        assert figure["data"]


@MADE
def test_the_facts_are_told(make):
    found = make()
    page = Page(rendered(found))
    told = page.text["dd"]
    for fact in ("256", "1,151", "17", "3", "19.5 s", "41.2 s, all workers", "2025-03-04 05:06"):
        assert fact in told
    for key, value in {**found.machine, **found.versions}.items():
        assert key in page.text["dt"]
        assert value in told


def test_names_cannot_break_out_of_the_page():
    traced = make_traces((*LAYERS[:3], EVIL), 2, name=EVIL, reason=EVIL, machine={EVIL: EVIL})
    found = make_eigenvalues(name=EVIL, versions={EVIL: EVIL})
    found = with_block(found, 0, block=EVIL, layers=[EVIL], converged=False)
    surface = found.surfaces[0].model_copy(update={"block": EVIL})
    found = found.model_copy(update={"surfaces": [surface]})
    for html in map(rendered, (traced, found)):
        page = Page(html)
        assert [tag for tag, _ in page.elements].count("script") == 3
        assert "<script>alert" not in html
        assert "alert(1)</script>" not in html
        assert not [tag for tag, _ in page.elements if tag == "b"]
        assert EVIL in page.text["h1"]
        assert "<b>" not in json.dumps(page.figures)


# --- traces -------------------------------------------------------------------------------------


def expected_row(group: TraceGroup, has_probes: bool = True) -> list[str]:
    size = abs(group.trace)
    decimals = max(0, 1 - math.floor(math.log10(100 * group.share_error)))
    return [
        group.group,
        f"{group.n:,}",
        significant(group.trace),
        significant(group.trace / group.n),
        significant(100 * group.probe_error / size) if has_probes else "none",
        significant(100 * group.data_error / size),
        f"{100 * group.share:.{decimals}f} ± {100 * group.share_error:.{decimals}f}",
    ]


def test_every_number_of_every_site_is_in_its_row():
    found = make_traces()
    [table] = Page(render_traces(found)).tables["sites"]
    assert table[1:-1] == [expected_row(group) for group in found.groups]
    total = sum(group.trace for group in found.groups)
    assert table[-1][:3] == ["Σ", "360", significant(total)]


def test_every_channel_is_in_its_row():
    found = make_traces(num_channels=3)
    page = Page(render_traces(found))
    spreads, members = page.tables["channels"]
    assert members[1:] == [expected_row(group) for group in found.groups[4:]]
    averages = sorted(group.trace / group.n for group in found.groups[4:7])
    error = significant(100 * math.hypot(0.021, 0.033))
    assert spreads[1] == ["conv1", "3", "0", *map(significant, averages), error]


def test_cells_sort_by_the_documents_own_numbers():
    found = make_traces()
    page = Page(render_traces(found))
    values = [float(a["data-value"] or 0) for tag, a in page.elements if "data-value" in a]
    assert values[2::6] == [group.trace / group.n for group in found.groups]
    assert values[5::6] == [group.share for group in found.groups]


def test_an_exact_estimator_has_no_probe_error():
    found = make_traces(estimator="exact_gauss_newton", num_probes=0)
    found = found.model_copy(
        update={"groups": [g.model_copy(update={"probe_error": 0.0}) for g in found.groups]}
    )
    page = Page(render_traces(found))
    [table] = page.tables["sites"]
    assert table[1] == expected_row(found.groups[0], has_probes=False)
    assert "Gauss–Newton, exact, no probes, on 256 examples" in page.text["p"]
    assert "needs no random probes" in page.text["p"]
    assert "0 probes" not in page.text["p"]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((256, 1024, 1151), "256 examples drawn by importance from 1,024 of 1,151."),
        ((256, 1151, 1151), "256 examples drawn by importance from 1,151."),
        ((256, 256, 1151), "256 examples drawn from 1,151."),
        ((1151, 1151, 1151), "all 1,151 examples."),
    ],
)
def test_the_first_sentence_says_what_was_done_and_why(sizes, words):
    keys = ("num_examples", "pool_size", "population_size")
    found = make_traces(num_channels=2, **dict(zip(keys, sizes, strict=True)))
    text = Page(render_traces(found)).text["p"]
    assert "in the weights of 4 layers and of their 8 channels" in text
    assert f"Gauss–Newton, 12 probes an example, on {words}" in text
    assert "Why this estimator: every operator is piecewise linear." in text


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_has_a_name(estimator):
    found = make_traces(estimator=estimator)
    assert ESTIMATORS[estimator] in Page(render_traces(found)).text["dd"]


def test_activations_are_called_so():
    found = make_traces(("conv1#0", "linear#0"), subject="activations")
    page = Page(render_traces(found))
    assert page.text["h1"] == "digits: Hessian traces of activations"
    assert "All tensors" in page.text["h2"]
    axes = page.figures["averages-figure"]["layout"]
    assert "activation²" in axes["yaxis"]["title"]["text"]
    assert axes["xaxis"]["title"]["text"].startswith("Tensor")


def test_a_clean_document_has_no_caveats():
    found = make_traces(num_channels=3)
    assert trace_caveats(found, sites_of(found)) == []
    assert 'class="caveats"' not in render_traces(found)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            with_group(make_traces(converged=False), 1, probe_error=2.0),
            "The traces had not converged after 12 probes an example: the probe error of 1 of 4 "
            "layers (layer1.0.conv1) is above 5\u00a0% of the trace.",
        ),
        (
            make_traces(converged=False),
            "The traces had not converged after 12 probes an example.",
        ),
        (
            with_group(with_group(make_traces(num_channels=3), 3, trace=-1.0), 5, trace=-0.1),
            "The trace of 1 of 4 layers (linear) and 1 of 12 channels is negative and counts as "
            "zero in Ω: the methods see no cost in quantizing there.",
        ),
        (
            with_group(make_traces(), 0, data_error=1e3),
            "The order by average trace is not certain: of 3 pairs of neighbors 1 may stand the "
            "other way round (conv1 and layer1.0.conv1), at 95\u00a0% and with errors taken as "
            "independent.",
        ),
        (make_traces(estimator="fisher"), "The empirical Fisher is not the Hessian: "),
    ],
    ids=["not converged", "by another rule", "negative", "order", "fisher"],
)
def test_each_caveat_of_traces_appears_exactly_when_it_should(found, expected):
    [caveat] = trace_caveats(found, sites_of(found))
    assert caveat.startswith(expected)
    assert [item for item in Page(render_traces(found)).items if item == caveat]


def test_a_data_error_lost_in_the_probes_is_explained():
    note = "could be told apart from the probes’"
    assert note not in render_traces(make_traces())
    assert note in render_traces(with_group(make_traces(), 2, data_error=0.0))
    whole = make_traces(num_examples=1151, pool_size=1151)
    assert note not in render_traces(with_group(whole, 2, data_error=0.0))


def test_the_figures_show_the_documents_numbers():
    found = make_traces()
    sites = sites_of(found)
    marks = {trace.name: trace for trace in traces(sites).data}
    assert list(marks["average trace"].y) == [group.trace / group.n for group in found.groups]
    [bars] = shares(sites).data
    assert list(bars.x) == list(LAYERS)
    assert list(bars.y) == [100 * group.share for group in found.groups]
    assert list(bars.error_y.array) == [100 * group.share_error for group in found.groups]


def test_channels_are_sorted_within_their_sites_strip():
    found = make_traces(num_channels=7)
    points, means = channels(sites_of(found)).data
    groups = {group.group: group.trace / group.n for group in found.groups}
    for i, layer in enumerate(LAYERS):
        own = sorted((x, y) for x, y in zip(points.x, points.y, strict=True) if abs(x - i) < 0.5)
        assert [y for _, y in own] == sorted(groups[f"{layer}[{c}]"] for c in range(7))
        assert own[3][0] == i
        assert means.y[3 * i] == groups[layer]


def test_channels_below_zero_are_drawn_at_the_foot():
    found = with_group(make_traces(num_channels=3), 5, trace=-1.0)
    found = with_group(found, 6, trace=0.0)
    figure = channels(sites_of(found))
    by_name = {trace.name: trace for trace in figure.data}
    foot = by_name["channel, zero or negative: below this axis"]
    assert [text.partition("<br>")[0] for text in foot.text] == ["conv1[1]", "conv1[2]"]
    assert max(foot.y) < min(by_name["channel"].y)
    assert len(by_name["channel"].x) == 10


def test_many_channels_stay_quick():
    found = make_traces(tuple(f"layer{i}.conv" for i in range(54)), 490)
    sites = sites_of(found)
    figure = channels(sites)
    drawn = len(figure.data[0].x)
    assert drawn == num_drawn(sites) <= MAX_POINTS
    averages = [g.trace / g.n for g in sites.channels[0]]
    first = [y for x, y in zip(figure.data[0].x, figure.data[0].y, strict=True) if abs(x) < 0.5]
    assert (min(first), max(first)) == (min(averages), max(averages))
    html = render_traces(found)
    assert len(html) < len(get_plotlyjs()) + 600_000
    page = Page(html)
    assert f"Of 26,460 channels {drawn:,} are drawn" in page.text["p"]
    assert "26,460 channels are too many for a table here" in page.text["p"]
    assert len(page.tables["channels"]) == 1


def test_a_few_channels_are_all_drawn_and_listed():
    found = make_traces(num_channels=MAX_ROWS // len(LAYERS))
    assert num_drawn(sites_of(found)) == MAX_ROWS
    page = Page(render_traces(found))
    assert "are drawn" not in page.text["p"]
    assert len(page.tables["channels"][1]) == MAX_ROWS + 1


@pytest.mark.parametrize("value", [0.0, -1.0])
@pytest.mark.parametrize("num_channels", [0, 1, 2])
def test_traces_may_all_be_zero_or_negative(value, num_channels):
    found = make_traces(("fc",), num_channels)
    for index in range(len(found.groups)):
        found = with_group(found, index, trace=value, share=0.0, share_error=0.0)
    page = Page(render_traces(found))
    assert page.tables["sites"][0][1][2] == significant(value)
    for name in {"averages-figure", "channels-figure"} & page.figures.keys():
        low, high = page.figures[name]["layout"]["yaxis"]["range"]
        assert low < high


def test_figures_have_room_for_long_names():
    [short, long] = (
        Page(render_traces(make_traces(names))).figures["averages-figure"]["layout"]["height"]
        for names in (LAYERS, (*LAYERS[:3], 60 * "x"))
    )
    assert long - short > 250


# --- eigenvalues --------------------------------------------------------------------------------


def test_every_number_of_every_block_is_in_its_row():
    found = make_eigenvalues()
    [table] = Page(render_eigenvalues(found)).tables["blocks"]
    assert table[1:] == [
        [
            block.block,
            str(3 - i),
            significant(block.eigenvalue / 1000),
            significant(block.eigenvalue),
            significant(100 * block.residual / block.eigenvalue),
            significant(100 * block.data_error / block.eigenvalue),
            "1,000",
            str(5 + i),
            f"block{i}.conv1, block{i}.conv2",
        ]
        for i, block in enumerate(found.blocks)
    ]


def test_eigenvalues_are_drawn_with_both_errors():
    blocks = make_eigenvalues().blocks
    bars, both, residual = eigenvalues(blocks).data
    assert list(bars.y) == [2.0, 8.0, 32.0]
    assert list(both.y[:2]) == pytest.approx([1.95, 2.05])
    assert list(residual.y[:2]) == pytest.approx([1.98, 2.02])


def test_blocks_are_ordered_by_s():
    found = with_block(make_eigenvalues(), 2, n=100_000)
    assert list(order(found.blocks).layout.xaxis.categoryarray) == ["block1", "block0", "block2"]
    [table] = Page(render_eigenvalues(found)).tables["blocks"]
    assert [row[1] for row in table[1:]] == ["2", "1", "3"]


def test_both_surfaces_are_drawn():
    page = Page(render_eigenvalues(make_eigenvalues()))
    assert page.figures["surface-figure-0"]["data"][0]["name"] == "block2"
    assert page.figures["surface-figure-1"]["data"][0]["name"] == "block0"
    assert "blocks of largest and of smallest |λ|" in page.text["p"]
    assert "overflows" not in page.text["p"]


def test_a_hole_in_a_surface_is_explained():
    found = make_eigenvalues()
    losses = [[math.inf, *found.surfaces[0].losses[0][1:]], *found.surfaces[0].losses[1:]]
    surface = found.surfaces[0].model_copy(update={"losses": losses})
    page = Page(render_eigenvalues(found.model_copy(update={"surfaces": [surface]})))
    assert page.figures["surface-figure-0"]["data"][0]["z"][0][0] is None
    assert "Where there is a hole the loss overflows." in page.text["p"]


def test_one_block_without_surfaces_renders():
    page = Page(render_eigenvalues(make_eigenvalues(1, surfaces=[])))
    assert page.figures.keys() == {"eigenvalues-figure", "order-figure"}
    assert "surfaces" not in page.ids()
    assert page.items == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            with_block(make_eigenvalues(), 1, converged=False),
            "The power iteration of 1 of 3 blocks (block1) had not converged: the residual is "
            "above 5\u00a0% of |λ|.",
        ),
        (
            with_block(make_eigenvalues(), 1, eigenvalue=-8.0),
            "λ of 1 of 3 blocks (block1) is negative: ",
        ),
        (
            with_block(make_eigenvalues(), 1, residual=7.0),
            "The order by S is not certain: of 2 pairs of neighbors 1 may stand the other way "
            "round (block1 and block0), at 95\u00a0%",
        ),
    ],
    ids=["not converged", "negative", "order"],
)
def test_each_caveat_of_eigenvalues_appears_exactly_when_it_should(found, expected):
    [caveat] = eigenvalue_caveats(found)
    assert caveat.startswith(expected)
    assert Page(render_eigenvalues(found)).items == [caveat]


def test_a_clean_document_of_eigenvalues_has_no_caveats():
    assert eigenvalue_caveats(make_eigenvalues()) == []


def test_a_block_that_did_not_converge_is_marked_in_its_row():
    found = with_block(make_eigenvalues(), 1, converged=False)
    [table] = Page(render_eigenvalues(found)).tables["blocks"]
    assert [row[0] for row in table[1:]] == ["block0", "block1not converged", "block2"]


# --- in a browser -------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@MADE
def test_a_browser_draws_every_figure_and_sorts_the_tables(make, tmp_path):
    script = """<script>
      const table = [...document.querySelectorAll("table.sortable")].pop();
      const button = table.tHead.rows[0].cells[3].querySelector("button");
      const first = () => table.tBodies[0].rows[0].cells[0].textContent.trim();
      const seen = [first()];
      for (let i = 0; i < 3; i++) { button.click(); seen.push(first()); }
      const width = `${document.documentElement.scrollWidth} of ${innerWidth}`;
      document.title = [width, ...seen].join(", ");
    </script>"""
    html = rendered(make())
    (tmp_path / "page.html").write_text(html + script, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --disable-sync --no-first-run "
        "--disable-background-networking --disable-component-update --hide-scrollbars "
        "--window-size=500,900 --virtual-time-budget=8000 --dump-dom"
    )
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command.append((tmp_path / "page.html").as_uri())
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    tables = Page(html).tables
    rows = tables.get("blocks", tables.get("sites", []))[-1]
    names = {row[0]: float(row[3]) for row in rows[1:] if row[0] != "Σ"}
    ranked = sorted(names, key=lambda name: names[name])
    expected = [next(iter(names)), ranked[-1], ranked[0], next(iter(names))]
    assert f"<title>500 of 500, {', '.join(expected)}</title>" in dom
    assert dom.count(" svg-container") == len(Page(html).figures)
