"""The study of the recipe: what is tried, how it goes on, and what is chosen."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
import yaml

from hawq.finetune import Recipe
from hawq.quantizers import Schemes
from search.artefacts import Trial
from search.config import Interval, RecipeConfig, StudyConfig
from search.config_file import load_config
from search.folder import write_atomically
from search.pipeline import run as run_search
from search.study import (
    RecipeSearch,
    StudySpecs,
    distributions,
    middle,
    storage_url,
    with_parameters,
)
from search.trials import TrialSpec

ROOT = Path(__file__).parents[1]
RECIPE = RecipeConfig(epochs=2, batch_size=64, lr=0.02)
STUDY = StudyConfig(
    trials=8,
    space={"lr": Interval(low=0.001, high=1, log=True), "range": ["mse", "minmax"]},
)


def specs(root, digests=("d",)):
    templates = {
        digest: TrialSpec(digest, {}, Recipe(2, 64, 0.02), 0, root / f"template-{digest}")
        for digest in digests
    }
    return StudySpecs(templates, RECIPE, Schemes(), root)


def searcher(root, *, study=STUDY, made=None, **settings):
    made = made or specs(root)
    digests = list(made.templates) if study.sampler == "nsga2" else []
    arguments = {"seed": 0, "num_trials": study.trials, "name": "recipe"}
    return RecipeSearch(
        distributions(study, digests),
        path=root / "optuna.db",
        sampler=study.sampler,
        first=middle(study, RECIPE, "mse", digests),
        specs=made,
        **arguments | settings,
    )


def end(spec, score, *, status="finished", reason=""):
    """Write the result that a trial would have left."""
    epochs = [{"epoch": 0, "loss": None, "search_score": score, "seconds": 1.0}]
    trial = Trial.model_validate(
        {
            "digest": spec.digest,
            "folder": spec.folder.name,
            "status": status,
            "reason": reason,
            "epochs": epochs,
            "seconds": 1.0,
            "cpu_seconds": 1.0,
        }
    )
    write_atomically(spec.folder / "result.json", trial.model_dump_json())


def score_of(spec):
    """A landscape with its top at a rate of 0.1."""
    return 1 - abs(torch.tensor(spec.recipe.lr).log10().item() + 1) / 10


def run(found, until):
    """Play Tune, one trial after the other."""
    tried = []
    while found.num_left and len(tried) < until:
        name = f"t{len(tried)}"
        config = found.suggest(name)
        spec = found.specs(config)
        end(spec, score_of(spec))
        found.on_trial_complete(name)
        tried.append(config)
    return tried


def test_the_recipe_as_it_is_comes_first_and_the_best_is_better(tmp_path):
    tried = run(searcher(tmp_path), 8)
    assert tried[0] == {"lr": 0.02, "range": "mse", "number": 0}
    scores = [score_of(specs(tmp_path)(config)) for config in tried]
    assert max(scores) > scores[0]
    assert len({config["lr"] for config in tried}) == 8


def test_a_study_that_is_killed_goes_on_as_if_it_had_not_been(tmp_path):
    undisturbed = run(searcher(tmp_path / "a"), 8)
    first = searcher(tmp_path / "b")
    before = run(first, 3)
    killed = first.suggest("never ends")  # training when the driver dies
    again = searcher(tmp_path / "b")
    assert again.num_left == 5
    after = run(again, 8)
    assert after[0] == killed
    assert before + after == undisturbed
    assert searcher(tmp_path / "b").num_left == 0


def test_its_file_opens_in_optuna_with_every_trial_and_its_reason(tmp_path):
    found = searcher(tmp_path)
    run(found, 2)
    for name, status, reason in (
        ("x", "failed", "the loss must be finite, got nan"),
        ("y", "stopped", "stopped early after 1 of 2 epochs"),
    ):
        spec = found.specs(found.suggest(name))
        found.on_trial_result(name, {"epoch": 1, "search_score": 0.25})
        end(spec, 0.25, status=status, reason=reason)
        found.on_trial_complete(name)
    study = optuna.load_study(study_name="recipe", storage=storage_url(tmp_path / "optuna.db"))
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "COMPLETE", "FAIL", "PRUNED"]
    assert study.trials[2].user_attrs["reason"] == "the loss must be finite, got nan"
    assert study.trials[2].values is None
    assert study.trials[3].intermediate_values == {1: 0.25}
    assert study.best_trial.number in {0, 1}


def test_two_objectives_choose_the_candidate_too(tmp_path):
    study = STUDY.model_copy(update={"sampler": "nsga2"})
    made = specs(tmp_path, ("large", "small"))
    sizes = {"large": 800, "small": 100}
    made = replace(
        made,
        templates={d: replace(t, stored_bits=sizes[d]) for d, t in made.templates.items()},
    )
    found = searcher(tmp_path, study=study, made=made)
    tried = run(found, 8)
    assert {config["candidate"] for config in tried} == {"large", "small"}
    assert {tuple(t.values)[1] for t in found.study.best_trials} <= {100.0, 800.0}


def test_equal_parameters_do_not_share_a_folder(tmp_path):
    made = specs(tmp_path)
    one, other = (made({"lr": 0.1, "range": "mse", "number": n}) for n in (3, 4))
    assert one.recipe == other.recipe
    assert one.folder != other.folder


def test_parameters_reach_the_recipe_and_the_quantizers():
    recipe, schemes = with_parameters(RECIPE, Schemes(), {"lr": 0.5, "range": "minmax"})
    assert recipe.lr == 0.5
    assert recipe.epochs == RECIPE.epochs
    assert (schemes.weights.range, schemes.activations.range) == ("minmax", "minmax")


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"lerning": {"low": 0, "high": 1}}, r"space\.lerning is not known, did you mean"),
        ({"epochs": {"low": 1, "high": 2}}, r"space\.epochs is not known"),
        ({"momentum": {"low": 0, "high": 1.5}}, r"space\.momentum must hold possible values"),
        ({"range": ["mse", "middle"]}, r"space\.range must list some of mse, minmax"),
        ({"batch_size": {"low": 32, "high": 64.5}}, r"space\.batch_size must be whole numbers"),
        ({"schedule": {"low": 0, "high": 1}}, r"space\.schedule must be a list of values"),
    ],
)
def test_a_space_that_no_recipe_can_have_is_refused(space, told):
    with pytest.raises(ValueError, match=told):
        StudyConfig(space=space).refuse_unknown(RECIPE)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"space": {"lr": {"low": 0.1, "high": 0.01}}}, "low must be less than high"),
        ({"space": {"lr": {"low": 0, "high": 0.1, "log": True}}}, "above 0 with log"),
        ({"space": {"step_factor": None}}, "step_factor must have"),
        ({"sampler": "nsga2", "asha": True}, "asha must be false with nsga2"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        StudyConfig(**settings)


def test_a_name_alone_has_the_usual_interval():
    study = StudyConfig(space={"lr": None, "distillation": None})
    assert study.space["lr"].log
    assert study.space["distillation"].high == 0.9


CONFIG = {
    "task": {
        "data": "digits",
        "network": "resnet8",
        "search_size": 100,
        "pretrain": {"epochs": 2, "batch_size": 64, "lr": 0.05},
    },
    "curvature": {"examples": 64, "batch_size": 8, "rtol": 0.3},
    "weights": {"bits": [2, 4, 8]},
    "budgets": [{"average_bits": 3}],
    "methods": ["uniform", "exact"],
    "calibration": {"examples": 64, "choices": 4, "draws": 2, "interactions": 0},
    "finetune": {"epochs": 2, "batch_size": 64, "lr": 0.01},
    "study": {
        "trials": 3,
        "epochs": 1,
        "examples_per_epoch": 256,
        "space": {"lr": {"low": 1.0e-4, "high": 0.1, "log": True}, "range": ["mse", "minmax"]},
    },
    "trials": {"max_concurrent": 1},
    "ray": {"dashboard": False},
}

SCRIPT = """
import os, sys, signal
os.environ["RAY_AUTH_MODE"] = "disabled"
from pathlib import Path
from search.config_file import load_config
from search.pipeline import run

def listener(event):
    if event.stage == "study" and event.kind == "progress" and event.done >= 1:
        os.kill(os.getpid(), signal.SIGKILL)

run(load_config(Path(sys.argv[1])), Path(sys.argv[2]), name="s", listeners=[listener])
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_search_with_a_study_survives_its_driver_and_trains_all_under_one_recipe(
    ray_cluster, tmp_path
):
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    out = tmp_path / "run"
    script = tmp_path / "killed.py"
    script.write_text(SCRIPT)
    killed = subprocess.run(
        [sys.executable, str(script), str(path), str(out)], cwd=ROOT, check=False, timeout=500
    )
    assert killed.returncode == -signal.SIGKILL
    ended = {folder.parent: folder.stat().st_mtime_ns for folder in out.glob("study/*/result.json")}
    assert ended
    summary = run_search(load_config(path), out, name="s")
    study = summary.study
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    for folder, written in ended.items():  # not trained again
        assert (folder / "result.json").stat().st_mtime_ns == written
    chosen = max(study.trials, key=lambda trial: trial.search_score)
    assert study.parameters == chosen.parameters
    assert stage_inputs(out, "trials")["finetune"]["lr"] == study.parameters["lr"]
    opened = optuna.load_study(study_name=None, storage=storage_url(out / "study" / "optuna.db"))
    assert len(opened.trials) == 3
    exported = json.loads((out / "best" / "allocation.json").read_text())
    scores = [e.search_score for t in [*study.trials, *summary.trials.trials] for e in t.epochs]
    assert exported["search_score"] == max(scores)
    report = (out / "report.html").read_text()
    assert "a study of 3 trials" in report
    assert 'id="study-figure-0"' in report
    again = run_search(load_config(path), out, name="s")
    assert again.study == study


def stage_inputs(out, stage):
    return json.loads((out / f"{stage}.json").read_text())["inputs"]["config"]
