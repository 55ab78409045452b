"""What Grafana is asked to draw is what a search says; what clusters are given can be read."""

import json
import re
from pathlib import Path

import yaml

from search.telemetry import GAUGES

CONFIGS = Path(__file__).parents[1] / "configs"
DASHBOARD = json.loads((CONFIGS / "grafana" / "hawq.json").read_text())


def test_every_query_is_of_a_metric_that_a_search_offers():
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"ray_hawq_(\w+)", query)}
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
