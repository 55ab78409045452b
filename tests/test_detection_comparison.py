"""Ways of searching side by side, scored by mAP; what is said of them is said of mAP."""

import html
import json
import re

import pytest
import yaml
from pictures import DETECTOR, TINY, draw_set

pytest.importorskip("mmdet", reason="needs the extra: pip install 'hawq-search[detection]'")

from hawq.finetune import Recipe, evaluate, make_optimizer, train_epoch
from search.commands.compare import compare
from search.comparison.text import comparison_text
from search.tasks.checkpoint import load_weights, save_state
from search.tasks.detection import DetectionTask

METHODS = ["hawq-v2", "random", "hill-climbing"]
NUM_SCORED = 5


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    sizes = {"train": 24, "val": 8, "test": 6}
    root = draw_set(tmp_path_factory.mktemp("rectangles") / "set", sizes)
    return DetectionTask(str(DETECTOR), str(root), json.dumps(TINY), from_checkpoint=True)


@pytest.fixture(scope="module")
def checkpoint(task, tmp_path_factory):
    """Weights that find something: mAP would be 0 in every figure otherwise."""
    model = task.model()
    recipe = Recipe(epochs=4, batch_size=4, lr=0.04, clip_norm=10.0, freeze_batch_norm=1.0)
    optimizer = make_optimizer(model, recipe)
    for epoch in range(recipe.epochs):
        train_epoch(model, optimizer, task, recipe, epoch=epoch, seed=0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_state(path, model.state_dict())
    return path


@pytest.fixture(scope="module")
def compared(ray_cluster, task, checkpoint, tmp_path_factory):
    """A comparison as a user would make it, with its folder."""
    config = {
        "seed": 0,
        "task": {
            "detector": {"config": str(DETECTOR), "root": task.root, "options": TINY},
            "checkpoint": str(checkpoint),
        },
        "curvature": {"examples": 4, "batch_size": 2, "rtol": 0.5, "max_probes": 4},
        "weights": {"bits": [2, 4, 8]},
        "budgets": [{"compression": 8}],
        "methods": METHODS,
        "searches": {"evaluations": 2, "examples": NUM_SCORED},
        "comparison": {"seeds": 1, "agreement": 2},
        "calibration": {"examples": 2, "choices": 2, "draws": 2},
        "finetune": {"epochs": 1, "batch_size": 8, "lr": 0.002, "clip_norm": 10},
    }
    folder = tmp_path_factory.mktemp("comparison")
    (folder / "rectangles.yaml").write_text(yaml.safe_dump(config))
    return compare(folder / "rectangles.yaml", folder / "run"), folder / "run"


@pytest.mark.ray
@pytest.mark.slow
def test_each_way_of_searching_is_scored_and_tested_by_map(compared):
    document, _ = compared
    assert document.score_name == "mAP"
    assert [search.method for search in document.searches] == sorted(METHODS[1:])
    assert all(len(search.evaluations) == 2 for search in document.searches)
    assert {finalist.method for finalist in document.finalists} == set(METHODS)
    assert len(document.differences) == 3
    assert any(finalist.score > 0 for finalist in document.finalists)


@pytest.mark.ray
@pytest.mark.slow
def test_the_unquantized_network_is_scored_on_the_images_that_searches_are(
    compared, task, checkpoint
):
    document, _ = compared
    model = task.model()
    load_weights(model, checkpoint)
    assert document.num_examples == NUM_SCORED
    scores = evaluate(model, task, "search", num_examples=NUM_SCORED)
    assert document.unquantized == pytest.approx(float(scores.double().mean()))
    # mAP is no mean over images: a part of the pseudo-values of all has another.
    assert document.unquantized != pytest.approx(float(evaluate(model, task, "search")[:5].mean()))


@pytest.mark.ray
@pytest.mark.slow
def test_nothing_is_said_of_accuracy(compared):
    document, run = compared
    text = comparison_text(document)
    assert "fine-tuned mAP, %" in text
    for page in ("comparison.html", "report.html"):
        written = (run / page).read_text(encoding="utf-8")
        text += html.unescape(
            re.sub(r"<(script|style)[ >].*?</\1>|<[^>]*>", " ", written, flags=re.S)
        )
        text += " ".join(re.findall(r'aria-label="([^"]*)"', written))
        text += " ".join(re.findall(r'"text": ?"([^"]*)"', written))
    assert "Do scores foretell mAP?" in text
    assert not re.findall(r".{0,40}\b(?:accurac|right or wrong).{0,40}", text, flags=re.I)
