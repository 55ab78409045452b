"""Trace estimation on Ray workers: units of ``hawq.curvature`` out, partial sums in.

Workers hold the network and the data; the driver holds the results. A unit is a pure function of
its index, so one that was lost with its worker is simply done again, and the sums have the same
bits for any number of workers. Finished units are on disk at once: a stopped estimation goes on.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from torch import Tensor

from hawq.curvature import Reducer, TraceEstimate, TracePlan, UnitSums, run_unit
from hawq.task import Task
from search.errors import InputError

__all__ = ["ProbeWorker", "UnitFile", "estimate_on_workers"]

# Enough to hide the round trip, few enough that an early stop wastes little.
_IN_FLIGHT = 2
_MAX_LOST_WORKERS = 20


class ProbeWorker:
    """One replica of the network. A plain class: it needs no cluster to run.

    Args:
        task: Builds the network and its examples.
        state: Weights to search, by name.
        plan: What is estimated.
        num_threads: Of torch.
        device: Where the network runs.
    """

    def __init__(
        self, task: Task, state: dict[str, Tensor], plan: TracePlan, num_threads: int, device: str
    ) -> None:
        torch.set_num_threads(num_threads)
        self._task, self._plan = task, plan
        self._model = task.model()
        self._model.load_state_dict(state)
        self._model.to(device)

    def run(self, index: int) -> tuple[UnitSums, float]:
        """Do one unit; return it and the CPU seconds that it took."""
        started = time.process_time()
        unit = run_unit(self._task, self._model, self._plan, index)
        return unit, time.process_time() - started


RemoteProbeWorker = ray.remote(ProbeWorker)


class UnitFile:
    """Finished units on disk, one JSON line each, under a line that names their inputs.

    Args:
        path: The file.
        inputs: Hash of what the units depend on; units of other inputs are discarded.
    """

    def __init__(self, path: Path, inputs: str) -> None:
        self._path = path
        self._header = json.dumps({"inputs": inputs})

    def read(self) -> Iterator[tuple[int, UnitSums]]:
        """Yield the units; a line cut short by a crash is left out."""
        lines = self._path.read_text().split("\n") if self._path.exists() else []
        if not lines or lines[0] != self._header:
            self._path.write_text(self._header + "\n")
            return
        whole = lines[:-1]
        for line in whole[1:]:
            entry = json.loads(line)
            yield (
                entry["index"],
                UnitSums(
                    entry["batch"],
                    entry["num_examples"],
                    entry["num_probes"],
                    np.array(entry["total"]),
                    np.array(entry["square"]),
                    np.array(entry["moment"]),
                ),
            )
        if lines[-1]:
            self._path.write_text("\n".join(whole) + "\n")

    def append(self, index: int, unit: UnitSums) -> None:
        """Add one unit. JSON keeps every bit of a float."""
        entry = {
            "index": index,
            "batch": unit.batch,
            "num_examples": unit.num_examples,
            "num_probes": unit.num_probes,
            "total": unit.total.tolist(),
            "square": unit.square.tolist(),
            "moment": unit.moment.tolist(),
        }
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def estimate_on_workers(
    task: Task,
    state: dict[str, Tensor],
    plan: TracePlan,
    *,
    units: UnitFile,
    workers: int,
    cpus: float = 1,
    gpus: float = 0,
    on_unit: Callable[[Reducer], None] = lambda _: None,
) -> tuple[TraceEstimate, float]:
    """Carry out a plan on Ray workers; the same bits as ``hawq.curvature.estimate_traces``.

    Args:
        task: Sent to every worker; small, because it only describes.
        state: Weights, put into the object store once.
        plan: What to estimate.
        units: Where finished units are kept.
        workers: How many replicas.
        cpus: CPUs, and threads, of each.
        gpus: GPUs of each; may be a fraction.
        on_unit: Called when a unit is done.

    Returns:
        The estimate, and the CPU seconds of all units done now.

    Raises:
        InputError: If a worker cannot build the task.
        RayActorError: If workers keep dying.
        NonFiniteTraceError: If a loss or trace is NaN or infinite.
    """
    reducer = Reducer(plan)
    for index, unit in units.read():
        reducer.add(index, unit)
    if reducer.finished:
        assert reducer.estimate is not None
        return reducer.estimate, 0.0
    device = "cuda" if gpus else "cpu"
    remote = RemoteProbeWorker.options(num_cpus=cpus, num_gpus=gpus, name=None)
    arguments = (task, ray.put(state), plan, max(1, int(cpus)), device)

    def start() -> ActorHandle[ProbeWorker]:
        return cast("ActorHandle[ProbeWorker]", remote.remote(*arguments))

    pool = [start() for _ in range(min(workers, len(reducer.missing)))]
    waiting = list(reversed(reducer.missing))
    flights: dict[ray.ObjectRef[Any], tuple[int, ActorHandle[ProbeWorker]]] = {}
    cpu_seconds, lost = 0.0, 0

    def launch(worker: ActorHandle[ProbeWorker]) -> None:
        if waiting:
            index = waiting.pop()
            flights[worker.run.options(name="probe:trace").remote(index)] = (index, worker)

    try:
        for _ in range(_IN_FLIGHT):
            for worker in pool:
                launch(worker)
        while not reducer.finished:
            (ready,), _ = ray.wait(list(flights), num_returns=1)
            index, worker = flights.pop(ready)
            try:
                unit, seconds = ray.get(ready)
            except RayActorError as error:
                if error.actor_init_failed:
                    reason = str(error).strip().splitlines()[-1]
                    raise InputError(
                        f"a worker must be able to build the task, got {reason}"
                    ) from error
                # Its worker is gone: another takes its place, and its units are done again.
                lost += 1
                if lost > _MAX_LOST_WORKERS:
                    raise
                waiting.append(index)
                if worker in pool:
                    ray.kill(worker)
                    pool.remove(worker)
                    pool.append(start())
                    launch(pool[-1])
                continue
            cpu_seconds += seconds
            units.append(index, unit)
            reducer.add(index, unit)
            on_unit(reducer)
            launch(worker)
    finally:
        for worker in pool:
            ray.kill(worker)
    assert reducer.estimate is not None
    return reducer.estimate, cpu_seconds
