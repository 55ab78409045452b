"""What a config says of quantizers reaches Ω, trials and report; what cannot be quantized."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from hawq.finetune import attach, zeroed_layers
from hawq.space import unquantizable_weights
from search.artefacts import Summary
from search.config_file import load_config
from search.errors import InputError
from search.events import read_events
from search.pipeline import run

SMALL = {
    "task": {
        "data": "digits",
        "network": "resnet8",
        "search_size": 100,
        "pretrain": {"epochs": 1, "batch_size": 64, "lr": 0.05},
    },
    "curvature": {"examples": 64, "batch_size": 8},
    "weights": {"bits": [2, 4]},
    "budgets": [{"average_bits": 3}],
    "methods": ["exact"],
    "calibration": {"examples": 16, "choices": 2, "draws": 2},
    "finetune": {"epochs": 1, "batch_size": 64, "lr": 0.01},
    "ray": {"dashboard": False},
}


def config(tmp_path, *overrides):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return load_config(path, overrides)


@pytest.mark.ray
def test_the_scheme_decides_what_omega_sees_and_how_trials_quantize(ray_cluster, tmp_path):
    plain = run(config(tmp_path), tmp_path / "plain")
    other = run(
        config(
            tmp_path,
            "weights.quantizer={learning: dorefa, per: tensor}",
            "activations.quantizer={learning: pact, range: percentile, percentile: 99}",
        ),
        tmp_path / "other",
    )
    # The same network and traces, other quantizers.
    assert other.model.weights_sha256 == plain.model.weights_sha256
    assert other.curvature.trace == plain.curvature.trace
    assert other.tables.squared_error != plain.tables.squared_error
    assert set(other.tables.num_scales) == {1}
    assert other.candidates.candidates[0].sensitivity > plain.candidates.candidates[0].sensitivity
    assert [trial.status for trial in other.trials.trials] == ["finished"]
    losses = [summary.trials.trials[0].epochs[-1].loss for summary in (plain, other)]
    assert losses[0] != losses[1]


@pytest.mark.ray
def test_what_cannot_be_quantized_is_named_kept_and_counted(tmp_path):
    # From a shell of its own, for workers cannot import this folder's modules.
    overrides = ["task={factory: 'oracles:TinyTask'}"]
    overrides += ["task.arguments={network: upsampling, num_examples: 96}"]
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    command = [sys.executable, "-m", "search.cli", "run", str(tmp_path / "small.yaml")]
    command += ["--out", str(tmp_path / "run"), *(f"--set={text}" for text in overrides)]
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": paths})
    summary = Summary.model_validate_json((tmp_path / "run" / "summary.json").read_text())
    assert summary.tables.float_weights == {"up.weight": 24}
    candidate = summary.candidates.candidates[0]
    assert not any("up" in name for name in candidate.bits)
    scales = 16 * (3 + 4)
    assert candidate.costs["stored_bits"] == candidate.weight_bits + scales + 32 * 24
    events = read_events(tmp_path / "run" / "events.jsonl")
    warned = [e.message for e in events if e.kind == "warning" and e.stage == "model"]
    assert warned == ["these weights stay in floating point: up.weight (24)"]
    assert "up.weight (24)" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.ray
def test_what_is_kept_stays_in_floating_point_and_is_counted(ray_cluster, tmp_path):
    overrides = ("weights.keep=[first]", "activations.keep=[linear]", "budgets=[{gbops: 0.015}]")
    overrides += ("activations.menu=[4, 8]",)
    summary = run(config(tmp_path, *overrides), tmp_path / "run")
    bits = summary.candidates.candidates[0].bits
    assert "w:conv1" not in bits
    assert {"w:layer1.0.conv1", "w:linear", "a:layer1.0.conv1#0"} <= set(bits)
    assert not [name for name in bits if name.startswith("a:linear") or "a:conv1" in name]
    assert summary.tables.float_weights == {"conv1.weight": 144}
    assert "conv1" not in summary.curvature.layers
    # A quantized layer that reads a tensor in floating point multiplies by 32 bits.
    reads = {o.weight: o.activation for o in summary.tables.operations}
    assert reads["w:linear"] == 32
    assert summary.trials.trials[0].status == "finished"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights.keep=[conv7]", "weights.keep: 'conv7' must match a layer of the weights"),
        ("weights.keep=['*']", "weights.keep: keep must leave a layer to quantize"),
        ("activations.keep=[nothing]", "activations.keep: 'nothing' must match a layer"),
    ],
)
def test_what_is_kept_must_be_there(tmp_path, override, message):
    with pytest.raises(InputError, match=message.replace("*", r"\*")):
        run(config(tmp_path, override), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_vectors_and_quantizable_layers_are_not_counted_as_unquantizable():
    model = nn.Sequential(
        nn.EmbeddingBag(5, 3), nn.Linear(3, 3), nn.LayerNorm(3), nn.LSTM(3, 2), nn.Conv1d(2, 2, 1)
    )
    assert unquantizable_weights(model) == {
        "0.weight": 15, "3.weight_ih_l0": 24, "3.weight_hh_l0": 16,
    }  # fmt: skip
    attach(model, {"w:1": 4})
    assert "1.parametrizations.weight.original" not in unquantizable_weights(model)


def test_layers_that_quantize_to_nothing_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight.zero_()
    assert zeroed_layers(model) == []  # nothing is quantized
    attach(model, {"w:0": 4, "w:1": 4})
    assert zeroed_layers(model) == ["0"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weights.quantizer={learning: pact}", "weights.quantizer.learning"),
        ("weights.quantizer={learning: dorefa, symmetric: false}", "symmetric must be true"),
        ("activations.quantizer={percentile: 20}", "activations.quantizer.percentile"),
        ("activations.quantizer={rang: mse}", "did you mean 'range'"),
        ("weights.bits=[9]", "weights.bits"),
        ("finetune.staging=1.0", "finetune.staging"),
    ],
)
def test_quantizers_that_make_no_sense_are_refused_by_their_place(tmp_path, override, message):
    with pytest.raises(InputError) as caught:
        config(tmp_path, override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
