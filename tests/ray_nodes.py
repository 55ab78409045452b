"""A Ray cluster of several nodes on this machine, apart from every other one, to be killed."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from ray.util import get_node_ip_address
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException
from requests import RequestException

__all__ = ["Nodes", "free_ports", "processes_under"]

RAY = str(Path(sys.executable).parent / "ray")
OPTIONS = ["--block", "--min-worker-port=0", "--max-worker-port=0"]
OPTIONS += ["--object-store-memory=100000000", "--include-log-monitor=false"]


class Nodes:
    """A head, and nodes that join it; use it as a context manager.

    Args:
        settings: Of Ray, for the environment of all its processes.
    """

    def __init__(self, settings=None):
        self.environment = {**os.environ, **(settings or {})}
        self.folder = Path(tempfile.mkdtemp(dir="/tmp"))  # short, for sockets are in it
        self.gcs, self.board, self.client = free_ports(3)
        self.address = f"{get_node_ip_address()}:{self.gcs}"
        self.dashboard = f"http://127.0.0.1:{self.board}"
        self.running, self.commands, self.folders = {}, {}, {}
        self.joined = self.started = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for name in list(self.running):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def start_head(self, cpus=0):
        """Start the head, always on the same address, and wait until its dashboard answers."""
        ports = [f"--port={self.gcs}", f"--dashboard-port={self.board}"]
        ports.append(f"--ray-client-server-port={self.client}")
        self._start("head", "--head", f"--num-cpus={cpus}", *ports)
        self._wait(1)

    def join(self, count):
        """Start nodes of two CPUs, wait for them, and return their names."""
        names = []
        for _ in range(count):
            self.joined += 1
            names.append(f"node{self.joined}")
            address = f"--address={self.address}"
            place = f'--resources={{"{names[-1]}": 1}}'
            self._start(names[-1], address, "--num-cpus=2", place)
        self._wait(1 + count)
        return names

    def name_of(self, node_id):
        """Return which node has Ray's id."""
        (node,) = [node for node in self._alive() if node.node_id == node_id]
        return next((n for n in self.running if n in node.resources_total), "head")

    def kill(self, name, *, sparing=()):
        """Kill -9 a node and all that runs on it but ``sparing``."""
        process = self.running.pop(name)
        doomed = processes_under(process.pid)
        process.kill()
        for pid in doomed:
            if pid not in sparing:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()

    def _start(self, name, *options):
        self.commands[name] = [RAY, "start", *OPTIONS, *options]
        self._run(name)

    def _run(self, name):
        (agent,) = free_ports(1)
        # A folder each time: sockets of nodes that start at once would have one name, and Ray takes
        # what a dead head left there, with a node that still looks for it, for a head that lives.
        self.started += 1
        self.folders[name] = self.folder / str(self.started)
        own = [f"--temp-dir={self.folders[name]}"]
        own.append(f"--dashboard-agent-listen-port={agent}")
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [*self.commands[name], *own],
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )

    def _wait(self, count):
        """Wait for so many nodes; one whose agent was slow gives up, and is started again."""
        tries = Counter()
        while len(self._alive()) < count:
            for name, process in list(self.running.items()):
                if process.poll() is not None:
                    tries[name] += 1
                    assert tries[name] < 9, (self.folder / f"{name}.log").read_text()
                    self.kill(name)
                    self._run(name)
            time.sleep(0.5)

    def _alive(self):
        with suppress(RayStateApiException, RequestException, ConnectionError):
            return list_nodes(self.dashboard, filters=[("state", "=", "ALIVE")], timeout=10)
        return []


def free_ports(count):
    """Return ports of this machine at which nobody listens."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def processes_under(pid):
    """Return the children of a process, their children, and so on."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # The name, in brackets, may hold anything.
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]
