"""The file of results: rows from pieces merge, and every number comes from the bits in it."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_report import make_summary
from typer.testing import CliRunner

from search.artefacts import Summary
from search.checkout import commits, current_commit, noting_commits
from search.cli import app
from search.commands.results import results_text
from search.config_file import load_config
from search.errors import InputError
from search.events import Event
from search.replicates import Replicates
from search.results.file import packed, read_results, unpacked
from search.results.record import record, typed

NUM = 1003  # no multiple of eight
ROOT = Path(__file__).parents[1]


def correct(method, digest, seed):
    """Make up which images a network gets right: the better the method, the more."""
    level = {"exact": 0.9, "weight-norm": 0.8, "largest-omega": 0.4}.get(method, 0.85)
    rng = np.random.default_rng([seed, int(digest[:6], 16)])
    return (rng.random(NUM) < level + 0.01 * seed).astype(np.float32)


def make_run(folder, methods=("uniform", "exact"), seeds=(0,), seed=0, budgets=(3,), draws=0):
    """Make up a finished run, with its folder."""
    document = make_summary(methods=methods, budgets=budgets).model_dump(mode="json")
    document["config"] |= {
        "seed": seed,
        "budgets": [{"average_bits": b} for b in budgets],
        "methods": list(methods),
        "uniform_draws": draws + 1,
        "trials": {"seeds": list(seeds), "asha": False, "cpus": 1.0},
        "task": {"data": "digits", "root": str(folder), "checkpoint": "x"},
        "activations": {"bits": 4},
    }
    document["test"]["num_examples"] = NUM
    document["machine"]["processor"] = "a processor"
    document["machine"]["cpus"] = "2"
    document["versions"]["torch"] = "2.15.0"
    scores, found = {}, {"unquantized": correct("exact", "ff", 50)}
    trials = {trial["digest"]: trial for trial in document["trials"]["trials"]}
    document["trials"]["trials"] = []
    for candidate in document["candidates"]["candidates"]:
        method, digest = candidate["method"], candidate["digest"]
        if method == "uniform" and draws:
            candidate["draws"] = [
                {key: candidate[key] for key in ("bits", "costs", "sensitivity")}
                | {"digest": f"{d:012x}"}
                for d in range(draws)
            ]
        made = Summary.model_validate(document).candidates.candidates
        mine = next(c for c in made if c.digest == digest)
        done = mine.trainings(seeds)
        found[mine.key] = np.stack([correct(method, d, s) for d, s in done])
        means = [float(row.mean()) for row in found[mine.key]]
        scores[mine.key] = {
            "score": float(np.mean(means)),
            "standard_error": 0.0,
            "drop": 0.0,
            "drop_standard_error": 0.0,
            "seeds": [s for _, s in done],
            "digests": [d for d, _ in done],
            "seed_scores": means,
        }
        document["trials"]["trials"] += [
            trials[digest] | {"digest": d, "seed": s, "seconds": 100.0} for d, s in done
        ]
    document["test"] |= {"scores": scores, "differences": []}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / "test_scores.safetensors")
    return Summary.model_validate(document)


def add_run(path, folder, command="hawq run c.yaml", **how):
    return record(path, folder, make_run(folder, **how), command)


def without_derived(results):
    """Leave out what a later run may say otherwise: nothing but its command."""
    return {row.key: [(t.seed, t.digest, t.scores) for t in row.trainings] for row in results.rows}


def test_bits_come_back_and_other_scores_are_refused():
    scores = np.random.default_rng(0).integers(0, 2, NUM).astype(np.float32)
    text = packed(scores)
    assert len(text) < NUM / 5
    assert (unpacked(text, NUM) == scores).all()
    pseudo_values = np.array([0, 0.5, -1.25])
    assert (unpacked(packed(pseudo_values), 3) == pseudo_values).all()
    with pytest.raises(ValueError, match="must hold 1100 bits in 138 bytes, got 126 bytes"):
        unpacked(text, 1100)


def test_runs_in_pieces_make_the_file_of_the_whole(tmp_path):
    whole = tmp_path / "whole.results.json"
    add_run(whole, tmp_path / "a", seeds=(0, 1))
    pieces = tmp_path / "pieces.results.json"
    add_run(pieces, tmp_path / "b", seeds=(1,), methods=("exact",))
    add_run(pieces, tmp_path / "c", seeds=(0,), methods=("uniform",))
    add_run(pieces, tmp_path / "d", seeds=(0,), methods=("exact",))
    add_run(pieces, tmp_path / "e", seeds=(1,), methods=("uniform",))
    one, other = read_results(whole), read_results(pieces)
    assert one.settings == other.settings
    assert without_derived(one) == without_derived(other)
    assert {r.key: r.found["score"] for r in one.rows} == {
        r.key: r.found["score"] for r in other.rows
    }


def test_the_same_run_twice_is_in_the_file_once(tmp_path):
    path = tmp_path / "x.results.json"
    add_run(path, tmp_path / "a", seeds=(0, 1))
    before = path.read_bytes()
    add_run(path, tmp_path / "a", seeds=(0, 1))
    assert path.read_bytes() == before
    add_run(path, tmp_path / "a", seeds=(0, 1), command="hawq run other.yaml")
    assert len(read_results(path).rows) == 2
    assert {t.command for r in read_results(path).rows for t in r.trainings} == {
        "hawq run other.yaml"
    }
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["x.results.json"]


def test_a_file_from_before_a_key_of_the_config_joins_with_later_runs(tmp_path):
    path = tmp_path / "x.results.json"
    add_run(path, tmp_path / "a", seeds=(0,))
    document = json.loads(path.read_text())
    (setting,) = document["settings"].values()
    del setting["config"]["finetune"]["clip_norm"]
    document["settings"] = {"before": setting}
    for row in document["rows"]:
        row["setting"] = "before"
    path.write_text(json.dumps(document))
    found = add_run(path, tmp_path / "b", seeds=(1,))
    assert len(found.settings) == 1
    assert [len(row.trainings) for row in found.rows] == [2, 2]


def test_places_of_one_machine_and_lines_of_one_number_are_not_in_the_file(tmp_path):
    path = tmp_path / "x.results.json"
    add_run(path, tmp_path / "a")
    text = path.read_text()
    assert str(tmp_path) not in text
    assert '"milestones": [' in text
    assert "[2, 3, 4" in text
    assert not any(line.strip(" ,").isdecimal() for line in text.splitlines())


def test_runs_of_another_setting_are_not_compared(tmp_path):
    path = tmp_path / "x.results.json"
    add_run(path, tmp_path / "a", seed=0)
    found = add_run(path, tmp_path / "b", seed=1)
    assert len(found.settings) == 2
    assert len(found.rows) == 4
    assert results_text(found).count("| fp32 |") == 2


def test_another_budget_and_place_is_the_same_setting(tmp_path):
    path = tmp_path / "x.results.json"
    add_run(path, tmp_path / "a", budgets=(3,))
    found = add_run(path, tmp_path / "elsewhere", budgets=(4,))
    assert len(found.settings) == 1
    assert [row.budget for row in found.rows] == ["3 bits", "3 bits", "4 bits", "4 bits"]
    text = results_text(found)
    assert "Paired differences at 3 bits" in text
    assert "Paired differences at 4 bits" in text


def test_draws_of_uniform_are_one_row_with_their_spread(tmp_path):
    path = tmp_path / "x.results.json"
    found = add_run(path, tmp_path / "a", seeds=(0, 1), draws=2)
    (uniform,) = [row for row in found.rows if row.method == "uniform"]
    assert len(uniform.choices) == 3
    assert [t.seed for t in uniform.trainings] == [0, 0, 1]
    means = [correct("uniform", t.digest, t.seed).mean(dtype=np.float64) for t in uniform.trainings]
    assert uniform.found["seeds_error"] == pytest.approx(np.std(means, ddof=1) / 3**0.5)
    assert "| 2, 3 orders |" in results_text(found)


def test_a_method_that_chose_otherwise_has_another_row(tmp_path):
    path = tmp_path / "x.results.json"
    add_run(path, tmp_path / "a", methods=("exact",))
    document = json.loads(path.read_text())
    (row,) = document["rows"]
    old = row["variant"]
    for part in (row, *row["trainings"]):
        part.update({key: "0123456789ab" for key in ("variant", "digest") if key in part})
    row["choices"] = {"0123456789ab": row["choices"][old]}
    path.write_text(json.dumps(document))
    found = add_run(path, tmp_path / "a", methods=("exact",))
    assert sorted(r.variant for r in found.rows) == sorted(["0123456789ab", old])
    assert "| exact 012345 |" in results_text(found)


# --- the command ---------------------------------------------------------------------------------


def test_every_number_of_the_table_is_computed_from_the_bits(tmp_path):
    path = tmp_path / "x.results.json"
    found = add_run(path, tmp_path / "a", methods=("uniform", "exact"), seeds=(0, 1, 2))
    rows = {row.method: row for row in found.rows}
    by_method = {
        method: np.stack([correct(method, row.variant or t.digest, t.seed) for t in row.trainings])
        for method, row in rows.items()
    }
    reference = correct("exact", "ff", 50)
    exact = Replicates((0, 1, 2), ("d",) * 3, by_method["exact"].astype(float))
    uniform = Replicates((0, 1, 2), ("e",) * 3, by_method["uniform"].astype(float))
    score, drop, gained = exact.measured(), exact.drop_from(reference), uniform.minus(exact)
    text = results_text(found)
    assert (
        f"| 4 bits | exact | {100 * score.mean:.2f} ± {100 * score.error:.2f} % | "
        f"{100 * drop.mean:.2f} ± {100 * drop.error:.2f} | 3 |".replace("| -", "| −")
    ) in text
    told = f"{100 * gained.mean:+.2f} ± {100 * gained.error:.2f}".replace("-", "−")
    assert f"| uniform − exact | {told} | 3 | outside the error |" in text
    # What is beside the bits may say anything.
    document = json.loads(path.read_text())
    for row in document["rows"]:
        row["found"] = {"score": 1.0, "drop": -1.0, "minus": {}}
    path.write_text(json.dumps(document))
    assert results_text(read_results(path)) == text
    changed = document["rows"][0]["trainings"][0]
    changed["scores"] = packed(1 - unpacked(changed["scores"], NUM))
    path.write_text(json.dumps(document))
    assert results_text(read_results(path)) != text


def test_the_signs_are_told_in_words(tmp_path):
    path = tmp_path / "x.results.json"
    methods = ("uniform", "exact", "largest-omega", "weight-norm", "hawq-v1", "hawq-v1-together")
    found = add_run(path, tmp_path / "a", methods=methods, seeds=(0, 1))
    lines = results_text(found).splitlines()
    claims = {line.split(" (")[0]: line for line in lines if line.startswith("- ")}
    smallest = claims["- The smallest Ω beats the largest at the same size"]
    assert "(exact − largest-omega): yes, +" in smallest
    assert ": yes, +" in claims["- Ω beats ‖ΔW‖² without the Hessian"]
    together = claims["- Quantizing block by block beats all at once"]
    assert "not told apart, inside the error" in together
    assert not any("reverse" in line for line in lines)


def test_one_seed_is_said_to_hold_the_images_alone(tmp_path):
    one = results_text(add_run(tmp_path / "one.json", tmp_path / "a"))
    two = results_text(add_run(tmp_path / "two.json", tmp_path / "b", seeds=(0, 1)))
    assert "the error of the images alone |" in one
    assert "one seed does not tell what another would change" in one
    assert "over the test images and the seeds together" in two
    assert "from 2 trainings, is itself uncertain by 71 %" in two
    assert "alone" not in two


def test_rows_without_a_common_seed_are_not_compared(tmp_path):
    path = tmp_path / "x.results.json"
    add_run(path, tmp_path / "a", methods=("uniform",), seeds=(0,))
    text = results_text(add_run(path, tmp_path / "b", methods=("exact",), seeds=(1,)))
    assert "| uniform − exact | | 0 | no seed in common |" in text
    assert "not known, exact and uniform share no seed" in text


def test_where_the_numbers_come_from_is_said(tmp_path):
    text = results_text(add_run(tmp_path / "x.json", tmp_path / "a"))
    assert "Commands: `hawq run c.yaml`" in text
    assert "Commit: not a checkout" in text
    assert "torch: 2.15.0" in text
    assert "a processor, 2 CPUs" in text
    assert "Finished: 2025-03-04" in text
    assert "0.1 hours in all" in text  # 2 × 100 s


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(rows=[{}]), r"another form of rows\.0\.setting"),
        (lambda d: d["rows"][0].update(setting="?"), r"rows\.0\.setting: must be among"),
        (lambda d: d["rows"][0].update(trainings=[]), r"rows\.0\.trainings: must be at least one"),
        (
            lambda d: d["rows"][0]["trainings"][0].update(scores="AAAA"),
            r"rows\.0\.trainings\.0\.scores: must hold 1003 bits in 126 bytes, got 3 bytes",
        ),
        (lambda d: d["rows"][0].update(choices={}), r"rows\.0\.choices: must hold"),
    ],
)
def test_a_damaged_file_is_refused_by_its_place(tmp_path, change, message):
    path = tmp_path / "x.results.json"
    add_run(path, tmp_path / "a")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=message):
        read_results(path)


def test_a_file_that_is_not_there_or_no_json_is_refused(tmp_path):
    with pytest.raises(InputError, match="must be a readable file of results, got 'No such file"):
        read_results(tmp_path / "x")
    (tmp_path / "y").write_text("{")
    with pytest.raises(InputError, match="another form of it"):
        read_results(tmp_path / "y")


def test_the_command_prints_the_table(tmp_path):
    path = tmp_path / "x.results.json"
    found = add_run(path, tmp_path / "a")
    done = CliRunner().invoke(app, ["results", str(path)])
    assert done.exit_code == 0
    assert done.output.strip() == results_text(found).strip()


def test_a_command_is_told_without_the_runs_folder():
    assert typed(["/bin/hawq", "run", "c.yaml", "--set", "a=[1, 2]", "--out", "/x", "--force"]) == (
        "hawq run c.yaml --set 'a=[1, 2]' --force"
    )
    assert typed(["hawq", "run", "c.yaml", "--out=/x"]) == "hawq run c.yaml"
    assert typed(["hawq", "run", "c.yaml", "--results", "/x.json", "--force"]) == (
        "hawq run c.yaml --force"
    )


# --- commits -------------------------------------------------------------------------------------


def git(folder, *arguments):
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.com"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_a_commit_says_whether_the_packages_have_changes(tmp_path):
    assert current_commit(tmp_path) is None
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "a.py").write_text("")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "x")
    clean = current_commit(tmp_path)
    assert len(clean) == 10
    (tmp_path / "README.md").write_text("not the program")
    assert current_commit(tmp_path) == clean
    (tmp_path / "search" / "a.py").write_text("1")
    assert current_commit(tmp_path) == f"{clean} with uncommitted changes"
    assert current_commit(tmp_path / "search") is None  # another repository than the program's


def test_commits_are_noted_when_a_stage_is_made(tmp_path):
    note = noting_commits(tmp_path)
    note(Event(0.0, "trials", "skipped", ""))
    assert commits(tmp_path) == []
    for _ in range(2):
        note(Event(0.0, "trials", "started", ""))
    now = current_commit()
    assert commits(tmp_path) == ([] if now is None else [now])


# --- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "reproduce").glob("resnet20*.yaml")), ids=lambda p: p.name
)
def test_every_config_of_the_comparison_is_valid(path, monkeypatch):
    monkeypatch.setenv("HAWQ_DATA", "/data")
    config = load_config(path)
    assert len(config.training_seeds) > 1
    assert {"uniform", "hawq-v1", "hawq-v2", "exact", "channel"} <= set(config.methods)
