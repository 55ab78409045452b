"""``hawq front``: the fronts of a run's tables on one page, and the hull of its channels."""

import json
import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plotly.offline import get_plotlyjs
from test_report import Page, figures_of

from hawq.allocate.front import evenly
from search.artefacts import (
    BudgetLimit,
    Candidate,
    CandidatesArtefact,
    GroupTables,
    StageCost,
    TablesArtefact,
)
from search.commands.front import front_page
from search.errors import InputError
from search.folder import RunFolder, content_hash
from search.quantities import significant
from search.stages.candidates import MAX_HULL_POINTS, fronts
from search.tables import Tables

COST = StageCost(stage="x", seconds=0.0, cpu_seconds=0.0)
LAYERS = {"w:conv": 6, "w:fc": 12}
TENSORS = {"a:conv#0": 4, "a:fc#0": 2}


def groups(elements: dict[str, int], menu: tuple[int, ...] = (1, 2, 4)) -> dict:
    """Make up tables in which fewer bits cost more, each group by a factor of its own."""
    traces = [1.0 + 3.7 * i**2 % 11 for i in range(len(elements))]
    omega = [[t * n / 4.0**b for b in menu] for t, n in zip(traces, elements.values(), strict=True)]
    return {
        "space": [
            {"name": name, "num_elements": n, "macs": 1, "menu": list(menu), "tie": None}
            for name, n in elements.items()
        ],
        "space_fingerprint": "0",
        "widths": list(menu),
        "sensitivity": omega,
        "squared_error": omega,
        "trace": traces,
        "trace_error": [0.0] * len(elements),
        "num_scales": [1] * len(elements),
    }


def channels_of(elements: dict[str, int], num: int = 2) -> dict[str, int]:
    return {f"{name}[{c}]": n // num for name, n in elements.items() for c in range(num)}


def make_tables(*, activations: bool = True, channels: bool = True) -> TablesArtefact:
    """Make up the tables of a run."""
    elements = LAYERS | (TENSORS if activations else {})
    return TablesArtefact(
        **groups(elements),
        operations=[],
        alive=[["a:conv#0"], ["a:fc#0"]] if activations else [],
        channels=GroupTables(**groups(channels_of(elements))) if channels else None,
    )


def make_candidates(artefact: TablesArtefact) -> CandidatesArtefact:
    """Choose 2 bits everywhere, for a budget of 2 bits."""
    tables = Tables.of(artefact)
    bits = dict.fromkeys(tables.space.names, 2)
    costs = {"weight_bits": 36, "activation_bits": 12}
    return CandidatesArtefact(
        budgets=[BudgetLimit(label="2 bits", limits=costs)],
        fronts=[],
        candidates=[
            Candidate(
                method="uniform",
                budget="2 bits",
                digest="abc",
                bits=bits,
                costs=costs,
                average_bits=2.0,
                compression=16.0,
                activation_average_bits=2.0,
                activation_compression=16.0,
                sensitivity=3.0,
                activation_sensitivity=1.0,
                bound=None,
                evaluations=1,
                seconds=0.0,
            )
        ],
    )


@pytest.fixture
def run(tmp_path):
    """Make a run's folder with these tables and, if asked for, candidates of tables."""

    def make(artefact=None, candidates_of=None):
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / "config.yaml").write_text("{}")
        artefact = artefact or make_tables()
        RunFolder(folder).save("tables", {}, artefact, COST)
        if candidates_of is not None:
            inputs = {"tables": content_hash(candidates_of.model_dump(mode="json"))}
            RunFolder(folder).save("candidates", inputs, make_candidates(artefact), COST)
        return folder

    return make


def drawn(page: str, id_: str) -> dict[tuple[str, str], dict]:
    """Return a figure's traces by method and mode."""
    return {(t["meta"], t["mode"]): t for t in figures_of(page)[id_]["data"]}


def test_the_page_is_in_the_runs_folder_and_loads_nothing(run):
    folder = run()
    path = front_page(folder)
    assert path == folder / "front.html"
    html = path.read_text()
    page = Page(html)
    assert page.text["h1"] == "mine: fronts"
    assert "2 layers (18 weights) and 2 activation tensors (6 activations of one" in page.text["p"]
    loading = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
    assert not [(tag, attrs) for tag, attrs in page.elements if loading & attrs.keys()]
    assert html.count(get_plotlyjs()) == 1
    assert html == front_page(folder, folder / "again" / "page.html").read_text()


def test_fronts_are_drawn_over_weights_and_over_activations(run):
    page = front_page(run()).read_text()
    for id_, elements in (("fronts-figure", 18), ("activation-fronts-figure", 6)):
        traces = drawn(page, id_)
        assert {method for method, _ in traces} == {"hawq-v2", "exact", "channel"}
        for trace in traces.values():
            sizes = np.array(trace["x"]) * 8 * 2**20
            assert sizes[[0, -1]] == pytest.approx([elements, 4 * elements])
            assert np.all(np.diff(trace["y"]) < 0)
    assert "lower convex hull of all its allocations" in Page(page).text["p"]


def test_a_run_of_weights_by_layer_has_one_figure_and_no_hull(run):
    page = front_page(run(make_tables(activations=False, channels=False))).read_text()
    assert list(figures_of(page)) == ["fronts-figure"]
    assert {method for method, _ in drawn(page, "fronts-figure")} == {"hawq-v2", "exact"}
    assert "hull" not in page.replace(get_plotlyjs(), "")


def test_a_hull_is_drawn_as_a_line_and_a_front_in_steps(run):
    traces = drawn(front_page(run()).read_text(), "fronts-figure")
    shapes = {method: trace["line"]["shape"] for (method, _), trace in traces.items()}
    assert shapes == {"hawq-v2": "hv", "exact": "hv", "channel": "linear"}


def test_the_table_has_the_least_sensitivity_within_each_size(run):
    artefact = make_tables(channels=False)
    page = front_page(run(artefact)).read_text()
    omega = np.array(artefact.sensitivity)[:2]
    bits = [1, 2, 4]
    choices = [
        (bits[a] * 6 + bits[b] * 12, omega[0, a] + omega[1, b])
        for a, b in product(range(3), repeat=2)
    ]
    least = min(o for size, o in choices if size <= 3 * 18)
    row = re.search(r">3</th>\s*<td>(.*)</td>\s*<td>(.*)</td>\s*<td>(.*)</td>", page)
    assert row[1] == significant(3 * 18 / 8 / 2**20)
    assert row[3] == significant(least)


def test_what_the_run_chose_is_marked(run):
    artefact = make_tables()
    page = front_page(run(artefact, candidates_of=artefact)).read_text()
    weights = drawn(page, "fronts-figure")["uniform", "markers"]
    activations = drawn(page, "activation-fronts-figure")["uniform", "markers"]
    assert (weights["y"], activations["y"]) == ([2.0], [1.0])
    assert activations["x"] == pytest.approx([12 / 8 / 2**20])
    assert Page(page).classes("caveats") == 0
    assert "for its budgets, 2 bits." in " ".join(Page(page).text["p"].split())


@pytest.mark.parametrize(
    ("of", "caveat"),
    [
        (None, "The run has no candidates yet: its choices are not marked."),
        (make_tables(channels=False), "are of other tables than these, and are not marked."),
    ],
)
def test_candidates_that_are_missing_or_of_other_tables_are_not_marked(run, of, caveat):
    page = front_page(run(candidates_of=of)).read_text()
    assert ("uniform", "markers") not in drawn(page, "fronts-figure")
    assert caveat in Page(page).text["li"]


def test_a_folder_that_is_no_runs_is_told_in_a_line(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=r"must be the folder of a run, got no config\.yaml"):
            front_page(folder)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(InputError, match="has no tables yet: let hawq run come past"):
        front_page(tmp_path)
    assert not (tmp_path / "front.html").exists()


def test_damaged_tables_and_a_folder_as_page_are_told_in_a_line(run):
    folder = run()
    with pytest.raises(InputError, match="--out: must be a file to write, got the folder"):
        front_page(folder, folder)
    (folder / "tables.json").write_text(json.dumps({"result": {}, "cost": {}}))
    with pytest.raises(InputError, match="must be an artefact of this version"):
        front_page(folder)


def every_choice(tables: GroupTables, prefix: str) -> set[tuple[int, float]]:
    """List size and Ω of every allocation of channels, by brute force."""
    rows = [i for i, g in enumerate(tables.space) if g["name"].startswith(prefix)]
    return {
        (
            sum(tables.widths[b] * tables.space[i]["num_elements"] for i, b in pairs),
            round(sum(tables.sensitivity[i][b] for i, b in pairs), 9),
        )
        for choice in product(range(len(tables.widths)), repeat=len(rows))
        for pairs in [list(zip(rows, choice, strict=True))]
    }


@pytest.mark.parametrize(("kind", "prefix"), [("weights", "w:"), ("activations", "a:")])
def test_every_point_of_the_hull_is_an_allocation_and_none_lies_below(kind, prefix):
    artefact = make_tables()
    found = fronts("channel", Tables.of(artefact), Tables.of_channels(artefact))
    [hull] = [front for front in found if front.of == kind]
    every = every_choice(artefact.channels, prefix)
    points = [(bits, round(o, 9)) for bits, o in zip(hull.bits, hull.sensitivity, strict=True)]
    assert hull.is_hull
    assert set(points) <= every
    assert points[0][0] == min(every)[0]
    assert points[-1][1] == min(o for _, o in every)
    for size, omega in every:
        assert omega >= np.interp(size, hull.bits, hull.sensitivity) - 1e-9


def test_tied_channels_share_their_bits_on_the_hull():
    artefact = make_tables(activations=False)
    for group in artefact.channels.space:
        group["tie"] = "all"
    [hull] = fronts("channel", Tables.of(artefact), Tables.of_channels(artefact))
    assert set(hull.bits) <= {18, 36, 72}


def test_the_hull_of_many_channels_is_thinned_and_keeps_both_ends():
    artefact = make_tables(activations=False)
    many = GroupTables(**groups({f"w:conv[{c}]": 1 + c % 7 for c in range(3000)}))
    artefact = artefact.model_copy(update={"channels": many})
    [hull] = fronts("channel", Tables.of(artefact), Tables.of_channels(artefact))
    elements = sum(group["num_elements"] for group in many.space)
    assert MAX_HULL_POINTS / 2 < len(hull.bits) <= MAX_HULL_POINTS
    assert (hull.bits[0], hull.bits[-1]) == (elements, 4 * elements)
    slopes = np.diff(hull.sensitivity) / np.diff(hull.bits)
    assert np.all(np.diff(slopes) >= -1e-12)


def test_a_run_without_channels_has_no_hull():
    artefact = make_tables(channels=False)
    assert fronts("channel", Tables.of(artefact), Tables.of_channels(artefact)) == []


@given(st.sets(st.integers(0, 10**12), min_size=1, max_size=60), st.integers(2, 20))
def test_thinning_keeps_both_ends_and_one_near_each_point(costs, num):
    cost = np.array(sorted(costs))
    kept = cost[evenly(cost, num)]
    assert len(kept) <= num
    assert (kept[0], kept[-1]) == (cost[0], cost[-1])
    spacing = (cost[-1] - cost[0]) / (num - 1) + 1
    above = kept[np.searchsorted(kept, cost)]
    assert np.all(above - cost <= spacing)
    assert len(kept) == len(cost) or len(cost) > num
