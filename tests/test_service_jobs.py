"""Attempts as jobs of a real Ray cluster, which this test starts and ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

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


def free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def dashboard():
    """Address of the dashboard of a cluster of its own, so that nobody else's is met."""
    gcs, board, client, agent = free_ports(4)
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short, for sockets are in it
    options = [f"--port={gcs}", f"--dashboard-port={board}", f"--ray-client-server-port={client}"]
    options += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--num-cpus=1"]
    head = subprocess.Popen(
        [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    yield f"http://127.0.0.1:{board}"
    os.killpg(head.pid, signal.SIGTERM)
    head.wait(60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def jobs(dashboard):
    jobs = RayJobs(dashboard, sys.executable)
    for _ in range(240):
        try:
            jobs.seen()
            return jobs
        except UnreachableError:
            time.sleep(0.5)
    raise AssertionError("the cluster does not answer")


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
