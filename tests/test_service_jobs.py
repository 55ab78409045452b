"""Attempts as jobs of a real Ray cluster, which this test starts and ends."""

import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from ray_nodes import Nodes

from search.config import SearchConfig
from search.service.launcher import Seen, UnreachableError
from search.service.ray_jobs import RayJobs
from search.service.record import Record
from search.service.store import Store

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

# Refused by the driver itself, before anything is computed.
NOWHERE = SearchConfig.model_validate(
    {
        "task": {"data": "cifar10", "root": "/nowhere", "checkpoint": "/nowhere/weights.pt"},
        "budgets": [{"average_bits": 3}],
    }
)


@pytest.fixture(scope="module")
def jobs():
    with Nodes() as nodes:
        nodes.start_head(cpus=1)
        yield RayJobs(nodes.dashboard, sys.executable)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


def begun(store):
    search, _ = store.submit(NOWHERE, owner="ann", name="nowhere")
    state = {"state": "running", "attempt": 1}
    return store.change(search.id, lambda record: record.model_copy(update=state))


def wait_for(jobs, record, job):
    for _ in range(600):
        seen = jobs.seen().get(record.attempt_id, Seen("absent"))
        if seen.job == job:
            return seen
        time.sleep(0.2)
    raise AssertionError(seen)


def test_an_attempt_is_a_job_once_and_leaves_its_outcome_in_the_store(jobs, store):
    record = begun(store)
    folder = store.folder(record.id)
    jobs.launch(record, folder)
    jobs.launch(record, folder)
    wait_for(jobs, record, "ended")
    outcome = folder.outcome()
    assert (outcome.attempt, outcome.ended) == (1, "refused")
    assert "/nowhere" in outcome.reason
    assert "/nowhere" in folder.log(1).read_text()
    assert folder.heartbeat().attempt == 1


def test_a_cancelled_attempt_ends_by_itself_or_by_ray(jobs, store):
    record = begun(store)
    folder = store.folder(record.id)
    store.change(record.id, Record.cancelled)  # before it could begin
    jobs.launch(record, folder)
    seen = wait_for(jobs, record, "ended")
    assert folder.outcome() is None, seen
    jobs.stop(record.attempt_id)  # of what has ended: nothing happens


def test_a_cluster_that_is_away_is_no_answer():
    jobs = RayJobs("http://127.0.0.1:9", sys.executable)
    with pytest.raises(UnreachableError, match="does not answer"):
        jobs.seen()


def test_a_cluster_that_is_silent_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UnreachableError, match="timed out"):
            RayJobs(address, sys.executable, answer_seconds=0.2).seen()


class Refusal(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(401)

    def log_message(self, *_):
        pass


def test_a_cluster_that_wants_another_token_is_no_answer():
    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        Thread(target=server.handle_request).start()
        jobs = RayJobs(f"http://127.0.0.1:{server.server_port}", sys.executable)
        with pytest.raises(UnreachableError, match="Authentication required"):
            jobs.seen()
