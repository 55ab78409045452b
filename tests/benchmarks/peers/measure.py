"""How one estimator is measured: in a fresh process, step by step, written to a JSON file.

A step is the least that the estimator can be asked for: one probe for most, a few for some. Steps
are kept as sums (how many probes, their mean, their squared deviations from it), from which any
number of steps, of any number of processes, can be pooled.

Memory is the kernel's own peak of this process (``VmHWM``), not ``ru_maxrss``, which starts from
the peak of the process that forked it.
"""

import argparse
import json
import os
import resource
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tests.benchmarks.peers.problem import Problem, load_problem

__all__ = ["Method", "Step", "measure"]


@dataclass(frozen=True, slots=True)
class Step:
    """What one step found.

    Attributes:
        mean: Traces of the mean loss, shape (L,), or (1,) where only their sum is known; empty
            for work that estimates nothing.
        probes: How many probes they are the mean of; 0 where they are exact.
        squares: Σ of the single probes' squared deviations from ``mean``; zeros for one probe.
    """

    mean: NDArray[np.float64]
    probes: int = 1
    squares: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))


# Takes (problem, images a batch), prepares what all steps share, and returns one step.
Method = Callable[[Problem, int], Callable[[], Step]]


def measure(methods: Mapping[str, Method], *packages: str) -> None:
    """Run one method as the command line says.

    Args:
        methods: By the name that the command line gives.
        packages: Distributions whose versions are written down, besides torch and numpy.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=methods)
    parser.add_argument("--problem", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True, help="images a batch")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    # Too much is an error that can be read, not a machine without memory.
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 2 // 3
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    warnings.simplefilter("ignore")  # the peers' own, about their use of torch
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(given.seed)
    problem = load_problem(given.problem)
    with torch.no_grad():
        problem.model(problem.images[:8])  # kernels and threads are made once
    loaded = _memory_mib("VmRSS")

    start = _clock()
    step = methods[given.method](problem, given.batch)
    setup = _since(start)
    steps = []
    for _ in range(given.steps):
        start = _clock()
        found = step()
        seconds = _since(start)
        steps.append(
            {
                **seconds,
                "probes": found.probes,
                "mean": found.mean.tolist(),
                "squares": np.broadcast_to(found.squares, found.mean.shape).tolist(),
            }
        )
    record = {
        "method": given.method,
        "batch": given.batch,
        "seed": given.seed,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "numpy", *packages)},
        "setup": setup,
        "steps": steps,
        "loaded_mib": loaded,
        "peak_mib": _memory_mib("VmHWM"),
    }
    given.out.write_text(json.dumps(record))


def _clock() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _since(start: tuple[float, float]) -> dict[str, float]:
    cpu, wall = _clock()
    return {"cpu_s": cpu - start[0], "wall_s": wall - start[1]}


def _memory_mib(key: str) -> float:
    """Read a line of the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status must have a line {key}, got none")
