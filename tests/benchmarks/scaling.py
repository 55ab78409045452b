"""One and two single-threaded workers on the same traces: the rate, and the same bits.

Beside it what the machine gives two processes that share nothing: plain training steps, one process
against two at once. Needs the data that ``HAWQ_DATA`` names.
"""

import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from hawq.curvature import TraceEstimate, plan_traces
from hawq.space import quantizable_layers
from search.cluster import connected
from search.probes import WorkerPool, estimate_on_workers
from search.tasks.checkpoint import load_weights
from search.tasks.classification import ClassificationTask
from search.tasks.networks import SmallResNet
from search.unit_file import UnitFile
from tests.benchmarks.record import Row, record

# So many that starting up, which no worker shares, does not hide the rate.
_ROUNDS, _STEPS, _EXAMPLES = 3, 12, 2048


def main() -> None:
    """Alternate one worker and two; workers are up before the clock starts."""
    root = os.environ.get("HAWQ_DATA")
    if not root or not (Path(root) / "cifar10").exists():
        sys.exit("bench-scaling: HAWQ_DATA must name the folder with cifar10 and checkpoints")
    torch.set_num_threads(1)
    task = ClassificationTask("cifar10", str(Path(root) / "cifar10"), "resnet20", 5000)
    model = task.model()
    load_weights(model, Path(root) / "checkpoints" / "resnet20_cifar10.safetensors")
    plan, _ = plan_traces(
        task,
        model,
        list(quantizable_layers(model)),
        estimator="exact_gauss_newton",
        num_examples=_EXAMPLES,
        pool=None,
    )
    seconds: dict[int, list[float]] = {1: [], 2: []}
    cpu_seconds: dict[int, list[float]] = {1: [], 2: []}
    alone: dict[int, list[float]] = {1: [], 2: []}
    found: dict[int, TraceEstimate] = {}
    with connected(None, dashboard=False), tempfile.TemporaryDirectory() as folder:
        for repetition in range(_ROUNDS):
            for processes, times in alone.items():
                times.append(_steps(processes))
            for workers, times in seconds.items():
                with WorkerPool(task, model.state_dict(), workers=workers) as pool:
                    pool.look("train", range(2048), 64, lambda _: None)  # they are up
                    units = UnitFile(Path(folder) / f"{repetition}.{workers}", "")
                    started, used = time.monotonic(), pool.cpu_seconds
                    found[workers] = estimate_on_workers(pool, plan, units=units)
                    times.append(time.monotonic() - started)
                    cpu_seconds[workers].append(pool.cpu_seconds - used)
    same = np.array_equal(found[1].trace, found[2].trace)
    one, two = (float(np.median(seconds[workers])) for workers in (1, 2))
    cpu_one, cpu_two = (float(np.median(cpu_seconds[workers])) for workers in (1, 2))
    ceiling = 2 * float(np.median(alone[1])) / float(np.median(alone[2]))
    rows = [
        Row("exact Gauss–Newton, ResNet20, 2,048 images, 1 worker", "", one, "s"),
        Row("exact Gauss–Newton, ResNet20, 2,048 images, 2 workers", "", two, "s"),
        Row("rate of 2 workers", "1 worker", one / two, "×"),
        Row("rate of 2 processes that share nothing", "1 process", ceiling, "×"),
        Row("CPU-seconds of 2 workers", "1 worker", cpu_two / cpu_one, "×"),
        Row("same bits from 1 and 2 workers", "", float(same), "1 = yes"),
    ]
    record("scaling", rows)


def _steps(processes: int) -> float:
    """Return the seconds until every process has done the same training steps."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        wait([pool.submit(_work, 1) for _ in range(processes)])  # they are up
        started = time.monotonic()
        wait([pool.submit(_work, _STEPS) for _ in range(processes)])
        return time.monotonic() - started


def _work(steps: int) -> None:
    torch.set_num_threads(1)
    model = SmallResNet(20).train()
    images = torch.zeros(128, 3, 32, 32)
    for _ in range(steps):
        model(images).square().sum().backward()


if __name__ == "__main__":
    main()
