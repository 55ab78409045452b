"""The report: what it says, what it warns of, and that it needs nothing but itself."""

import json
import random
import re
import shutil
import subprocess
from hashlib import sha256
from html.parser import HTMLParser
from itertools import combinations
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from test_trace_page import make_eigenvalues, with_block

from search.artefacts import (
    BudgetLimit,
    Candidate,
    CandidatesArtefact,
    CurvatureArtefact,
    Difference,
    EpochRecord,
    FrontPoints,
    ModelArtefact,
    Score,
    SeededTrial,
    StageCost,
    Summary,
    TablesArtefact,
    TrialsArtefact,
)
from search.artefacts import (
    TestArtefact as Scored,
)
from search.errors import InputError
from search.quantities import duration, moment, percent, plus_minus, points, significant
from search.report import render, render_eigenvalues, rewrite_report, write_report
from search.report.bits_map import bits_map
from search.report.caveats import caveats
from search.report.figures import (
    MAX_FRONT_POINTS,
    accuracy_by_size,
    fronts,
    training_curves,
)
from search.report.findings import searched, verdicts
from search.report.palette import looks
from search.report.trace_figure import traces

SECTION = "Top eigenvalues and the loss around them"
WIDTHS = [2, 3, 4, 6, 8]
LAYERS = [
    "conv1",
    *(
        f"layer{stage}.{block}.conv{conv}"
        for stage in (1, 2, 3)
        for block in (0, 1, 2)
        for conv in (1, 2)
    ),
    "linear",
]


def make_summary(
    layers: list[str] = LAYERS,
    methods: tuple[str, ...] = ("uniform", "hawq-v2", "exact"),
    budgets: tuple[int, ...] = (3, 4),
    name: str = "resnet20-cifar10",
) -> Summary:
    """Make up a whole run; at 4 bits, ``exact`` chooses what ``hawq-v2`` chose."""
    draw = random.Random(0)
    sizes = [max(144, 36864 * (i + 1) // len(layers)) for i in range(len(layers))]
    total = sum(sizes)
    omega = [[4.0 ** (3 - b) * 5 * 0.8**i for b in WIDTHS] for i in range(len(layers))]
    limits = [
        BudgetLimit(label=f"{bits} bits", limits={"weight_bits": bits * total}) for bits in budgets
    ]
    candidates, trials, scores = [], [], {}
    for limit, bits in zip(limits, budgets, strict=True):
        for m, method in enumerate(methods):
            is_twin = method == "exact" and bits == 4 and "hawq-v2" in methods
            owner = "hawq-v2" if is_twin else method
            digest = sha256(f"{owner} {bits}".encode()).hexdigest()[:16]
            chosen = {f"w:{layer}": bits for layer in layers}
            if owner != "uniform" and len(layers) > 1:
                chosen[f"w:{layers[0]}"], chosen[f"w:{layers[-1]}"] = 8, 2
                chosen[f"w:{layers[len(layers) // 2]}"] = 6 if owner == "hawq-v2" else 2
            size = sum(b * n for b, n in zip(chosen.values(), sizes, strict=True))
            size = min(size, limit.limits["weight_bits"])
            drop = {3: 0.031, 4: 0.009}.get(bits, 0.05) - (0.014 if owner != "uniform" else 0)
            drop -= 0.0007 * (0 if is_twin else m)
            omega_of_all = 2.1 / 4**bits * (1.6 if owner == "uniform" else 0.9**m)
            candidates.append(
                Candidate(
                    method=method,
                    budget=limit.label,
                    digest=digest,
                    bits=chosen,
                    costs={"weight_bits": size, "stored_bits": size + 16 * 16 * len(layers)},
                    average_bits=size / total,
                    compression=32 * total / size,
                    activation_average_bits=None,
                    activation_compression=None,
                    sensitivity=omega_of_all,
                    bound=omega_of_all if method == "exact" else None,
                    evaluations=0,
                    seconds=0.0021 * (m + 1),
                )
            )
            if is_twin:
                continue
            epochs = [
                EpochRecord(
                    epoch=e,
                    loss=None if e == 0 else 0.4 / e,
                    search_score=0.93 - drop - 0.2 * 0.45**e / bits * 3 + draw.gauss(0, 0.002),
                    seconds=0.0 if e == 0 else 21.0,
                )
                for e in range(9)
            ]
            trials.append(
                SeededTrial(
                    digest=digest,
                    folder=digest,
                    seed=17,
                    status="finished",
                    reason="",
                    epochs=epochs,
                    seconds=168.4,
                    cpu_seconds=168.4,
                )
            )
            scores[digest] = Score(
                score=0.9173 - drop,
                standard_error=0.0028,
                drop=drop,
                drop_standard_error=0.0017,
                seeds=[17],
                seed_scores=[0.9173 - drop],
                digests=[digest],
            )
    trace = [3.0e2 * 0.75**i * draw.uniform(0.4, 2.5) for i in range(len(layers))]
    return Summary(
        name=name,
        seed=17,
        finished="2025-03-04T05:06:07Z",
        machine={"cpu": "8 cores, AVX-512", "memory": "31 GiB", "platform": "Linux"},
        versions={"python": "3.11.9", "torch": "2.11.0", "hawq-search": "0.1.0"},
        config={"name": name, "menu": WIDTHS, "budgets": [{"average_bits": b} for b in budgets]},
        model=ModelArtefact(
            weights_sha256="ab" * 32,
            num_parameters=total + 1376,
            num_quantizable=total,
            source="checkpoint",
            train_size=45000,
            search_size=5000,
            search_seen=False,
            score_name="accuracy",
            search_score=0.9264,
        ),
        curvature=CurvatureArtefact(
            estimator="gauss_newton",
            reason="The network is piecewise linear in each weight, so the two agree.",
            layers=layers,
            num_elements=sizes,
            trace=trace,
            probe_error=[0.012 * t for t in trace],
            data_error=[draw.uniform(0.03, 0.3) * t for t in trace],
            share_error=[0.05 * t / sum(trace) for t in trace],
            num_probes=48,
            pool_size=None,
            num_examples=1024,
            rtol=0.02,
            converged=True,
            num_negative=0,
        ),
        tables=TablesArtefact(
            space=[
                {"name": f"w:{layer}", "num_elements": n, "macs": n, "menu": WIDTHS, "tie": None}
                for layer, n in zip(layers, sizes, strict=True)
            ],
            space_fingerprint="0123456789abcdef",
            widths=WIDTHS,
            sensitivity=[list(row) for row in omega],
            squared_error=omega,
            trace=trace,
            trace_error=[0.1 * t for t in trace],
            num_scales=[16] * len(layers),
            operations=[],
            alive=[],
        ),
        candidates=CandidatesArtefact(
            budgets=limits,
            fronts=[
                FrontPoints(
                    method=method,
                    bits=[round(total * (2 + 6 * i / 60)) for i in range(61)],
                    sensitivity=[2.1 / 4 ** (2 + 6 * i / 60) * 0.9**k for i in range(61)],
                )
                for k, method in enumerate(methods)
                if method != "uniform"
            ],
            candidates=candidates,
        ),
        trials=TrialsArtefact(trials=trials),
        test=Scored(
            num_examples=10000,
            unquantized=Score(
                score=0.9173, standard_error=0.00275, drop=0.0, drop_standard_error=0.0
            ),
            scores=scores,
            differences=differences(scores),
        ),
        stages=[
            StageCost(stage=stage, seconds=seconds, cpu_seconds=7.6 * seconds)
            for stage, seconds in (
                ("model", 3.2),
                ("curvature", 214.0),
                ("tables", 1.1),
                ("candidates", 0.41),
                ("trials", 3790.0),
                ("test", 35.0),
            )
        ],
    )


def changed(summary: Summary, **sections: dict[str, Any]) -> Summary:
    """Copy a summary with some keys of some of its artefacts replaced."""
    document = summary.model_dump(mode="json")
    for section, values in sections.items():
        document[section] |= values
    return Summary.model_validate(document)


def with_trial(summary: Summary, method: str, **values: Any) -> Summary:
    """Copy a summary with one trial changed, and without its test score unless it finished."""
    digest = next(c.digest for c in summary.candidates.candidates if c.method == method)
    trials = [
        trial.model_dump() | (values if trial.digest == digest else {})
        for trial in summary.trials.trials
    ]
    scores = summary.model_dump()["test"]["scores"]
    if values.get("status", "finished") != "finished":
        del scores[digest]
    return changed(summary, trials={"trials": trials}, test={"scores": scores})


def with_scores(summary: Summary, drops: dict[str, tuple[float, float]]) -> Summary:
    """Copy a summary with each method's drop and its error set, whatever the budget."""
    full = summary.test.unquantized.score
    scores = {}
    for candidate in summary.candidates.candidates:
        drop, error = drops[candidate.method]
        scores[candidate.digest] = {
            "score": full - drop,
            "standard_error": 10 * error,
            "drop": drop,
            "drop_standard_error": error,
        }
    found = {digest: Score.model_validate(score) for digest, score in scores.items()}
    return changed(
        summary,
        test={"scores": scores, "differences": [d.model_dump() for d in differences(found)]},
    )


def differences(scores: dict[str, Score]) -> list[Difference]:
    """Pair all scores; the error of a pair is the sum of both drops' errors."""
    return [
        Difference(
            first=first,
            second=second,
            difference=scores[first].score - scores[second].score,
            standard_error=scores[first].drop_standard_error + scores[second].drop_standard_error,
        )
        for first, second in combinations(scores, 2)
    ]


class Page(HTMLParser):
    """A page's elements with their attributes, the rows of its results, and text by element."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.text: dict[str, str] = {}
        self._open: list[str] = []
        self._is_results = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "section" and "id" in dict(attrs):
            self._is_results = dict(attrs)["id"] == "results"
        if not self._is_results:
            return
        if tag == "tr":
            self.rows.append([])
        elif tag in {"th", "td"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        self.text[tag] = self.text.get(tag, "") + data
        if self._is_results and {"th", "td"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, start: str, nth: int = 0) -> list[str]:
        """Return the nth table row that begins with this name, its cells' spaces tidied."""
        rows = [[" ".join(cell.split()) for cell in row] for row in self.rows if row]
        return [row for row in rows if row[0].split(" ")[0] == start][nth]

    def classes(self, name: str) -> int:
        """Count the elements of a class."""
        return sum(name in (attrs.get("class") or "").split() for _, attrs in self.elements)


def test_the_page_loads_nothing_from_anywhere():
    html = render(make_summary())
    page = Page(html)
    loading = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
    assert not [(tag, attrs) for tag, attrs in page.elements if loading & attrs.keys()]
    assert "@import" not in page.text["style"]
    assert "url(" not in page.text["style"]
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_plotly_is_embedded_once():
    html = render(make_summary())
    assert html.count(get_plotlyjs()) == 1
    assert len(html) < len(get_plotlyjs()) + 400_000


def test_equal_summaries_give_equal_pages():
    assert render(make_summary()) == render(make_summary())


def test_every_number_of_every_candidate_is_in_its_row():
    summary = make_summary()
    page = Page(render(summary))
    for nth, label in enumerate(("3 bits", "4 bits")):
        for candidate in summary.candidates.candidates:
            if candidate.budget != label:
                continue
            row = page.row(candidate.method, nth)
            score = summary.test.scores[candidate.digest]
            trial = next(t for t in summary.trials.trials if t.digest == candidate.digest)
            assert row[1:] == [
                significant(candidate.weight_bits / 8 / 2**20),
                significant(candidate.costs["stored_bits"] / 8 / 2**20),
                f"{candidate.compression:.2f}",
                f"{candidate.average_bits:.2f}",
                significant(candidate.sensitivity),
                "optimal" if candidate.method == "exact" else "—",
                percent(trial.epochs[-1].search_score),
                f"{percent(score.score)} ± 0.28",
                f"{points(score.drop)} ± 0.17",
                "1",
                significant(candidate.seconds),
                candidate.digest[:8],
            ]


def test_the_unquantized_network_is_the_first_row():
    row = Page(render(make_summary())).row("unquantized")
    size = significant(make_summary().model.num_quantizable * 4 / 2**20)
    assert row[1:9] == [size, size, "1.00", "32.00", "—", "—", "92.64", "91.73 ± 0.27"]


def test_names_cannot_break_out_of_the_page():
    evil = "<script>alert(1)</script><b>%{x}&amp;"
    summary = make_summary(layers=["conv1", evil], methods=("uniform", evil), name=evil)
    document = summary.model_dump(mode="json")
    document["config"][evil] = document["machine"][evil] = document["model"]["score_name"] = evil
    document["curvature"]["reason"] = evil
    for budget in document["candidates"]["budgets"]:
        budget["label"] += evil
    for candidate in document["candidates"]["candidates"]:
        candidate["budget"] += evil
    summary = with_trial(Summary.model_validate(document), "uniform", status="failed", reason=evil)
    found = with_block(make_eigenvalues(), 0, block=evil, converged=False)
    found.surfaces[0] = found.surfaces[0].model_copy(update={"block": evil})
    html = render(summary, found)
    page = Page(html)
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert "<script>alert" not in html
    assert "alert(1)</script>" not in html
    assert not [tag for tag, _ in page.elements if tag == "b"]
    assert evil in page.text["h1"]
    assert page.row(evil)[0] == evil


def test_plotly_reads_no_markup_in_names():
    summary = make_summary(layers=["conv1", "<b>x"], methods=("uniform", "<i>y"))
    figures = [accuracy_by_size(summary), fronts(summary.candidates), traces(summary.curvature)]
    figures += training_curves(summary).values()
    for figure in figures:
        for trace in figure.data:
            shown = [trace.name, trace.hovertemplate, *(trace.text or ()), *trace.x]
            assert not [
                text for text in shown if isinstance(text, str) and re.search("<[ib]>", text)
            ]


def test_equal_allocations_are_said_to_be_the_same():
    page = Page(render(make_summary()))
    assert page.row("hawq-v2", 1)[0] == "hawq-v2 highest same as exact"
    assert page.row("exact", 1)[0] == "exact highest same as hawq-v2"
    assert "same" not in page.row("exact", 0)[0]


def test_an_allocation_found_under_two_budgets_names_the_other_one():
    summary = make_summary()
    candidates = summary.model_dump()["candidates"]["candidates"]
    candidates[3] |= {"digest": candidates[1]["digest"]}
    page = Page(render(changed(summary, candidates={"candidates": candidates})))
    assert page.row("hawq-v2")[0] == "hawq-v2 same as uniform at 4 bits"


def test_the_highest_test_score_is_marked_once_a_budget():
    page = Page(render(make_summary(methods=("uniform", "hawq-v2"))))
    assert ["highest" in page.row("hawq-v2", nth)[0] for nth in (0, 1)] == [True, True]
    assert ["highest" in page.row("uniform", nth)[0] for nth in (0, 1)] == [False, False]


def test_nothing_is_highest_where_there_is_nothing_to_compare():
    assert "highest</span>" not in render(make_summary(methods=("uniform",)))
    twins = make_summary(methods=("hawq-v2", "exact"), budgets=(4,))
    assert "highest</span>" not in render(twins)


def test_a_failed_trial_is_named_with_its_reason_and_keeps_its_row():
    summary = with_trial(make_summary(), "exact", status="failed", reason="out of memory")
    assert caveats(summary) == ["Fine-tuning failed: exact, 3 bits: out of memory"]
    row = Page(render(summary)).row("exact")
    assert row[7].startswith("failed ")
    assert row[8:10] == ["—", "—"]


def test_a_trial_that_failed_at_once_has_no_score():
    summary = with_trial(make_summary(), "exact", status="failed", reason="x", epochs=[])
    assert Page(render(summary)).row("exact")[7] == "failed —"
    assert len(training_curves(summary)["3 bits"].data) == 2


def test_a_clean_run_has_no_caveats():
    assert caveats(make_summary()) == []
    assert Page(render(make_summary())).classes("caveats") == 0


def over_budget(summary: Summary) -> Summary:
    limits = [b.model_dump() for b in summary.candidates.budgets]
    limits[0]["limits"]["weight_bits"] = summary.candidates.candidates[0].weight_bits - 1
    others = [c for c in summary.candidates.candidates if c.method != "hawq-v2"]
    return changed(summary, candidates={"budgets": limits, "candidates": [others[0], *others[2:]]})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda s: changed(s, model={"search_seen": True}),
            ["The network was trained on the search split"],
        ),
        (
            lambda s: changed(
                s,
                curvature={
                    "converged": False,
                    "probe_error": [s.curvature.trace[0], *s.curvature.probe_error[1:]],
                },
            ),
            ["The traces had not converged after 48 probes: 1 layer (conv1) has"],
        ),
        (
            lambda s: changed(
                s, curvature={"num_negative": 1, "trace": [*s.curvature.trace[:-1], -0.5]}
            ),
            ["1 of 20 traces is negative (linear) and counts as zero"],
        ),
        (
            lambda s: with_trial(s, "uniform", status="stopped", reason="too slow"),
            ["Fine-tuning stopped: uniform, 3 bits: too slow"],
        ),
        (
            lambda s: with_trial(s, "uniform", status="failed", reason=""),
            ["Fine-tuning failed: uniform, 3 bits: no reason recorded"],
        ),
        (
            lambda s: changed(s, trials={"trials": s.model_dump()["trials"]["trials"][1:]}),
            ["Not fine-tuned: uniform, 3 bits."],
        ),
        (
            lambda s: changed(s, test={"scores": dict(list(s.test.scores.items())[1:])}),
            ["Not scored on the test split: uniform, 3 bits."],
        ),
        (
            over_budget,
            ["No candidate: exact, 3 bits.", "Over budget: uniform, 3 bits: weight_bits "],
        ),
    ],
)
def test_each_caveat_appears_exactly_when_it_should(change, expected):
    summary = change(make_summary())
    found = caveats(summary)
    assert len(found) == len(expected)
    for caveat, start in zip(found, expected, strict=True):
        assert caveat.startswith(start)
    assert Page(render(summary)).text["li"].count(expected[0]) == 1


def figures_of(html: str) -> dict[str, Any]:
    [found] = re.findall(r"const figures = (\{.*\});\n", html)
    return json.loads(found)


def test_eigenvalues_of_the_searched_weights_are_shown_as_on_their_own_page():
    found = make_eigenvalues()
    html = render(make_summary(), found)
    page, ours = Page(html), figures_of(html)
    theirs = figures_of(render_eigenvalues(found))
    assert SECTION in page.text["h2"]
    assert page.classes("caveats") == 0
    shown = ("eigenvalues-figure", "surface-figure-0", "surface-figure-1")
    assert page.classes("figure") == 3 + 2 + len(shown)
    for name in shown:
        assert ours[name] == theirs[name]
    assert "block2" in page.text["h3"]
    assert "for 3 blocks, by power iteration on 256 examples" in page.text["p"]


def test_a_report_without_eigenvalues_does_not_speak_of_them():
    html = render(make_summary())
    assert "eigenvalue" not in html.replace(get_plotlyjs(), "")


def test_eigenvalues_without_surfaces_are_shown_alone():
    page = Page(render(make_summary(), make_eigenvalues(1, surfaces=[])))
    assert SECTION in page.text["h2"]
    assert "Along the two top eigenvectors" not in page.text["p"]


def test_eigenvalues_of_other_weights_are_left_out_and_the_report_says_so():
    page = Page(render(make_summary(), make_eigenvalues(weights_sha256="cd" * 32)))
    assert SECTION not in page.text["h2"]
    assert "are of other weights (cdcdcdcdcdcd) than the searched (abababababab)" in page.text["li"]


def test_an_iteration_that_did_not_converge_is_a_caveat_of_the_report():
    found = with_block(make_eigenvalues(), 1, converged=False, residual=7.0)
    [caveat] = caveats(make_summary(), found)  # without that of an order, which is not shown
    assert caveat.startswith("The power iteration of 1 of 3 blocks (block1) had not converged")
    assert caveat in Page(render(make_summary(), found)).text["li"]


def test_a_finished_runs_report_is_written_again_with_the_eigenvalues_in_its_folder(tmp_path):
    assert rewrite_report(tmp_path) is None
    assert not list(tmp_path.iterdir())
    summary = make_summary()
    (tmp_path / "summary.json").write_text(summary.model_dump_json())
    assert write_report(tmp_path, summary) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text() == render(summary)
    found = make_eigenvalues()
    (tmp_path / "eigenvalues.json").write_text(found.model_dump_json())
    assert rewrite_report(tmp_path) == tmp_path / "report.html"
    assert (tmp_path / "report.html").read_text() == render(summary, found)


def test_a_summary_of_another_version_leaves_the_report_as_it_is(tmp_path):
    (tmp_path / "summary.json").write_text("{}")
    assert rewrite_report(tmp_path) is None


@pytest.mark.parametrize(("text", "form"), [("{}", "name"), ("{", "it")])
def test_a_document_that_is_none_is_told_in_a_line(tmp_path, text, form):
    (tmp_path / "eigenvalues.json").write_text(text)
    with pytest.raises(
        InputError, match=f"got another form of {form} .*: delete it, or run that again"
    ):
        write_report(tmp_path, make_summary())


def test_a_difference_beyond_twice_its_error_is_called_outside_it():
    summary = make_summary(methods=("uniform", "hawq-v2"), budgets=(3,))
    # The error of the paired difference is 0.010 here: twice is 0.020.
    drops = {"uniform": (0.0501, 0.006), "hawq-v2": (0.03, 0.004)}
    assert "outside the error" in verdicts(with_scores(summary, drops))[0].difference


def test_a_difference_that_may_be_chance_is_called_inside_the_error():
    summary = make_summary(methods=("uniform", "hawq-v2"), budgets=(3,))
    drops = {"uniform": (0.0499, 0.006), "hawq-v2": (0.03, 0.004)}
    [verdict] = verdicts(with_scores(summary, drops))
    assert "+1.99 ± 1.00 points, is inside the error" in verdict.difference


def test_no_error_and_no_difference_is_not_a_finding():
    summary = make_summary(methods=("uniform", "hawq-v2"), budgets=(3,))
    drops = {"uniform": (0.0, 0.0), "hawq-v2": (0.0, 0.0)}
    [verdict] = verdicts(with_scores(summary, drops))
    assert "0.00 ± 0.00 points, is inside the error" in verdict.difference


def test_the_search_split_and_not_the_test_split_chooses_what_is_compared():
    summary = make_summary(budgets=(3,))
    drops = {"uniform": (0.05, 0.001), "hawq-v2": (0.04, 0.001), "exact": (0.01, 0.001)}
    summary = with_scores(summary, drops)
    for leader in ("hawq-v2", "exact"):
        epochs = [{"epoch": 0, "loss": None, "search_score": 0.99, "seconds": 0.0}]
        [verdict] = verdicts(with_trial(summary, leader, epochs=epochs))
        assert verdict.scores.startswith(f"On the test split: {leader} ")
        assert "; uniform 86.73 ± 1.00 %" in verdict.scores.replace("\u00a0", " ")


def test_without_uniform_the_runner_up_is_compared():
    summary = make_summary(methods=("hawq-v2", "tpe"), budgets=(3,))
    [verdict] = verdicts(summary)
    assert "hawq-v2" in verdict.scores
    assert "tpe" in verdict.scores


def test_one_allocation_chosen_by_all_is_said_to_be():
    [verdict] = verdicts(make_summary(methods=("hawq-v2", "exact"), budgets=(4,)))
    assert verdict.scores.startswith("On the test split: hawq-v2 = exact ")
    assert verdict.difference == "Every method chose this same allocation."


def test_a_budget_without_any_test_score_says_so():
    [verdict] = verdicts(changed(make_summary(budgets=(3,)), test={"scores": {}}))
    assert verdict.scores.startswith("No candidate has a test score")
    assert verdict.difference == ""


def test_the_subject_is_counted_in_words():
    text = searched(make_summary(layers=["fc"], methods=("exact",), budgets=(4,)))
    assert "1 layer (" in text
    assert "1 method under 1 budget." in text
    assert "Activations" not in text


@pytest.mark.parametrize(("bits", "words"), [(4, "have 4 bits"), (None, "stay in floating point")])
def test_the_activations_width_is_told(bits, words):
    summary = changed(make_summary(), config={"activations": {"bits": bits}})
    assert f"Activations {words}." in searched(summary)


def test_a_method_looks_the_same_in_every_figure():
    summary = make_summary(methods=("uniform", "hawq-v2", "exact", "tpe"))
    expected = {
        method: look.color for method, look in looks(["uniform", "hawq-v2", "exact", "tpe"]).items()
    }
    drawn = [*accuracy_by_size(summary).data, *fronts(summary.candidates).data]
    drawn += [trace for figure in training_curves(summary).values() for trace in figure.data]
    assert {trace.meta for trace in drawn} == set(expected)
    for trace in drawn:
        assert trace.line.color in {None, expected[trace.meta]}
        assert trace.marker.color in {None, expected[trace.meta]}


def test_many_methods_look_different():
    made = looks([f"method {i}" for i in range(28)])
    assert len({(look.color, look.dash) for look in made.values()}) == 28
    assert all(look.path for look in made.values())


def test_every_axis_has_a_title():
    summary = make_summary()
    figures = [accuracy_by_size(summary), fronts(summary.candidates), traces(summary.curvature)]
    for figure in [*figures, *training_curves(summary).values()]:
        assert figure.layout.xaxis.title.text
        assert figure.layout.yaxis.title.text


def test_test_scores_are_drawn_with_their_standard_errors():
    summary = make_summary(methods=("uniform",))
    [trace] = accuracy_by_size(summary).data
    scores = [summary.test.scores[c.digest] for c in summary.candidates.candidates]
    assert list(trace.y) == pytest.approx([100 * s.score for s in scores])
    assert list(trace.error_y.array) == pytest.approx([0.28, 0.28])


def test_an_allocation_that_two_methods_share_shows_both_markers():
    data = {trace.meta: trace for trace in accuracy_by_size(make_summary()).data}
    assert data["hawq-v2"].x[1] == data["exact"].x[1]
    assert data["hawq-v2"].marker.size[1] > data["exact"].marker.size[1]
    assert data["hawq-v2"].marker.size[0] == data["exact"].marker.size[0]


def test_a_shared_trial_is_one_curve():
    curves = training_curves(make_summary())
    assert [len(curves[label].data) for label in ("3 bits", "4 bits")] == [3, 2]


def test_a_trial_that_did_not_finish_ends_in_a_cross():
    summary = with_trial(make_summary(), "exact", status="stopped", reason="slow")
    symbols = {t.meta: t.marker.symbol for t in training_curves(summary)["3 bits"].data}
    assert symbols["exact"][-1] == "x-thin"
    assert "x-thin" not in {*symbols["exact"][:-1], *symbols["uniform"]}


def test_a_trace_below_zero_is_drawn_at_the_foot_and_said_to_be():
    summary = make_summary()
    values = [*summary.curvature.trace[:-1], -3.0]
    figure = traces(changed(summary, curvature={"trace": values}).curvature)
    by_name = {trace.name: trace for trace in figure.data}
    foot = by_name["zero or negative: below this axis"]
    assert list(foot.x) == ["linear"]
    assert "average trace −" in foot.text[0]
    assert "linear" not in by_name["average trace"].x
    assert foot.y[0] < min(by_name["average trace"].y)


def test_traces_above_zero_have_no_foot():
    names = {trace.name for trace in traces(make_summary().curvature).data}
    assert "zero or negative: below this axis" not in names


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_traces_may_all_be_below_zero(value):
    curvature = make_summary(layers=["a", "b"]).curvature
    figure = traces(curvature.model_copy(update={"trace": [value, value]}))
    low, high = figure.layout.yaxis.range
    assert low < high


def test_error_bars_end_where_the_errors_say():
    curvature = make_summary(layers=["a"]).curvature.model_copy(
        update={"num_elements": [2], "trace": [20.0], "probe_error": [6.0], "data_error": [8.0]}
    )
    both, probe, _ = traces(curvature).data
    assert list(probe.y[:2]) == [7.0, 13.0]
    assert list(both.y[:2]) == [5.0, 15.0]
    assert both.line.width < probe.line.width


def test_an_error_larger_than_the_trace_reaches_below_the_axis():
    curvature = make_summary(layers=["a"]).curvature.model_copy(
        update={"num_elements": [1], "trace": [1.0], "probe_error": [5.0], "data_error": [0.0]}
    )
    figure = traces(curvature)
    assert 0 < figure.data[1].y[0] < 10 ** figure.layout.yaxis.range[0]


def test_a_long_front_is_thinned_but_keeps_its_least_sensitivity():
    summary = make_summary(methods=("exact",))
    points = 10 * MAX_FRONT_POINTS + 7
    front = {
        "method": "exact",
        "bits": list(range(1, points + 1)),
        "sensitivity": [1 / (i + 1) for i in range(points)],
    }
    summary = changed(summary, candidates={"fronts": [front]})
    drawn = fronts(summary.candidates).data[0]
    assert len(drawn.x) <= MAX_FRONT_POINTS
    assert drawn.y[-1] == 1 / points
    assert list(drawn.x) == sorted(drawn.x)
    assert "thinned to at most 1,000 points" in render(summary)
    assert "thinned" not in Page(render(make_summary())).text["p"]


def test_points_that_a_logarithm_cannot_show_are_counted():
    summary = make_summary(methods=("exact",))
    front = summary.model_dump()["candidates"]["fronts"][0]
    front["sensitivity"][-1] = 0.0
    summary = changed(summary, candidates={"fronts": [front]})
    assert 0.0 not in fronts(summary.candidates).data[0].y
    assert "zero: 1 point with Ω = 0." in render(summary)
    assert "Not drawn" not in render(make_summary())


def test_the_map_shows_each_layers_bits_and_share():
    summary = make_summary()
    found = bits_map(summary)
    assert [column.name for column in found.columns] == LAYERS
    assert found.columns[0].share == "<1"
    assert found.columns[-1].share == "10"
    label, rows = found.groups[0]
    assert label == "3 bits"
    assert [cell.text for cell in rows[1].cells] == ["8", *"3" * 9, "6", *"3" * 8, "2"]


def test_the_map_joins_channels_and_marks_pins():
    summary = make_summary(layers=["a", "b"], methods=("cw",), budgets=(4,))
    candidate = summary.model_dump()["candidates"]["candidates"][0]
    candidate["bits"] = {"w:a[0]": 8, "w:a[1]": 3, "w:b": 2}
    space = summary.model_dump()["tables"]["space"]
    space[1]["menu"] = [2]
    summary = changed(summary, candidates={"candidates": [candidate]}, tables={"space": space})
    found = bits_map(summary)
    assert [cell.text for cell in found.groups[0][1][0].cells] == ["5.5", "2"]
    assert [column.is_pinned for column in found.columns] == [False, True]
    assert Page(render(summary)).classes("pinned") == 1


def test_scored_allocations_are_told_where_a_method_scored_several():
    summary = make_summary()
    assert "Scored" not in Page(render(summary)).text["th"]
    candidates = summary.model_dump()["candidates"]["candidates"]
    candidates[0]["evaluations"] = 1500
    page = Page(render(changed(summary, candidates={"candidates": candidates})))
    assert page.row("uniform")[12] == "1,500"


@pytest.mark.parametrize(
    "summary",
    [
        make_summary(layers=["fc"], methods=("exact",), budgets=(4,)),
        make_summary(layers=[f"backbone.layer{i}.conv" for i in range(60)]),
        make_summary(methods=tuple(f"method {i}" for i in range(15))),
    ],
    ids=["one layer", "sixty layers", "fifteen methods"],
)
def test_small_and_large_runs_render(summary):
    page = Page(render(summary))
    assert page.classes("figure") == 3 + len(summary.candidates.budgets)
    assert page.classes("layer") == len(summary.curvature.layers) + 1


def test_the_resolved_config_is_in_the_page_as_yaml():
    assert "menu:\n- 2\n- 3\n" in Page(render(make_summary())).text["pre"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (percent(0.91234), "91.23"),
        (points(0.012), "+1.20"),
        (points(-0.012), "−1.20"),
        (points(-0.00001), "0.00"),
        (plus_minus("91.23", 0.0), "91.23\u00a0±\u00a00.00"),
        (significant(0), "0"),
        (significant(0.01953), "0.0195"),
        (significant(9.999), "10.0"),
        (significant(1234.5), "1,230"),
        (significant(-2.5), "−2.50"),
        (significant(4.2e-7), "4.2e−7"),
        (significant(3.0e12), "3e12"),
        (duration(0.31), "0.310 s"),
        (duration(99.7), "1 min 40 s"),
        (duration(3599.8), "1 h 00 min"),
        (moment("2025-03-04T05:06:07Z"), "2025-03-04 05:06 UTC"),
    ],
)
def test_quantities_are_written_for_people(written, expected):
    assert written == expected


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize(("found", "num"), [(None, 5), (make_eigenvalues(), 8)])
def test_a_browser_draws_every_figure_and_needs_no_sideways_scrolling(tmp_path, found, num):
    width = "`${document.documentElement.scrollWidth} of ${innerWidth}`"
    html = f"{render(make_summary(), found)}<script>document.title = {width}</script>"
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
    assert dom.count(" svg-container") == num
