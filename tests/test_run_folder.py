"""The run's folder and its events: whole or absent, and readable after any accident."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.artefacts import CurvatureArtefact, StageCost, TrialsArtefact
from search.errors import InputError
from search.events import Event, EventLog, read_events
from search.folder import RunFolder, content_hash, write_atomically

COST = StageCost(stage="trials", seconds=1.0, cpu_seconds=2.0)
EMPTY = TrialsArtefact(trials=[])


def test_an_artefact_reads_back_with_its_inputs_and_cost(tmp_path):
    folder = RunFolder(tmp_path / "run")
    assert folder.inputs("trials") is None
    folder.save("trials", {"config": {"a": 1}}, EMPTY, COST)
    assert folder.inputs("trials") == {"config": {"a": 1}}
    assert folder.load("trials", TrialsArtefact) == (EMPTY, COST)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_atomically(path, "new")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_changes_name_the_dotted_path_and_both_values(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save("trials", {"config": {"a": {"b": 1, "c": 2}}, "upstream": "x"}, EMPTY, COST)
    assert folder.changes("trials", {"a": {"b": 1, "c": 2}}) == []
    assert folder.changes("trials", {"a": {"b": 3, "c": 2}}) == ["a.b was 1, is 3"]


def test_a_damaged_artefact_is_named_with_the_remedy(tmp_path):
    (tmp_path / "trials.json").write_text("{")
    with pytest.raises(InputError, match="delete it to run the stage again"):
        RunFolder(tmp_path).load("trials", TrialsArtefact)


def test_an_artefact_of_another_version_is_named_with_the_remedy(tmp_path):
    folder = RunFolder(tmp_path)
    folder.save("trials", {"config": {}}, EMPTY, COST)
    with pytest.raises(InputError, match=r"trials\.json must be an artefact of this version"):
        folder.load("trials", CurvatureArtefact)


def test_a_folder_serves_one_driver_at_a_time(tmp_path):
    with RunFolder(tmp_path).locked():
        refusal = pytest.raises(InputError, match=f"process {os.getpid()} runs a search in it")
        with refusal, RunFolder(tmp_path).locked():
            pass
    with RunFolder(tmp_path).locked():
        pass


@given(st.dictionaries(st.text(), st.integers()))
def test_the_hash_of_plain_data_ignores_the_order_of_keys(data):
    assert content_hash(data) == content_hash(dict(reversed(data.items())))


def test_events_reach_the_file_and_the_listeners_in_order(tmp_path):
    heard: list[Event] = []
    log = EventLog(tmp_path / "events.jsonl", [heard.append])
    log.emit("model", "started")
    log.emit("model", "progress", "half", done=1, total=2, unit="epochs")
    assert read_events(tmp_path / "events.jsonl") == heard
    assert [event.kind for event in heard] == ["started", "progress"]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    EventLog(path).emit("model", "started")
    with path.open("a") as file:
        file.write('{"time": 1, "sta')
    assert [event.stage for event in read_events(path)] == ["model"]
