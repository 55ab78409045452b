"""The command line as a user types it: what it prints, and its exit codes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from search.cli import main
from search.config import SearchConfig

VALID = {
    "task": {"data": "digits", "network": "resnet8", "search_size": 100, "pretrain": {"epochs": 1}},
    "budgets": [{"average_bits": 3}],
}


@pytest.fixture
def hawq(monkeypatch, capsys):
    """Run the command line in this process; return its exit code and both outputs."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["hawq", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(VALID))
    return path


def test_a_users_mistake_is_one_line_and_exit_code_2(hawq, config_file):
    code, out, err = hawq("run", config_file, "--set", "curvature.rtoll=1")
    assert code == 2
    assert out == ""
    assert err.splitlines() == [
        f"error: {config_file}: curvature.rtoll: unknown key, did you mean 'rtol'?"
    ]


@pytest.mark.parametrize("arguments", [["frobnicate"], ["run"], ["schema", "nothing"]])
def test_a_wrong_command_has_exit_code_2(hawq, arguments):
    assert hawq(*arguments)[0] == 2


def test_print_config_shows_every_resolved_value_and_runs_nothing(hawq, config_file, tmp_path):
    code, out, _ = hawq(
        "run", config_file, "--out", tmp_path / "run", "--set", "seed=7", "--print-config"
    )
    assert code == 0
    resolved = SearchConfig.model_validate(yaml.safe_load(out))
    assert (resolved.seed, resolved.curvature.rtol) == (7, 0.05)
    assert not (tmp_path / "run").exists()


def test_init_writes_a_config_that_runs_as_it_is_and_never_overwrites(hawq, tmp_path):
    path = tmp_path / "new.yaml"
    assert hawq("init", path)[0] == 0
    before = path.read_text()
    assert hawq("run", path, "--print-config")[0] == 0
    code, _, err = hawq("init", path)
    assert (code, "must not exist yet" in err) == (2, True)
    assert path.read_text() == before


@pytest.mark.parametrize("of", ["config", "summary"])
def test_schemas_are_json_and_every_field_of_a_section_is_there(hawq, of):
    code, out, _ = hawq("schema", of)
    assert code == 0
    document = json.loads(out)
    expected = {"config": {"task", "budgets", "methods"}, "summary": {"candidates", "test"}}
    assert expected[of] <= document["properties"].keys()


def test_help_comes_without_waiting_for_torch():
    code = "import sys; from search.cli import app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.ray
def test_doctor_names_versions_extras_and_ray(ray_cluster, hawq):
    code, out, _ = hawq("doctor")
    assert code == 0
    for word in ("python", "torch", "memory", "extra detection", "extra dev", "Ray"):
        assert word in out


def start(config_file, out):
    return subprocess.Popen(
        [sys.executable, "-m", "search.cli", "run", str(config_file), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.ray
@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(config_file, tmp_path):
    raw = {**VALID, "ray": {"dashboard": False}, "curvature": {"examples": 256, "rtol": 1e-6}}
    config_file.write_text(yaml.safe_dump(raw))
    process = start(config_file, tmp_path / "run")
    units = tmp_path / "run" / "curvature.units.jsonl"
    for _ in range(1200):
        if units.exists() and units.read_text().count("\n") > 2:
            break
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "error: interrupted: run the same command again to go on" in err
    assert "Traceback" not in err


def test_a_full_disk_is_one_line_and_keeps_what_is_finished(hawq, config_file, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "run/model.json")

    monkeypatch.setattr("search.pipeline.run", full)
    code, _, err = hawq("run", config_file)
    assert code == 2
    (line,) = err.splitlines()
    assert line.startswith("error: run/model.json: must be writable, got 'No space left on device'")
