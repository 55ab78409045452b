"""A day in the life of the service: searches, a cancelled one, and a service that is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter

import httpx
import pytest
import yaml

from search.config_file import load_config
from search.events import Event, read_events
from search.pipeline import STAGES
from search.service.client import Client
from search.service.tokens import opened_tokens

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

TINY = {
    "task": {
        "data": "digits",
        "network": "resnet8",
        "search_size": 100,
        "pretrain": {"epochs": 1, "batch_size": 64, "lr": 0.05},
    },
    "curvature": {
        "examples": 64,
        "batch_size": 8,
        "pool": None,
        "estimator": "hutchinson",
        "max_probes": 8,
        "stop": "count",
    },
    "weights": {"bits": [2, 4, 8]},
    "budgets": [{"average_bits": 3}],
    "methods": ["uniform", "exact"],
    "calibration": {"examples": 32, "choices": 2, "draws": 2, "interactions": 0},
    "finetune": {"epochs": 1, "batch_size": 64, "examples_per_epoch": 128},
    "workers": {"count": 1},
    "trials": {"max_concurrent": 1},
}
HAWQ = [sys.executable, "-m", "search.cli"]


class Server:
    """``hawq serve`` in a process of its own."""

    def __init__(self, store, port):
        self.store, self.port = store, port
        self.url = f"http://127.0.0.1:{port}"

    def start(self):
        environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
        with (self.store / "served.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*HAWQ, "serve", "--store", str(self.store), "--port", str(self.port)],
                env=environment,
                stdout=log,
                stderr=log,
            )
        for _ in range(600):
            assert self.process.poll() is None, self.log()
            try:
                httpx.get(f"{self.url}/v1/health")
                return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(self.log())

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)

    def log(self):
        return (self.store / "served.log").read_text()


@pytest.fixture(scope="module")
def story(tmp_path_factory, unused_port):
    """An undisturbed search, and one that was cancelled, resumed, and lost its service."""
    folder = tmp_path_factory.mktemp("story")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    config = load_config(path)
    store = folder / "store"
    with opened_tokens(store, None) as tokens:
        secret, _ = tokens.make("ann")
    server = Server(store, unused_port)
    server.start()
    found = {"store": store, "server": server}
    try:
        with Client(server.url, secret, patience_seconds=300) as client:
            calm = client.submit(config, name="calm", key="calm").id
            *found["seen"], _ = client.events(calm)
            found["calm"] = client.get(calm)

            wild = client.submit(config, name="wild", key="wild").id
            reach(store, wild, "curvature", "progress")
            client.cancel(wild)
            until(client, wild, "cancelled")
            found["cancelled"] = os.path.exists(f"/proc/{driver(store, wild)}")
            client.resume(wild)
            reach(store, wild, "calibration", "started")
            found["orphan"] = driver(store, wild)
            server.kill()
            server.start()
            found["again"] = client.submit(config, name="calm", key="calm")
            *_, found["wild"] = client.events(wild)
            yield found
    finally:
        server.stop()


@pytest.fixture(scope="module")
def unused_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def driver(store, search):
    return json.loads((store / "searches" / search / "heartbeat.json").read_text())["pid"]


def reach(store, search, stage, kind):
    """Wait until a search's driver has told of something."""
    for _ in range(3000):
        events = read_events(store / "searches" / search / "run" / "events.jsonl")
        if any((event.stage, event.kind) == (stage, kind) for event in events):
            return
        time.sleep(0.1)
    raise AssertionError(events)


def until(client, search, state):
    for _ in range(600):
        if client.get(search).state == state:
            return
        time.sleep(0.1)
    raise AssertionError(client.get(search))


def without_seconds(found):
    """What does not depend on how fast the machine was."""
    if isinstance(found, dict):
        return {k: without_seconds(v) for k, v in found.items() if not k.endswith("seconds")}
    return [without_seconds(v) for v in found] if isinstance(found, list) else found


def run(story, name):
    return story["store"] / "searches" / story[name].id / "run"


def test_a_search_is_watched_to_its_success(story):
    assert story["calm"].state == "succeeded"
    assert story["calm"].attempt == 1
    assert story["seen"] == read_events(run(story, "calm") / "events.jsonl")
    assert all(isinstance(event, Event) for event in story["seen"])


def test_a_cancelled_searchs_driver_is_gone(story):
    assert story["cancelled"] is False


def test_the_search_goes_on_when_the_service_was_killed(story):
    assert story["wild"].state == "succeeded"
    assert story["wild"].attempt == 3
    assert not os.path.exists(f"/proc/{story['orphan']}")


def test_a_submission_that_is_repeated_after_a_kill_is_the_same(story):
    assert story["again"].id == story["calm"].id


def test_the_result_is_that_of_the_undisturbed_run(story):
    calm, wild = (
        json.loads((run(story, n) / "summary.json").read_text()) for n in ("calm", "wild")
    )
    assert wild["model"]["weights_sha256"] == calm["model"]["weights_sha256"]
    for stage in ("curvature", "tables", "candidates", "calibration", "test"):
        assert without_seconds(wild[stage]) == without_seconds(calm[stage])


def test_nothing_is_computed_twice_but_the_unit_in_flight(story):
    events = read_events(run(story, "wild") / "events.jsonl")
    finished = Counter(event.stage for event in events if event.kind == "finished")
    assert set(finished.values()) == {1}
    assert set(finished) == {stage.name for stage in STAGES} | {"report"}
    units = (run(story, "wild") / "curvature.units.jsonl").read_text().splitlines()[1:]
    indices = [json.loads(line)["index"] for line in units]
    assert len(indices) == len(set(indices))


def test_ray_asks_for_a_token_that_others_cannot_read(story):
    token = story["store"] / "ray.token"
    assert token.stat().st_mode & 0o777 == 0o600
    for path in story["store"].rglob("*.log"):
        assert token.read_text() not in path.read_text()
