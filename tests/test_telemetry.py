"""Metrics from events: what each says, and that Ray offers them to Prometheus."""

import time
import urllib.request
from typing import get_args

import pytest

from search.events import Event, EventLog, Measure, read_events
from search.telemetry import GAUGES, Reading, Telemetry, readings


def said(kind, stage="curvature", **more):
    return {(r.metric, r.value, r.unit) for r in readings(Event(0.0, stage, kind, **more))}


def test_progress_is_read_in_the_stages_own_unit():
    found = said("progress", done=3, total=8, unit="units")
    assert found == {("done", 3, "units"), ("total", 8, "units")}


def test_a_stage_runs_from_its_start_to_its_end():
    assert said("started") == {("running", 1, "")}
    assert said("finished") == {("running", 0, ""), ("stages", 1, "")}
    assert said("failed") == {("running", 0, ""), ("failures", 1, "")}
    assert said("skipped") == {("skipped", 1, "")}
    assert said("warning") == {("warnings", 1, "")}
    assert said("note") == set()


def test_measures_become_gauges_of_their_names():
    measures = {"evaluations": 7, "episodes": 9, "reward": 0.5, "best_score": 0.75}
    found = said("progress", "searches", measures=measures)
    assert found == {(k, v, "") for k, v in measures.items()} | {("cache_hits", 2, "")}
    assert set(get_args(Measure)) <= GAUGES.keys()


def test_measures_go_through_the_file_of_events(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("trials", "progress", measures={"trials": 2})
    (event,) = read_events(tmp_path / "events.jsonl")
    assert list(readings(event)) == [Reading("trials", 2)]


def test_without_a_cluster_nothing_happens():
    import ray  # noqa: PLC0415

    if not ray.is_initialized():
        Telemetry("s", 1)(Event(0.0, "model", "started"))


@pytest.mark.ray
def test_ray_offers_the_metrics(ray_cluster):
    import ray  # noqa: PLC0415

    # Searches of other tests may have told of themselves.
    listener = Telemetry("only told", attempt=2)
    listener(Event(0.0, "trials", "progress", done=1, total=4, unit="epochs"))
    listener(Event(0.0, "trials", "progress", measures={"best_score": 0.75}))
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    for _ in range(120):
        with urllib.request.urlopen(url) as answer:
            lines = [x for x in answer.read().decode().splitlines() if 'search="only told"' in x]
        if any("best_score" in line for line in lines):
            break
        time.sleep(0.5)
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert values["ray_hawq_best_score"] == 0.75
    assert values["ray_hawq_done"] == 1
    assert values["ray_hawq_attempt"] == 2
    assert all(line.startswith("ray_hawq_") for line in lines)
