"""A whole comparison on handwritten digits: run, kept, gone on with, and refused."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from test_pipeline import TINY as BASE

from search.cli import main
from search.commands.compare import compare
from search.comparison.file import is_comparison, read_comparison
from search.comparison.making import compared
from search.config_file import load_config
from search.errors import InputError
from search.events import read_events
from search.machine import machine, machine_line
from search.results.setting import placeless

pytestmark = pytest.mark.ray

TINY = BASE | {
    "methods": ["uniform", "exact", "channel", "random", "hill-climbing-layers", "cw-hawq"],
    "searches": {"evaluations": 5, "examples": 50},
    "comparison": {"seeds": 2, "agreement": 2, "agreement_epochs": 1},
    "finetune": {"epochs": 1, "batch_size": 64, "lr": 0.02, "examples_per_epoch": 256},
}


def written(folder, **changes):
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY | changes))
    return path


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory):
    """A finished comparison: its folder, and what came of it."""
    folder = tmp_path_factory.mktemp("comparison")
    kept = folder / "tiny.comparison.json"
    return folder, compare(written(folder), folder / "run", kept=kept)


def test_every_method_searches_as_often_and_spends_as_much(finished):
    _, found = finished
    searched = {(search.method, search.seed) for search in found.searches}
    assert searched == {
        (method, seed)
        for method in ("random", "hill-climbing-layers", "cw-hawq")
        for seed in (0, 1)
    }
    assert all(len(search.evaluations) == 5 for search in found.searches)
    assert {search.machine for search in found.searches} == {machine_line(machine())}
    assert all(
        e.seconds > 0 and 0 <= e.score <= 1 for search in found.searches for e in search.evaluations
    )
    assert [choice.method for choice in found.hessian] == ["uniform", "exact", "channel"]
    assert found.num_examples == 50
    assert found.fidelity == "batch_norm"
    assert len(found.agreement) == 2


def test_the_finalist_of_a_method_is_the_best_of_its_searches(finished):
    _, found = finished
    finalists = {finalist.method: finalist for finalist in found.finalists}
    assert list(finalists) == TINY["methods"]
    for method in ("random", "hill-climbing-layers", "cw-hawq"):
        mine = [search for search in found.searches if search.method == method]
        best = max(mine, key=lambda search: search.best.score)
        assert finalists[method].digest == best.best.digest
        assert finalists[method].search_seed == best.seed
    assert len(found.differences) == 15


def test_what_is_kept_is_what_the_folder_says(finished):
    folder, found = finished
    kept = read_comparison(folder / "tiny.comparison.json")
    assert kept == found
    whole = read_comparison(folder / "run" / "comparison.json")
    assert whole == found.model_copy(update={"finished": whole.finished})
    assert is_comparison(folder / "tiny.comparison.json")
    again = compared(folder / "run", "tiny")
    assert again == found.model_copy(update={"finished": again.finished})
    page = (folder / "run" / "comparison.html").read_text()
    assert all(method in page for method in TINY["methods"])


def test_searches_go_on_from_what_was_kept_alone(finished, tmp_path):
    folder, found = finished
    kept = tmp_path / "tiny.comparison.json"
    shutil.copy(folder / "tiny.comparison.json", kept)
    events = []
    again = compare(written(tmp_path), tmp_path / "run", kept=kept, view=events.append)
    assert again.searches == found.searches
    # A search that scores anew leaves its evaluations behind.
    assert not list((tmp_path / "run" / "searches").glob("*/evaluations.jsonl"))
    assert [f.digest for f in again.finalists] == [f.digest for f in found.finalists]


def test_the_command_prints_the_table_and_the_verdict(finished, monkeypatch, capsys):
    folder, _ = finished
    monkeypatch.setattr(sys, "argv", ["hawq", "results", str(folder / "tiny.comparison.json")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert re.search(r"\| 3 bits \| cw-hawq \| 2 \| 5 \| \d+ \|", shown)
    assert "nothing is concluded" in shown


def test_a_stage_says_what_each_search_found(finished):
    folder, found = finished
    notes = [e.message for e in read_events(folder / "run" / "events.jsonl") if e.kind == "note"]
    search = found.searches[0]
    assert f"{search.method} at 3 bits, seed 0: {search.best.score:.4f}" in notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["exact"]}, "methods: must name one at least that searches, got exact"),
        ({"methods": ["cw-hawk"]}, "did you mean 'cw-hawq'"),
        ({"methods": ["cw-hawq"], "budgets": [{"gbops": 1}]}, "does not add up over channels"),
        ({"searches": {"score": "finetuned"}}, "finetune must be given with score: finetuned"),
        ({"searches": {"evaluations": 0}}, "searches.evaluations"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        compare(written(tmp_path, **changes), tmp_path / "run")


def test_a_menu_of_one_width_is_refused_before_anything_is_scored(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "run", tmp_path / "run")
    for name in ("searches", "candidates", "agreement", "tables"):
        (tmp_path / "run" / f"{name}.json").unlink()
    shutil.rmtree(tmp_path / "run" / "searches")
    path = written(tmp_path, weights={"bits": [3]}, methods=["uniform", "channel", "cw-hawq"])
    with pytest.raises(InputError, match=r"cw-hawq at 3 bits: menu must hold two widths"):
        compare(path, tmp_path / "run", force=True)


def test_kept_comparisons_are_read_and_name_no_place_of_a_machine():
    kept = list((Path(__file__).parents[1] / "configs").rglob("*.comparison.json"))
    assert kept
    for path in kept:
        found = read_comparison(path)
        assert found.config == placeless(found.config)
        assert found.searches


def test_a_file_that_is_no_comparison_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"searches": 3}))
    with pytest.raises(
        InputError, match=r"x\.json: must be .* compare wrote, got another form of name \("
    ):
        read_comparison(path)
    assert not is_comparison(tmp_path / "missing.json")


def test_a_run_without_a_comparison_searches_once(tmp_path):
    config = load_config(written(tmp_path, comparison=None))
    assert config.search_seeds == (0,)
    assert config.searching == ["random", "hill-climbing-layers", "cw-hawq"]
