"""``hawq evaluate`` measures the file itself."""

import math
from dataclasses import replace

import pytest
import torch
from test_export_command import TASK, written

from search.commands.evaluate import evaluate_file, measured_lines
from search.commands.export import chosen, export
from search.errors import InputError
from search.exported import read_exported


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return written(tmp_path_factory.mktemp("evaluated") / "run")


@pytest.fixture(scope="module")
def files(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for to in ("packed", "onnx", "torch"):
        export(chosen(run, "exact", "13.11"), folder / to, to)
    return folder


@pytest.mark.parametrize("to", ["packed", "onnx", "torch"])
def test_a_file_scores_what_the_run_reports(run, files, to):
    found = evaluate_file(files / to, run / "config.yaml", seconds=0)
    assert found.score == pytest.approx(read_exported(files / to).about["test"], abs=1 / 40)
    assert found.standard_error == pytest.approx(
        float(found.scores.double().std()) / math.sqrt(TASK.size("test"))
    )
    assert found.num_bytes == (files / to).stat().st_size
    assert found.is_same_task
    assert f"{TASK.size('test'):,} examples of the test split; the run's report" in next(
        measured_lines(found)
    )


def test_packed_scores_are_the_report_s_to_the_last_bit(run, files):
    found = evaluate_file(files / "packed", run / "config.yaml", seconds=0)
    assert float(found.scores.mean()) == found.file.about["test"]


def test_a_file_that_grew_is_not_called_smaller(run, files):
    found = evaluate_file(files / "packed", run / "config.yaml", seconds=0)
    for grown, told in (
        (found.float_bytes * 2, " bytes, 2.00 times the "),
        (found.float_bytes // 2, " bytes, 2.00 times smaller than the "),
    ):
        assert told in " ".join(measured_lines(replace(found, num_bytes=grown)))


@pytest.mark.parametrize("to", ["packed", "onnx", "torch"])
def test_latency_is_beside_that_in_floating_point(run, files, to):
    threads = torch.get_num_threads()
    found = evaluate_file(files / to, run / "config.yaml", seconds=0.01)
    assert torch.get_num_threads() == threads
    assert found.speed.quantized.ns > 0
    told = " ".join(measured_lines(found))
    assert "threads: 1" in told
    if to == "torch":
        assert found.speed.num_integer is None
        assert "torch computes with floats" in told
    else:
        assert found.speed.num_integer + found.speed.num_float > 0
        assert "layers compute with" in told


def test_other_data_are_told(run, files):
    found = evaluate_file(
        files / "packed", run / "config.yaml", ["task.arguments.num_examples=30"], seconds=0
    )
    assert not found.is_same_task
    told = " ".join(measured_lines(found))
    assert "another network, other data or other splits" in told
    assert "report" not in told


def test_the_config_of_another_network_is_refused(files, tmp_path):
    (tmp_path / "other.yaml").write_text(
        "task: {data: digits, network: resnet8, search_size: 100, "
        "pretrain: {epochs: 1, batch_size: 8, lr: 0.1}}\nbudgets: [{average_bits: 3}]\n"
    )
    with pytest.raises(InputError, match="must be the one that was packed, got another"):
        evaluate_file(files / "packed", tmp_path / "other.yaml", seconds=0)
