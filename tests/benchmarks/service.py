"""The service under load: 1,000 stored searches, one runs, 50 watch it, 200 requests a second.

A real server on this machine, with Ray and a search beside it. The load comes from a process of its
own, which holds the streams open and sends requests when they are due, whether those before are
answered or not: a wait is counted from when its request was due. Lists are of 50 searches, events
those of an ended search, from the first to the last.

    python -m tests.benchmarks.service                          # a minute
    python -m tests.benchmarks.service --seconds 20 --alone     # without a search beside it
"""

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from search.config import SearchConfig
from search.config_file import load_config
from search.events import EventLog
from search.service.client import Client
from search.service.record import Heartbeat
from search.service.store import Store
from search.service.tokens import opened_tokens
from tests.benchmarks.record import ROOT, Row, record

_HOST, _OWNER = "127.0.0.1", "ann"
_NUM_STORED, _NUM_STREAMS, _NUM_EVENTS, _NUM_LISTINGS = 1000, 50, 60, 9
_PER_SECOND, _SENDERS = 200, 32
_START_SECONDS, _WARM_SECONDS = 600.0, 3.0
_KINDS = ("list", "get", "events")


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked.

    Attributes:
        port: Of the server.
        token: To ask with.
        ended: Ids of searches that have ended.
        watched: Id of the search whose events are streamed.
        seconds: For how long.
    """

    port: int
    token: str
    ended: Sequence[str]
    watched: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of it.

    Attributes:
        milliseconds: Of each request, by its kind, from when it was due.
        errors: Requests without a whole answer.
        closed: Streams that did not stay open.
        events: That came by streams, each counted once for each.
    """

    milliseconds: dict[str, list[float]]
    errors: int
    closed: int
    events: int


def main() -> None:
    """Make a store, serve it, load it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--alone", action="store_true", help="no search runs beside it")
    asked = parser.parse_args()
    config = load_config(ROOT / "configs" / "digits.yaml")
    with tempfile.TemporaryDirectory(prefix="hawq-") as folder, ExitStack() as stack:
        ended, waiting = _stored(Path(folder), config)
        with opened_tokens(Path(folder), None) as tokens:
            token, _ = tokens.make(_OWNER)
        server, port = stack.enter_context(_served(Path(folder)))
        watched = waiting
        if not asked.alone:
            watched = stack.enter_context(_searching(port, token, config))
        load = Load(port, token, ended, watched, asked.seconds)
        with get_context("spawn").Pool(1) as pool:
            listing = pool.apply(_listed, (load,))
            used = _cpu_seconds(server)
            answers = pool.apply(_loaded, (load,))
            used = _cpu_seconds(server) - used
    record("service", _rows(answers, listing, used, asked.alone))


def _rows(answers: Answers, listing: float, used: float, alone: bool) -> list[Row]:
    beside = "no search beside it" if alone else "a search beside it"
    rows = [Row(f"list of all {_NUM_STORED:,} searches, {beside}", "", listing, "ms")]
    for kind, times in answers.milliseconds.items():
        for percent in (50, 99):
            subject = f"{kind}, {percent}th percentile at {_PER_SECOND} a second, {beside}"
            rows.append(Row(subject, "", float(np.percentile(times, percent)), "ms"))
    num = sum(map(len, answers.milliseconds.values()))
    return [
        *rows,
        Row(f"errors of {num:,} requests", "", answers.errors, ""),
        Row(f"closed of {_NUM_STREAMS} streams", "", answers.closed, ""),
        Row("events by streams", "", answers.events, ""),
        Row("CPU of the server for a request, streams included", "", 1000 * used / num, "ms"),
    ]


# --- the store and its server ---------------------------------------------------------------------


def _stored(path: Path, config: SearchConfig) -> tuple[list[str], str]:
    """Store searches that have ended, and one that waits for long; return their ids."""
    store, found = Store(path), []
    for i in range(_NUM_STORED):
        search, _ = store.submit(config, owner=_OWNER, name=f"search {i}")
        folder = store.folder(search.id)
        folder.run.mkdir()
        log = EventLog(folder.events)
        for done in range(_NUM_EVENTS):
            log.emit("trials", "progress", done=done, total=_NUM_EVENTS, unit="epochs")
        folder.write(Heartbeat(attempt=1, beat=9, stages=8, host="here", pid=1))
        ended = {"state": "succeeded", "attempt": 1}
        store.change(search.id, lambda r, ended=ended: r.model_copy(update=ended))
        found.append(search.id)
    waiting, _ = store.submit(config, owner=_OWNER, name="waits")
    later = {"not_before": time.time() + 1e6}
    store.change(waiting.id, lambda r: r.model_copy(update=later))
    store.close()
    return found, waiting.id


@contextmanager
def _served(store: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Serve a store; yield the server and its port."""
    with socket.socket() as free:
        free.bind((_HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "search.cli", "serve", "--store", str(store)]
    command += ["--port", str(port), "--rate", "1000000"]
    with (store / "serve.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        _until(lambda: server.poll() is not None or _answers(port))
        yield server, port
    finally:
        server.terminate()
        server.wait()


@contextmanager
def _searching(port: int, token: str, config: SearchConfig) -> Iterator[str]:
    """Have a search run that outlasts the load; yield its id."""
    longer = config.model_dump(mode="json")
    longer["task"]["pretrain"]["epochs"] = 10_000
    with Client(f"http://{_HOST}:{port}", token) as client:
        search = client.submit(SearchConfig.model_validate(longer), name="runs", key=None).id
        _until(lambda: _is_under_way(client, search))
        yield search
        client.cancel(search)
        _until(lambda: client.get(search).state == "cancelled")


def _is_under_way(client: Client, search: str) -> bool:
    found = client.get(search)
    if found.state not in {"queued", "running"}:
        sys.exit(f"bench-service: the search is {found.state}: {found.reason}")
    return found.latest is not None and found.latest.kind == "progress"


def _answers(port: int) -> bool:
    try:
        _asked(http.client.HTTPConnection(_HOST, port, timeout=5), "/v1/health", "")
    except OSError:
        return False
    return True


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            sys.exit(f"bench-service: the service is not ready after {_START_SECONDS:g} s")
        time.sleep(0.2)


def _cpu_seconds(process: subprocess.Popen[bytes]) -> float:
    """Return what a process has used, without its children."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- in the process that loads --------------------------------------------------------------------


def _loaded(load: Load) -> Answers:
    """Watch and ask."""
    stopped = threading.Event()
    streams = [_Stream(load, stopped) for _ in range(_NUM_STREAMS)]
    for stream in streams:
        stream.start()
    time.sleep(_WARM_SECONDS)
    local = threading.local()
    began = time.perf_counter() + 0.1

    def ask(i: int) -> tuple[str, float, bool]:
        kind, due = _KINDS[i % len(_KINDS)], began + i / _PER_SECOND
        time.sleep(max(0.0, due - time.perf_counter()))
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(_HOST, load.port, timeout=30)
        one = f"/v1/searches/{load.ended[i * 7 % len(load.ended)]}"
        path = {"list": "/v1/searches", "get": one, "events": f"{one}/events"}[kind]
        try:
            body = _asked(local.connection, path, load.token)
            is_whole = kind != "events" or body.count(b"data:") == _NUM_EVENTS + 1
        except (OSError, http.client.HTTPException):
            local.connection.close()
            is_whole = False
        return kind, 1000 * (time.perf_counter() - due), is_whole

    with ThreadPoolExecutor(_SENDERS) as senders:
        found = list(senders.map(ask, range(int(_PER_SECOND * load.seconds))))
    closed = sum(not stream.is_alive() for stream in streams)
    stopped.set()
    return Answers(
        {kind: [time for k, time, _ in found if k == kind] for kind in _KINDS},
        sum(not is_whole for *_, is_whole in found),
        closed,
        sum(stream.events for stream in streams),
    )


class _Stream(threading.Thread):
    """Reads a stream of events for as long as it is open, and counts them."""

    def __init__(self, load: Load, stopped: threading.Event) -> None:
        super().__init__(daemon=True)
        self._load, self._stopped, self.events = load, stopped, 0

    def run(self) -> None:
        """Read."""
        connection = http.client.HTTPConnection(_HOST, self._load.port, timeout=60)
        path = f"/v1/searches/{self._load.watched}/events"
        connection.request("GET", path, headers=_headers(self._load.token))
        answer = connection.getresponse()
        while not self._stopped.is_set() and (line := answer.readline()):
            self.events += line.startswith(b"data:")


def _listed(load: Load) -> float:
    """Return the milliseconds of a list of all searches, in as many pages as it takes."""
    connection = http.client.HTTPConnection(_HOST, load.port, timeout=30)
    times = []
    for _ in range(_NUM_LISTINGS):
        started, num, more = time.perf_counter(), 0, ""
        while num < _NUM_STORED:
            page = json.loads(_asked(connection, f"/v1/searches?limit=200{more}", load.token))
            num, more = num + len(page["searches"]), f"&after={page['after']}"
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times))


def _asked(connection: http.client.HTTPConnection, path: str, token: str) -> bytes:
    """Return the body of an answer.

    Raises:
        HTTPException: If it is a refusal.
    """
    connection.request("GET", path, headers=_headers(token))
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != http.client.OK:
        raise http.client.HTTPException(f"{path} must be answered, got {answer.status}")
    return body


def _headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


if __name__ == "__main__":
    main()
