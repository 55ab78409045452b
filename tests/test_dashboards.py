"""What Grafana is asked to draw is what a search says; what clusters are given can be read."""

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from ray_nodes import Nodes, free_ports
from served import from_weights

from search.config import SearchConfig
from search.service.store import Store
from search.telemetry import GAUGES

CONFIGS = Path(__file__).parents[1] / "configs"
DASHBOARD = json.loads((CONFIGS / "grafana" / "hawq.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_every_query_is_of_a_metric_that_a_search_offers():
    asked = {name for query in QUERIES for name in re.findall(r"ray_hawq_(\w+)", query)}
    assert asked
    assert asked <= set(GAUGES)
    assert len(set(GAUGES) - asked) <= 1  # episodes are the scored and the known together


def test_panels_do_not_lie_on_each_other():
    places = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in DASHBOARD["panels"]
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24


def test_the_files_of_clusters_can_be_read():
    ray = yaml.safe_load((CONFIGS / "cluster" / "ray.yaml").read_text())
    assert len(ray["provider"]["worker_ips"]) == ray["max_workers"]
    pods = yaml.safe_load((CONFIGS / "cluster" / "kuberay.yaml").read_text())
    assert pods["kind"] == "RayCluster"
    for path in (CONFIGS / "grafana").rglob("*.y*ml"):
        assert yaml.safe_load(path.read_text())


def live(test):
    """Mark a test that has a cluster and a Prometheus."""
    return pytest.mark.ray(pytest.mark.slow(pytest.mark.timeout(1800)(test)))


@contextmanager
def prometheus(nodes):
    """Ask a Prometheus that watches a cluster as our own file says, but ten times as often."""
    text = (CONFIGS / "grafana" / "prometheus.yml").read_text()
    for ours, here in (("/tmp/ray/", f"{nodes.folders['head']}/"), ("10s", "1s")):
        assert ours in text
        text = text.replace(ours, here)
    path, (port,) = nodes.folder / "prometheus.yml", free_ports(1)
    path.write_text(text)
    options = [f"--config.file={path}", f"--storage.tsdb.path={nodes.folder / 'tsdb'}"]
    options.append(f"--web.listen-address=127.0.0.1:{port}")
    with (nodes.folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(["prometheus", *options], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30) as client:
            yield client
    finally:
        process.terminate()
        process.wait(30)


def drive(nodes, store):
    """Run a search as the service does, with every stage that says something of its own."""
    methods = {"methods": ["uniform", "random-layers"], "searches": {"evaluations": 4}}
    config = SearchConfig.model_validate(from_weights(store.path) | methods)
    search, _ = store.submit(config, owner="ann", name="tiny")
    state = {"state": "running", "attempt": 1}
    store.change(search.id, lambda record: record.model_copy(update=state))
    command = [sys.executable, "-m", "search.service.driver", str(store.folder(search.id).path)]
    subprocess.run([*command, "1", nodes.address], env=nodes.environment, check=True)


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """What a live Prometheus says to a query of a search that it watched."""
    if shutil.which("prometheus") is None:
        pytest.skip("no Prometheus: apt-get install prometheus")
    store = Store(tmp_path_factory.mktemp("store"))
    with Nodes({"RAY_metrics_report_interval_ms": "1000"}) as nodes:
        nodes.start_head(cpus=2)
        with prometheus(nodes) as client:
            started = time.time()
            drive(nodes, store)
            window = {"start": started, "end": time.time(), "step": 1}

            def answer(path, **asked):
                return client.get(path, params=window | asked).raise_for_status().json()["data"]

            yield answer
    store.close()


@live
@pytest.mark.parametrize("query", QUERIES)
def test_a_live_prometheus_answers_every_query(series, query):
    found = series("query_range", query=query.replace("$search", "tiny"))["result"]
    assert found
    for one in found:
        assert one["metric"]["search"] == "tiny"
        assert all(float(value) == float(value) for _, value in one["values"])  # no NaN


@live
def test_a_live_prometheus_names_the_searches_to_choose_from(series):
    (chosen,) = DASHBOARD["templating"]["list"]
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", chosen["query"]).groups()
    assert series(f"label/{label}/values", **{"match[]": metric}) == ["tiny"]


@live
def test_a_live_prometheus_counts_the_stages(series):
    # Nothing was skipped and nothing failed: those counters begin with the first of theirs.
    found = series("query_range", query="ray_hawq_stages_total")["result"]
    finished = {one["metric"]["stage"] for one in found}
    assert {"model", "curvature", "searches", "candidates", "trials"} <= finished
    names = series("label/__name__/values", **{"match[]": '{search="tiny"}'})
    assert {f"ray_hawq_{name}" for name in GAUGES} <= set(names)
