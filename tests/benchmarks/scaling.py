"""One and two single-threaded workers on the same traces: the rate, and the same bits.

Needs the data that ``HAWQ_DATA`` names.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from hawq.curvature import TraceEstimate, plan_traces
from hawq.space import quantizable_layers
from search.cluster import connected
from search.probes import UnitFile, WorkerPool, estimate_on_workers
from search.tasks.checkpoint import load_weights
from search.tasks.classification import ClassificationTask
from tests.benchmarks.record import Row, record

_ROUNDS = 3


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
        task, model, list(quantizable_layers(model)), estimator="exact_gauss_newton", pool=None
    )
    seconds: dict[int, list[float]] = {1: [], 2: []}
    found: dict[int, TraceEstimate] = {}
    with connected(None, dashboard=False), tempfile.TemporaryDirectory() as folder:
        for repetition in range(_ROUNDS):
            for workers, times in seconds.items():
                with WorkerPool(task, model.state_dict(), workers=workers) as pool:
                    pool.look("train", range(2048), 64, lambda _: None)  # they are up
                    units = UnitFile(Path(folder) / f"{repetition}.{workers}", "")
                    started = time.monotonic()
                    found[workers] = estimate_on_workers(pool, plan, units=units)
                    times.append(time.monotonic() - started)
    same = np.array_equal(found[1].trace, found[2].trace)
    one, two = (float(np.median(seconds[workers])) for workers in (1, 2))
    rows = [
        Row("exact Gauss–Newton, ResNet20, 512 images, 1 worker", "", one, "s"),
        Row("exact Gauss–Newton, ResNet20, 512 images, 2 workers", "", two, "s"),
        Row("rate of 2 workers", "1 worker", one / two, "×"),
        Row("same bits from 1 and 2 workers", "", float(same), "1 = yes"),
    ]
    record("scaling", rows)


if __name__ == "__main__":
    main()
