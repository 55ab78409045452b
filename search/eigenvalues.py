"""Top eigenvalues of blocks on the cluster: a block is a unit of work."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawq.curvature import DrawnExamples, drawn_examples
from hawq.curvature.power_iteration import TopEigenvalues
from hawq.task import Task
from search.cluster import num_workers
from search.config import CurvatureConfig, WorkersConfig
from search.probes import WorkerPool
from search.tracing import Progress

__all__ = ["BlockSurface", "Eigenvalues", "eigenvalues_on_cluster"]

# Points a side of a surface, and what the largest eigenvalue adds to the loss at its edge.
_POINTS, _ADDED_LOSS = 15, 1.0


@dataclass(frozen=True, slots=True)
class BlockSurface:
    """The loss around a block's weights, rows and columns along its first two eigenvectors."""

    block: str
    eigenvalues: tuple[float, float]
    offsets: NDArray[np.float64]
    losses: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Eigenvalues:
    """What came out: by block, in the network's order, and the surfaces of two of them."""

    found: dict[str, TopEigenvalues]
    surfaces: list[BlockSurface]
    drawn: DrawnExamples
    workers: int
    cpu_seconds: float
    seconds: float


def eigenvalues_on_cluster(
    task: Task,
    state: dict[str, Tensor],
    blocks: Mapping[str, Sequence[str]],
    *,
    settings: CurvatureConfig,
    workers: WorkersConfig,
    seed: int,
    progress: Progress = lambda *_: None,
    note: Callable[[str], None] = lambda _: None,
) -> Eigenvalues:
    """Find the top eigenvalue of every block's Hessian, and look at two blocks' surroundings.

    Args:
        task: The network, its data and its loss.
        state: The weights.
        blocks: Names of blocks and of their layers.
        settings: On how many examples, with how many products at most.
        workers: How many, and how large.
        seed: Of the draw and of the start vectors.
        progress: Told how far it is.
        note: Told what is done.

    Raises:
        NonFiniteTraceError: If a loss or a product is NaN or infinite.
    """
    started = time.monotonic()
    count = num_workers(workers.count, workers.cpus, workers.gpus)
    size = task.size("train")
    few = task.batch("train", torch.arange(min(settings.batch_size, size, 2)))
    factored = task.curvature(task.model(), few) is not None
    names = list(blocks)
    with WorkerPool(task, state, workers=count, cpus=workers.cpus, gpus=workers.gpus) as pool:

        def look(examples: Sequence[int]) -> Tensor:
            return pool.look(
                "train",
                examples,
                settings.batch_size,
                lambda done: progress(done, len(examples), "images", "which examples matter"),
            )

        def iterate(which: Sequence[int], num: int, what: str) -> dict[int, TopEigenvalues]:
            found = {}
            calls = {i: (list(blocks[names[i]]), iteration | {"num": num}) for i in which}
            for i, (result, _) in pool.results("eigenvalues", calls):
                found[i] = result
                progress(len(found), len(which), what, names[i])
            return found

        drawn = drawn_examples(
            size, look if factored else None, settings.examples, settings.pool, seed
        )
        data = {
            "split": "train",
            "examples": drawn.examples,
            "batch_size": settings.batch_size,
            "example_weights": drawn.weights,
        }
        iteration = data | {
            "rtol": settings.rtol,
            "max_iterations": settings.max_probes,
            "seed": seed,
        }
        note(f"power iteration on {len(names)} blocks, {len(drawn.examples)} examples")
        found = iterate(range(len(names)), 1, "blocks")
        surfaces = _surfaces(pool, blocks, found, iterate, data, progress)
        return Eigenvalues(
            {names[i]: found[i] for i in sorted(found)},
            surfaces,
            drawn,
            count,
            pool.cpu_seconds,
            time.monotonic() - started,
        )


def _surfaces(
    pool: WorkerPool,
    blocks: Mapping[str, Sequence[str]],
    found: dict[int, TopEigenvalues],
    iterate: Callable[[Sequence[int], int, str], dict[int, TopEigenvalues]],
    data: dict[str, Any],
    progress: Progress,
) -> list[BlockSurface]:
    """Look around the blocks of largest and of smallest eigenvalue."""
    names = list(blocks)
    order = sorted(found, key=lambda i: abs(found[i].values[0]))
    large = [i for i in order if sum(v.numel() for v in found[i].vectors[0]) > 1]
    shown = list(dict.fromkeys([*large[-1:], *large[:1]]))
    pairs = iterate(shown, 2, "second eigenvectors")
    steepest = max((abs(float(pairs[i].values[0])) for i in shown), default=0.0)
    if not steepest:
        return []
    # One distance for both, or the flat one would look as steep.
    radius = (2 * _ADDED_LOSS / steepest) ** 0.5
    offsets = radius * np.arange(-(_POINTS // 2), _POINTS // 2 + 1) / (_POINTS // 2)
    around = data | {"radius": radius, "num": _POINTS}
    calls = {i: (list(blocks[names[i]]), pairs[i].vectors, around) for i in shown}
    surfaces = {}
    for i, (losses, _) in pool.results("surface", calls):
        first, second = pairs[i].values.tolist()
        surfaces[i] = BlockSurface(names[i], (first, second), offsets, losses)
        progress(len(surfaces), len(shown), "surfaces", names[i])
    return [surfaces[i] for i in shown]
