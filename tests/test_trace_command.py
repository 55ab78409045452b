"""``hawq trace`` as a user types it: on a network that a run has trained."""

import json
import sys

import numpy as np
import pytest
import yaml

from search.cli import main
from search.config_file import load_config
from search.pipeline import trained
from search.traced import EigenvalueDocument, TraceDocument

CONFIG = {
    "task": {
        "data": "digits",
        "network": "resnet8",
        "search_size": 100,
        "pretrain": {"epochs": 2, "batch_size": 64, "lr": 0.05},
    },
    "curvature": {"examples": 64, "batch_size": 16, "pool": 256, "max_probes": 8},
    "budgets": [{"average_bits": 3}],
    "workers": {"count": 2},
    "ray": {"dashboard": False},
}


@pytest.fixture(scope="module")
def run_folder(ray_cluster, tmp_path_factory):
    """A folder with a trained network, and its config."""
    folder = tmp_path_factory.mktemp("trace")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    with trained(load_config(path), folder / "run"):
        pass
    return folder


@pytest.fixture
def trace(monkeypatch, capsys, run_folder):
    """Run the command; return its exit code, what it printed, and where it wrote."""

    def run(*arguments):
        out = run_folder / "out" / "found.json"
        command = ["hawq", "trace", run_folder / "tiny.yaml", "--run", run_folder / "run"]
        monkeypatch.setattr(sys, "argv", [str(x) for x in [*command, "--out", out, *arguments]])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out + captured.err, out

    return run


@pytest.mark.ray
@pytest.mark.parametrize("subject", ["weights", "activations"])
def test_every_group_has_a_trace_with_its_errors(trace, subject):
    code, printed, out = trace("--of", subject, "--granularity", "channel")
    assert code == 0, printed
    found = TraceDocument.model_validate_json(out.read_text())
    sites, channels = found.groups[: found.num_sites], found.groups[found.num_sites :]
    assert found.subject == subject
    assert len(sites) == 8
    assert sum(group.share for group in sites) == pytest.approx(1)
    for site in sites:
        own = [c for c in channels if c.group.startswith(f"{site.group}[")]
        assert sum(c.trace for c in own) == pytest.approx(site.trace)
        assert sum(c.n for c in own) == site.n
    assert all(group.group in printed for group in sites)
    assert out.with_suffix(".html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.ray
def test_a_second_call_finds_the_units_of_the_first(trace, run_folder):
    options = ("--estimator", "hutchinson", "--max-probes", "4")
    _, _, out = trace(*options)
    first = json.loads(out.read_text())
    units = run_folder / "run" / "trace.weights.layer.units.jsonl"
    before = units.read_text()
    _, _, out = trace(*options)
    second = json.loads(out.read_text())
    assert units.read_text() == before
    assert second["groups"] == first["groups"]
    assert second["estimator"] == "hutchinson"


@pytest.mark.ray
def test_one_worker_and_two_give_the_same_bits(trace):
    documents = []
    for workers in (1, 2):
        _, _, out = trace("--workers", workers, "--set", f"seed={workers * 0}")
        documents.append(json.loads(out.read_text()))
        next(out.parent.parent.glob("run/trace.weights.layer.units.jsonl")).unlink()
    assert documents[0]["groups"] == documents[1]["groups"]
    assert [d["workers"] for d in documents] == [1, 2]


@pytest.mark.ray
def test_blocks_have_their_top_eigenvalues(trace, run_folder):
    more = ("--blocks", "stem=conv1", "--max-probes", "80", "--set", "curvature.examples=32")
    code, printed, out = trace("--estimator", "eigenvalue", *more)
    assert code == 0, printed
    found = EigenvalueDocument.model_validate_json(out.read_text())
    model = json.loads((run_folder / "run" / "model.json").read_text())["result"]
    assert found.weights_sha256 == model["weights_sha256"]
    assert found.blocks[0].block == "stem"
    assert {layer for block in found.blocks for layer in block.layers} >= {"conv1", "linear"}
    within = [block.residual <= 0.01 * abs(block.eigenvalue) for block in found.blocks]
    assert within == [block.converged for block in found.blocks]
    assert any(within)
    assert len(found.surfaces) == 2
    losses = np.array(found.surfaces[0].losses)
    middle = len(losses) // 2
    assert found.surfaces[0].offsets[middle] == 0
    assert losses[middle, middle] < losses[0, middle]


def test_eigenvalues_are_of_weights(trace_refusal):
    message = trace_refusal("--estimator", "eigenvalue", "--of", "activations")
    assert message == (
        "error: --estimator eigenvalue: must be of weights, by blocks of layers, got activations "
        "by layer"
    )


def test_blocks_are_for_eigenvalues(trace_refusal):
    message = trace_refusal("--blocks", "a=b")
    assert message == "error: --blocks: is for --estimator eigenvalue, got auto"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rtol", "-1"), "curvature.rtol: input should be greater than 0, got -1.0"),
        (("--max-probes", "1"), "curvature.max_probes: input should be greater than or equal to 2"),
        (("--estimator", "eigenvalue", "--blocks", "a"), "--blocks: must be NAME=GLOB[,GLOB]"),
    ],
)
def test_an_option_out_of_range_is_named(trace_refusal, options, message):
    assert message in trace_refusal(*options)


@pytest.fixture
def trace_refusal(monkeypatch, capsys, tmp_path):
    """Run the command on a config; it must stop with exit code 2 and one line."""

    def run(*arguments):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(CONFIG))
        command = ["hawq", "trace", path, "--run", tmp_path / "run", *arguments]
        monkeypatch.setattr(sys, "argv", [str(x) for x in command])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return capsys.readouterr().err.strip()

    return run
