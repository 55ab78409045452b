"""``hawq serve`` in a process of its own, a search of seconds, and looks into its folder."""

import json
import os
import signal
import subprocess
import sys
import time

import httpx
from ray_nodes import free_ports

from search.config import TaskConfig
from search.events import read_events
from search.tasks.build import build_task
from search.tasks.checkpoint import save_state

__all__ = ["TINY", "Server", "driver", "from_weights", "reach", "until", "without_seconds"]

HAWQ = [sys.executable, "-m", "search.cli"]
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


def from_weights(folder):
    """Return ``TINY`` from weights in a file, untrained ones: it then takes fewer seconds still."""
    path = folder / "weights.safetensors"
    model = build_task(TaskConfig.model_validate(TINY["task"]), seed=0).model()
    save_state(path, model.state_dict())
    task = {key: value for key, value in TINY["task"].items() if key != "pretrain"}
    return TINY | {"task": task | {"checkpoint": str(path)}}


class Server:
    """A service of a store, at a port of its own.

    Args:
        store: Folder of the searches.
        options: Of ``hawq serve``.
        environment: Of the process.
    """

    def __init__(self, store, *options, environment=os.environ):
        (port,) = free_ports(1)
        self.store, self.url = store, f"http://127.0.0.1:{port}"
        self.command = [*HAWQ, "serve", "--store", str(store), "--port", str(port), *options]
        self.environment = dict(environment)

    def start(self):
        with (self.store / "served.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=log
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


def driver(store, search):
    """Return the process id of a search's latest driver."""
    return json.loads((store / "searches" / search / "heartbeat.json").read_text())["pid"]


def reach(store, search, stage, kind):
    """Wait until a search's driver has told of something."""
    for _ in range(12000):
        events = read_events(store / "searches" / search / "run" / "events.jsonl")
        if any((event.stage, event.kind) == (stage, kind) for event in events):
            return
        time.sleep(0.1)
    raise AssertionError(events)


def until(client, search, state):
    """Wait until a search is in a state."""
    for _ in range(3000):
        if client.get(search).state == state:
            return
        time.sleep(0.1)
    raise AssertionError(client.get(search))


def without_seconds(found):
    """What does not depend on how fast the machine was."""
    if isinstance(found, dict):
        return {k: without_seconds(v) for k, v in found.items() if not k.endswith("seconds")}
    return [without_seconds(v) for v in found] if isinstance(found, list) else found
