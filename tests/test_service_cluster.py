"""Searches as Ray jobs on a cluster that loses a node, and then its head."""

import json
import os
import time
from collections import Counter
from itertools import pairwise

import pytest
from ray.util.state import list_actors, list_jobs, list_tasks
from ray_nodes import Nodes
from served import Server, driver, from_weights, reach, until, without_seconds

from search.config import SearchConfig
from search.events import read_events
from search.pipeline import STAGES
from search.service.client import Client
from search.service.tokens import opened_tokens

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.timeout(900)]

UNITS = 64


def config(folder):
    """Units enough that a node can be killed between two: 16 batches, each probed 4 times by 4."""
    tiny = from_weights(folder)
    curvature = tiny["curvature"] | {"examples": 128, "max_probes": 16}
    return SearchConfig.model_validate(
        tiny | {"curvature": curvature, "methods": ["exact"], "workers": {"count": 2}}
    )


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """An undisturbed search, and three that lost a node, their cluster, or were cancelled."""
    folder = tmp_path_factory.mktemp("cluster")
    store = folder / "store"
    with opened_tokens(store, None) as tokens:
        secret, _ = tokens.make("ann")
    with Nodes() as nodes:
        nodes.start_head()
        nodes.join(2)
        options = ["--ray-address", nodes.dashboard, "--max-searches", "3"]
        server = Server(store, *options, "--allow-path", str(folder))
        server.start()
        try:
            with Client(server.url, secret, patience_seconds=300) as client:
                yield {"store": store} | told(client, nodes, store, config(folder))
        finally:
            server.stop()


def told(client, nodes, store, config):
    """Let it happen, and return what is seen of it."""
    found = {}
    calm = client.submit(config, name="calm", key=None).id
    *_, found["calm"] = client.events(calm)
    probed = list_tasks(nodes.dashboard, filters=[("name", "=", "probe:run")], limit=1000)
    found["places"] = {nodes.name_of(task.node_id) for task in probed}

    ids = {name: client.submit(config, name=name, key=None).id for name in ("a", "b", "c")}
    reach(store, ids["a"], "curvature", "progress")
    found["node killed"] = time.time()
    nodes.kill(place_of_a_worker(nodes, ids["a"]))
    client.cancel(ids["b"])
    until(client, ids["b"], "cancelled")
    reach(store, ids["c"], "curvature", "progress")
    # Ray would end them with its head; where it cannot any more, they have to do so themselves.
    drivers = [driver(store, ids[name]) for name in ("a", "c")]
    nodes.kill("head", sparing=drivers)
    nodes.start_head()
    nodes.join(1)
    client.resume(ids["b"])
    for name, search in ids.items():
        *_, found[name] = client.events(search)
    found["orphans"] = [pid for pid in drivers if os.path.exists(f"/proc/{pid}")]
    return found


def place_of_a_worker(nodes, search):
    """Return the node on which a probe worker of a search is."""
    jobs = [one for one in list_jobs(nodes.dashboard) if search in (one.submission_id or "")]
    workers = [("class_name", "=", "ProbeWorker"), ("job_id", "=", jobs[0].job_id)]
    alive = list_actors(nodes.dashboard, filters=[*workers, ("state", "=", "ALIVE")])
    return nodes.name_of(alive[0].node_id)


def run(story, name):
    return story["store"] / "searches" / story[name].id / "run"


def events(story, name):
    return read_events(run(story, name) / "events.jsonl")


def test_probes_run_on_more_than_one_node(story):
    assert story["places"] == {"node1", "node2"}


@pytest.mark.parametrize(("name", "attempts"), [("calm", 1), ("a", 2), ("b", 2), ("c", 2)])
def test_every_search_succeeds_in_the_end(story, name, attempts):
    assert (story[name].state, story[name].attempt) == ("succeeded", attempts)


def test_a_node_was_lost_while_it_probed_for_the_first(story):
    traced = ("curvature", "finished")
    (finished,) = [e.time for e in events(story, "a") if (e.stage, e.kind) == traced]
    assert story["node killed"] < finished


def test_drivers_end_with_their_cluster(story):
    assert story["orphans"] == []


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_nothing_is_computed_twice_but_the_unit_in_flight(story, name):
    finished = Counter(event.stage for event in events(story, name) if event.kind == "finished")
    assert finished == dict.fromkeys([stage.name for stage in STAGES] + ["report"], 1)
    units = (run(story, name) / "curvature.units.jsonl").read_text().splitlines()[1:]
    assert sorted(json.loads(line)["index"] for line in units) == list(range(UNITS))
    for unit in ("units", "epochs"):
        told = [event.done for event in events(story, name) if event.unit == unit]
        assert told
        assert all(before <= after for before, after in pairwise(told))


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_the_result_is_that_of_the_undisturbed_run(story, name):
    calm, other = (json.loads((run(story, n) / "summary.json").read_text()) for n in ("calm", name))
    assert other["model"]["weights_sha256"] == calm["model"]["weights_sha256"]
    for stage in ("curvature", "tables", "candidates", "calibration", "trials", "test"):
        assert without_seconds(other[stage]) == without_seconds(calm[stage])
