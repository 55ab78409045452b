"""The README keeps its word: its example runs, and what it names exists."""

import re
from pathlib import Path

import pytest
import yaml

from hawq.testing import check_task
from search.artefacts import Summary
from search.config import SearchConfig, TaskConfig
from search.config_file import load_config
from search.pipeline import STAGES, run
from search.searchers import SEARCHERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def block(language, first_line):
    for found in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL):
        if found.startswith(first_line):
            return found
    raise AssertionError(f"the README has no {language} block that begins with {first_line!r}")


@pytest.mark.ray
def test_the_example_of_a_network_of_your_own_runs(ray_cluster, tmp_path, monkeypatch):
    (tmp_path / "blobs.py").write_text(block("python", "# blobs.py"))
    (tmp_path / "blobs.yaml").write_text(block("yaml", "# blobs.yaml"))
    monkeypatch.syspath_prepend(str(tmp_path))
    import blobs  # noqa: PLC0415  it exists only now
    import ray  # noqa: PLC0415

    check_task(blobs.Blobs())
    ray.cloudpickle.register_pickle_by_value(blobs)
    summary = run(load_config(tmp_path / "blobs.yaml"), tmp_path / "run")
    assert summary.test.unquantized.score > 0.8
    assert len(summary.candidates.candidates) == 2 * len(summary.config["methods"])


@pytest.mark.ray
def test_the_ten_lines_of_a_network_of_your_own_run(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block("python", "# points.py"), "points.py", "exec"), {"__name__": "points"})
    summary = Summary.model_validate_json((tmp_path / "runs/points/summary.json").read_text())
    assert summary.test.unquantized.score > 0.8
    assert len(summary.candidates.candidates) == len(summary.config["methods"])


def test_every_kind_of_task_that_the_readme_shows_is_valid():
    lines = block("yaml", "task: {data: cifar10, root").splitlines()
    assert len(lines) == 3
    for line in lines:
        TaskConfig.model_validate(yaml.safe_load(line)["task"])


def test_every_path_that_the_readme_names_exists():
    named = set(re.findall(r"`((?:hawq|search|envs|configs|tests)/[\w./]*)", README))
    assert len(named) > 10
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_picture_names_every_stage_and_the_tables_every_method():
    picture = README.split("```")[1]
    for stage in STAGES:
        assert stage.name in picture
    for method in SEARCHERS:
        # The table has "with `-layers`" and "`warm-`" for the rest of a family.
        short = method.removeprefix("hawq-v1").removesuffix("-layers")
        assert any(f"`{name}`" in README for name in (method, short))


@pytest.mark.parametrize(
    "first_line", ["budgets: [{", "weights:\n  quantizer", "methods: [uniform, ex"]
)
def test_every_piece_of_a_config_is_part_of_a_config(first_line):
    rest = {"task": {"data": "digits", "pretrain": {}}, "budgets": [{"average_bits": 3}]}
    SearchConfig.model_validate(rest | yaml.safe_load(block("yaml", first_line)))


SHIPPED = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs/imagenet").glob("*.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_every_config_that_is_shipped_is_valid(path, monkeypatch):
    for name in ("HAWQ_DATA", "COCO", "CHECKPOINT", "IMAGENET"):
        monkeypatch.setenv(name, "/data")
    load_config(path)


def test_a_config_is_its_own_schema():
    schema = SearchConfig.model_json_schema()
    raw = yaml.safe_load((ROOT / "configs" / "digits.yaml").read_text())
    assert raw.keys() <= schema["properties"].keys()
