"""Trace estimation on Ray workers: units of ``hawq.curvature`` out, partial sums in.

Workers hold the network and the data; the driver holds the results. A unit is a pure function of
its index, so one that was lost with its worker is simply done again, and the sums have the same
bits for any number of workers. Finished units are on disk at once: a stopped estimation goes on.
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, cast

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import ObjectLostError, RayActorError
from torch import Tensor

from hawq.curvature import (
    Reducer,
    TraceEstimate,
    TracePlan,
    UnitSums,
    output_curvature,
    run_unit,
)
from hawq.curvature.power_iteration import TopEigenvalues, top_eigenvalues
from hawq.curvature.surface import loss_surface
from hawq.task import Task, moved
from search.errors import InputError
from search.unit_file import UnitFile

__all__ = ["ProbeWorker", "WorkerPool", "estimate_on_workers"]

# Enough to hide the round trip, few enough that an early stop wastes little.
_IN_FLIGHT = 2
_MAX_LOST_WORKERS = 20
# Examples a call of looking.
_LOOK_CHUNK = 1024


class ProbeWorker:
    """One replica of the network. A plain class: it needs no cluster to run.

    Args:
        task: Builds the network and its examples.
        state: Weights to search, by name.
        num_threads: Of torch.
        device: Where the network runs.
        micro_batch: Examples in memory at once; None for a whole unit's.
    """

    def __init__(
        self,
        task: Task,
        state: dict[str, Tensor],
        num_threads: int,
        device: str,
        micro_batch: int | None = None,
    ) -> None:
        torch.set_num_threads(num_threads)
        self._task, self._device, self._micro_batch = task, device, micro_batch
        self._model = task.model()
        self._model.load_state_dict(state)
        self._model.to(device).eval()

    def answer(self) -> None:
        """Say that the network is there."""

    def run(self, plan: TracePlan, index: int) -> tuple[UnitSums, float, int]:
        """Do one unit; return it, the CPU seconds, and how many examples fitted into memory."""
        started = time.process_time()
        while True:
            micro_batch = self._micro_batch or plan.batch_size
            try:
                unit = run_unit(self._task, self._model, plan, index, micro_batch=micro_batch)
            except RuntimeError as error:  # a GPU's is an OutOfMemoryError, the CPU's has no name
                if not _is_out_of_memory(error) or micro_batch == 1:
                    raise
                self._micro_batch = micro_batch // 2
                continue
            return unit, time.process_time() - started, micro_batch

    def look(
        self, split: str, examples: Sequence[int], batch_size: int
    ) -> tuple[list[float], float, int]:
        """Return the curvature of examples' outputs, and the rest as ``run`` does.

        In bfloat16 where the machine has it, and every operator of the network: twice as fast, and
        it only decides who is drawn.
        """
        started = time.process_time()
        found: list[float] = []
        for part in torch.tensor(examples).split(batch_size):
            batch = moved(self._task.batch(split, part), self._device)
            try:
                with _half_precision(self._device):
                    curvature = output_curvature(self._task, self._model, batch)
            except RuntimeError as error:  # as '"bessel_j0_cpu" not implemented for 'BFloat16''
                if "BFloat16" not in str(error):
                    raise
                curvature = output_curvature(self._task, self._model, batch)
            found += curvature.tolist()
        return found, time.process_time() - started, batch_size

    def eigenvalues(
        self, layers: Sequence[str], arguments: dict[str, Any]
    ) -> tuple[TopEigenvalues, float, int]:
        """Find a block's top eigenvalues; return them as ``run`` does a unit."""
        started = time.process_time()
        found = top_eigenvalues(self._task, self._model, layers, **arguments)
        found = replace(found, vectors=moved(found.vectors, "cpu"))
        return found, time.process_time() - started, arguments["batch_size"]

    def surface(
        self,
        layers: Sequence[str],
        directions: tuple[Sequence[Tensor], Sequence[Tensor]],
        arguments: dict[str, Any],
    ) -> tuple[NDArray[np.float64], float, int]:
        """Evaluate the loss around the weights; return it as ``run`` does a unit."""
        started = time.process_time()
        here = moved(directions, self._device)
        found = loss_surface(self._task, self._model, layers, here, **arguments)
        return found, time.process_time() - started, arguments["batch_size"]


def _half_precision(device: str) -> AbstractContextManager[Any]:
    has_it = device != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device, torch.bfloat16) if has_it else nullcontext()


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


RemoteProbeWorker = ray.remote(ProbeWorker)


class WorkerPool:
    """Replicas on a Ray cluster, replaced when they die. They start while the caller goes on.

    Args:
        task: Sent to every worker; small, because it only describes.
        state: Weights, put into the object store once.
        workers: How many replicas.
        cpus: CPUs, and threads, of each.
        gpus: GPUs of each; may be a fraction.
        micro_batch: Examples in memory at once; None for a whole unit's.

    Attributes:
        cpu_seconds: What all calls took.
    """

    def __init__(
        self,
        task: Task,
        state: dict[str, Tensor],
        *,
        workers: int,
        cpus: float = 1,
        gpus: float = 0,
        micro_batch: int | None = None,
    ) -> None:
        device = "cuda" if gpus else "cpu"
        self._remote = RemoteProbeWorker.options(num_cpus=cpus, num_gpus=gpus)
        self._arguments = (task, ray.put(state), max(1, int(cpus)), device, micro_batch)
        self._workers = [self._start() for _ in range(workers)]
        self._lost = 0
        self.cpu_seconds = 0.0

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            ray.kill(worker)

    def look(
        self, split: str, examples: Sequence[int], batch_size: int, progress: Callable[[int], None]
    ) -> Tensor:
        """Tell the curvature of examples' outputs; ``progress`` hears how many are done."""
        chunks = [examples[i : i + _LOOK_CHUNK] for i in range(0, len(examples), _LOOK_CHUNK)]
        found: dict[int, list[float]] = {}
        calls = {i: (split, chunk, batch_size) for i, chunk in enumerate(chunks)}
        for i, (values, _) in self.results("look", calls):
            found[i] = values
            progress(sum(map(len, found.values())))
        return torch.tensor([v for i in sorted(found) for v in found[i]], dtype=torch.float64)

    def results(
        self, method: str, calls: dict[int, tuple[Any, ...]]
    ) -> Generator[tuple[int, tuple[Any, int]]]:
        """Yield each call's result with its key, as they come; closing drops the rest.

        Raises:
            InputError: If a worker cannot build the task.
            RayActorError: If workers keep dying.
            ObjectLostError: If their results keep being lost.
        """
        waiting = list(reversed(calls))
        flights: dict[ray.ObjectRef[Any], tuple[int, ActorHandle[ProbeWorker]]] = {}
        greeted: dict[ray.ObjectRef[Any], ActorHandle[ProbeWorker]] = {}
        present: list[ActorHandle[ProbeWorker]] = []

        def launch(worker: ActorHandle[ProbeWorker]) -> None:
            if waiting:
                key = waiting.pop()
                call = getattr(worker, method).options(name=f"probe:{method}")
                flights[call.remote(*calls[key])] = (key, worker)

        def greet(worker: ActorHandle[ProbeWorker]) -> None:
            """Give no work to a worker before it answers: it may wait for its place for ever."""
            greeted[worker.answer.options(name="probe:answer").remote()] = worker

        for worker in self._workers:
            greet(worker)
        while waiting or flights:
            (ready,), _ = ray.wait([*flights, *greeted], num_returns=1)
            is_answer = ready in greeted
            key, worker = (-1, greeted.pop(ready)) if is_answer else flights.pop(ready)
            try:
                answer = ray.get(ready)
            except (RayActorError, ObjectLostError) as error:
                if not is_answer:
                    waiting.append(key)
                if worker in self._workers:
                    greet(self._replacement(worker, error))
                for other in present:  # who may have nothing to do by now
                    if other in self._workers:
                        launch(other)
                continue
            if is_answer:
                present.append(worker)
                for _ in range(_IN_FLIGHT):
                    launch(worker)
                continue
            result, seconds, micro_batch = answer
            self.cpu_seconds += seconds
            yield key, (result, micro_batch)
            if worker in self._workers:
                launch(worker)

    def _start(self) -> ActorHandle[ProbeWorker]:
        return cast("ActorHandle[ProbeWorker]", self._remote.remote(*self._arguments))

    def _replacement(
        self, worker: ActorHandle[ProbeWorker], error: RayActorError | ObjectLostError
    ) -> ActorHandle[ProbeWorker]:
        """Start another for a worker that is lost, or whose large result is, with its node."""
        if isinstance(error, RayActorError) and error.actor_init_failed:
            reason = str(error).strip().splitlines()[-1]
            raise InputError(f"a worker must be able to build the task, got {reason}") from error
        self._lost += 1
        if self._lost > _MAX_LOST_WORKERS:
            raise error
        ray.kill(worker)
        replacement = self._start()
        self._workers[self._workers.index(worker)] = replacement
        return replacement


def estimate_on_workers(
    pool: WorkerPool,
    plan: TracePlan,
    *,
    units: UnitFile,
    on_unit: Callable[[Reducer], None] = lambda _: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> TraceEstimate:
    """Carry out a plan on Ray workers; the same bits as ``hawq.curvature.estimate_traces``.

    Args:
        pool: The workers.
        plan: What to estimate.
        units: Where finished units are kept.
        on_unit: Called when a unit is done.
        on_note: Told when the memory was not enough for a unit at once.

    Raises:
        InputError: If a worker cannot build the task.
        RayActorError: If workers keep dying.
        NonFiniteTraceError: If a loss or trace is NaN or infinite.
    """
    reducer = Reducer(plan)
    for index, unit in units.read(plan.names[: plan.num_sites]):
        reducer.add(index, unit)
    shared, smallest = ray.put(plan), plan.batch_size
    results = pool.results("run", {index: (shared, index) for index in reducer.missing})
    for index, (unit, micro_batch) in results:
        if micro_batch < smallest:
            smallest = micro_batch
            on_note(f"{micro_batch} examples at once, as memory allows")
        units.append(index, unit)
        reducer.add(index, unit)
        on_unit(reducer)
        if reducer.finished:
            break
    results.close()
    assert reducer.estimate is not None
    return reducer.estimate
