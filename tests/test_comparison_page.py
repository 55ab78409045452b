"""The page of a comparison: what it shows, and what it says is missing."""

import shutil
import subprocess
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from test_comparison_verdict import LEVEL, make_comparison, scored
from test_report import Page, figures_of

from search.comparison.document import ComparisonDocument
from search.comparison.progress import best_so_far
from search.comparison.scale import Scale
from search.comparison.standings import standings
from search.comparison.text import comparison_text
from search.comparison.verdict import verdict
from search.report.comparison_curves import by_cost, by_evaluations, cost_curve, evaluation_curve
from search.report.comparison_finals import finalists
from search.report.comparison_findings import (
    comparison_caveats,
    cost_said,
    evaluations_said,
    finalists_said,
    shares_said,
)
from search.report.comparison_fronts import covered
from search.report.comparison_looks import comparison_looks
from search.report.comparison_page import render_comparison, write_comparison_page

SCALE = Scale("batch_norm")
SMALL = {"methods": ("cw-hawq", "tpe"), "num_seeds": 3, "length": 40}


def looks_of(document: ComparisonDocument) -> Any:
    """Return the looks of a comparison's methods."""
    return comparison_looks(list(dict.fromkeys(s.method for s in standings(document))))


def test_the_page_is_written_into_the_folder(tmp_path):
    document = make_comparison(**SMALL)
    path = write_comparison_page(tmp_path, document)
    assert path == tmp_path / "comparison.html"
    assert path.read_text(encoding="utf-8") == render_comparison(document)


def test_the_page_loads_nothing_from_anywhere():
    page = Page(render_comparison(make_comparison(**SMALL)))
    loading = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
    assert not [(tag, attrs) for tag, attrs in page.elements if loading & attrs.keys()]


def test_every_sentence_of_the_verdict_is_on_the_page_in_its_order():
    document = make_comparison(**SMALL)
    page = Page(render_comparison(document))
    assert page.text["li"].startswith("".join(verdict(document)))


def test_every_method_has_a_row_under_every_budget():
    page = Page(render_comparison(make_comparison(budgets=("4 bits", "3 bits"), **SMALL)))
    assert page.row("cw-hawq", 0)[1:5] == ["3", "40", "52", "1,450"]
    assert page.row("cw-hawq", 1)[6] == "88.30 ± 0.31"
    budgets = [row[0].strip() for row in page.rows if len(row) == 1]
    assert budgets == ["4 bits", "3 bits"]


def test_names_cannot_break_out_of_the_page():
    evil = "<img src=x>&"
    document = make_comparison(**SMALL, name=evil)
    renamed = ComparisonDocument.model_validate_json(
        document.model_dump_json().replace('"3 bits"', f'"{evil}"')
    )
    html = render_comparison(renamed)
    assert "<img" not in html
    assert not [tag for tag, _ in Page(html).elements if tag == "img"]


EMPTY: dict[str, Any] = {"methods": (), "finalists": False, "num_agreement": 0}


@pytest.mark.parametrize(
    ("changes", "missing", "num_figures"),
    [
        ({}, ["fewer than two budgets"], 4),
        ({"budgets": ("3 bits", "4 bits")}, [], 8),
        ({"finalists": False}, ["no method’s best has been fine-tuned", "two budgets"], 3),
        ({"num_agreement": 0}, ["was not measured", "two budgets"], 3),
        ({"num_seeds": 1}, ["two budgets"], 4),
        ({"length": 1}, ["two budgets"], 4),
        (EMPTY, ["no search has finished", "two budgets"], 0),
        (EMPTY | {"hessian": []}, ["no search has finished", "two budgets"], 0),
        ({"hessian": [], "finalists": False}, ["no Hessian method", "two budgets"], 3),
        ({"fidelity": "proxy"}, ["A score is −Ω by the Hessian", "two budgets"], 4),
    ],
)
def test_what_is_missing_is_said_and_the_rest_is_shown(changes, missing, num_figures):
    html = render_comparison(make_comparison(**SMALL | changes))
    assert len(figures_of(html)) == num_figures
    for words in missing:
        assert words in html
    assert ("<p>Missing" in html) is bool(missing)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"search_seen": True}, "The network was trained on the examples that scores are of"),
        ({"num_seeds": 1}, "Some methods have only 1 search a budget; which search is better is"),
        ({"num_seeds": 3}, "Some methods have only 3 searches a budget; which search is better"),
    ],
)
def test_a_reader_is_warned(changes, expected):
    document = make_comparison(methods=("cw-hawq",), length=20, **changes)
    assert [c for c in comparison_caveats(document, standings(document)) if expected in c]


def test_a_full_comparison_has_no_caveats():
    document = make_comparison(methods=("cw-hawq",), length=20)
    assert comparison_caveats(document, standings(document)) == []


def test_searches_that_ended_early_or_failed_are_counted_with_their_reasons():
    document = make_comparison(methods=("cw-hawq", "tpe"), length=20)
    searches = list(document.searches)
    for i in (0, 1):
        changes = {"evaluations": searches[i].evaluations[:9], "reason": "nothing new came"}
        searches[i] = searches[i].model_copy(update=changes)
    searches[20] = searches[20].model_copy(update={"failures": ["a: out of memory"]})
    document = document.model_copy(update={"searches": searches})
    assert comparison_caveats(document, standings(document)) == [
        "2 searches of 24 ended before 20 evaluations: cw-hawq, 2 (nothing new came).",
        "1 score failed once and had to be computed again.",
    ]


def test_searches_of_two_machines_are_told_with_what_depends_on_it():
    document = make_comparison(methods=("cw-hawq",), length=20)
    searches = [
        search.model_copy(update={"machine": "fast, 2 CPUs" if search.seed else "slow, 1 CPUs"})
        for search in document.searches
    ]
    document = document.model_copy(update={"searches": searches})
    expected = (
        "Searches ran on different machines (fast, 2 CPUs: 11; slow, 1 CPUs: 1), which their "
        "core-seconds depend on."
    )
    assert comparison_caveats(document, standings(document)) == [expected]
    assert expected in comparison_text(document)


def test_finalists_of_one_training_have_no_error_of_seeds():
    document = make_comparison(methods=("cw-hawq",), length=20)
    once = [f.model_copy(update={"by_seed": [f.score]}) for f in document.finalists]
    document = document.model_copy(update={"finalists": once})
    assert comparison_caveats(document, standings(document))[0].startswith(
        "Finalists were trained with one seed: another would move accuracy too"
    )


def test_a_curve_is_the_median_of_the_best_so_far():
    found = standings(make_comparison(methods=("tpe",), num_seeds=3))[-1]
    curve = evaluation_curve(found)
    each = [best_so_far([e.score for e in s.evaluations], 120) for s in found.searches]
    np.testing.assert_array_equal(curve.best.median, np.median(each, axis=0))
    assert curve.x.tolist() == list(range(1, 121))


def test_by_price_a_curve_ends_where_its_searches_do():
    found = standings(make_comparison(methods=("cw-hawq",), num_seeds=3))[-1]
    curve = cost_curve(found)
    assert curve.x[0] == 214 + 31
    assert curve.x[-1] == 214 + 31 * 120
    assert curve.best.median[-1] == found.median


def test_the_hessians_line_begins_at_its_price():
    document = make_comparison(**SMALL)
    figure = by_cost(standings(document), SCALE, looks_of(document))
    lines = {trace.meta: trace for trace in figure.data if trace.fill != "toself"}
    assert lines["channel"].x[0] == 214.4
    assert lines["uniform"].x[0] == pytest.approx(10 ** figure.layout.xaxis.range[0])
    assert lines["channel"].y == pytest.approx([100 * (LEVEL["3 bits"] + 0.002)] * 2)


def test_the_axis_shows_every_end_of_a_search():
    document = make_comparison()
    for draw in (by_evaluations, by_cost):
        figure = draw(standings(document), SCALE, looks_of(document))
        low, high = figure.layout.yaxis.range
        ends = [trace.y[-1] for trace in figure.data if trace.fill != "toself"]
        assert low < min(ends) <= max(ends) < high
        assert high - low < 2 * (max(ends) - min(ends))


def test_finalists_are_sorted_with_the_best_on_top():
    document = make_comparison()
    figure = finalists(standings(document), looks_of(document), "accuracy")
    score = {f.method: f.score for f in document.finalists}
    assert list(figure.layout.yaxis.categoryarray) == sorted(score, key=lambda m: score[m])
    bars = {t.y[0]: t.error_x.array[0] for t in figure.data if t.error_x.array is not None}
    assert bars["tpe"] == pytest.approx(100 * 1.96 * 0.0031)


def test_no_two_methods_look_alike_and_a_warm_start_has_its_twins_colour():
    methods = ["uniform", "hawq-v2", "exact", "channel", "cw-hawq", "haq", "sac", "ppo", "tpe"]
    methods += ["cma-es", "nsga2", "random", "hill-climbing", "warm-cw-hawq", "warm-tpe"]
    found = comparison_looks(methods)
    assert list(found) == methods
    for first, second in combinations(found.values(), 2):
        assert (first.color, first.symbol) != (second.color, second.symbol)
        assert (first.color, first.dash) != (second.color, second.dash)
    assert found["warm-tpe"].color == found["tpe"].color
    assert found["warm-cw-hawq"].color == found["cw-hawq"].color


def test_a_warm_search_without_its_twin_has_a_colour_of_its_own():
    assert len({look.color for look in comparison_looks(["warm-haq", "tpe"]).values()}) == 2


def two_budgets() -> ComparisonDocument:
    """One method at two sizes: a staircase whose areas are plain numbers."""
    document = make_comparison(methods=(), budgets=("3 bits", "4 bits"), finalists=False)
    placed = {
        ("exact", "3 bits"): (100, 0.4),
        ("exact", "4 bits"): (200, 0.9),
        ("uniform", "3 bits"): (100, 0.1),
        ("uniform", "4 bits"): (300, 0.6),
    }
    hessian = [
        choice.model_copy(
            update={
                "chosen": choice.chosen.model_validate(
                    scored("x", placed[key][1], 0.0, placed[key][0])
                )
            }
        )
        for choice in document.hessian
        if (key := (choice.method, choice.budget)) in placed
    ]
    return document.model_copy(update={"hessian": hessian})


def test_the_covered_share_is_that_of_the_staircase():
    """Reference (320, 0.02), ideal (100, 0.9): a rectangle of 220 × 0.88."""
    shares = covered(standings(two_budgets()))
    expected = {
        "exact": (220 * 0.38 + 120 * 0.5) / (220 * 0.88),
        "uniform": (220 * 0.08 + 20 * 0.5) / (220 * 0.88),
    }
    assert {share.method: share.median for share in shares} == pytest.approx(expected)
    assert [share.method for share in shares] == ["exact", "uniform"]
    assert shares_said(shares).startswith("exact covers most of the sizes and scores in reach, 74")


def test_a_method_that_is_not_under_every_budget_has_no_share():
    document = two_budgets()
    document = document.model_copy(update={"hessian": document.hessian[:3]})
    assert len({share.method for share in covered(standings(document))}) == 1
    assert shares_said([]).startswith("No method has found something under every budget")


def test_sentences_beside_the_figures_say_what_the_figures_show():
    found = standings(make_comparison())
    assert evaluations_said(found, SCALE) == (
        "tpe ends highest, at 86.59 % in the median; half of its 12 searches end within 86.52 … "
        "86.62. The first median to reach channel’s 86.30 %, the Hessian’s highest, is "
        "warm-cw-hawq’s, at 26 evaluations."
    )
    assert cost_said(found, SCALE) == (
        "channel’s choice took 214 core-seconds. The first median to reach channel’s 86.30 %, the "
        "Hessian’s highest, is warm-cw-hawq’s, at 1,020 core-seconds."
    )
    assert finalists_said(found) == (
        "tpe’s is highest, 88.35\u00a0±\u00a00.31 %; chance alone would make one of 8 the highest, "
        "too."
    )


def test_a_level_that_no_search_reaches_is_said_to_be_out_of_reach():
    found = standings(make_comparison(methods=("random",)))
    assert cost_said(found, SCALE).endswith(
        "No search’s median reaches channel’s 86.30 %, the Hessian’s highest."
    )


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_figure_and_needs_no_sideways_scrolling(tmp_path):
    document = make_comparison(budgets=("3 bits", "4 bits"), length=40, num_seeds=3)
    width = "`${document.documentElement.scrollWidth} of ${innerWidth}`"
    html = f"{render_comparison(document)}<script>document.title = {width}</script>"
    (tmp_path / "comparison.html").write_text(html, encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --disable-sync --no-first-run "
        "--disable-background-networking --disable-component-update --hide-scrollbars "
        "--window-size=500,900 --virtual-time-budget=8000 --dump-dom"
    )
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command.append((tmp_path / "comparison.html").as_uri())
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>500 of 500</title>" in dom
    assert dom.count(" svg-container") == 8
