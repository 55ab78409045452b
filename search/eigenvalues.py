"""Top eigenvalues of blocks on the cluster: a block is a unit of work."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawq.curvature import DrawnExamples, drawn_examples
from hawq.curvature.power_iteration import TopEigenvalues
from hawq.task import Task, curved
from search.artefacts import BlockEigenvalue
from search.cluster import num_workers
from search.config import CurvatureConfig, WorkersConfig
from search.probes import WorkerPool
from search.tracing import Progress

__all__ = [
    "BlockSurface",
    "Eigenvalues",
    "PowerIterations",
    "block_record",
    "eigenvalues_on_cluster",
    "power_iterations",
]

# Points a side of a surface, and what the largest eigenvalue adds to the loss at its edge.
_POINTS, _ADDED_LOSS = 15, 1.0


@dataclass(frozen=True, slots=True)
class PowerIterations:
    """Workers that iterate, and the examples that they see.

    Attributes:
        pool: The workers.
        drawn: The examples.
        data: The same, as a worker's calls take them.
        rtol: Of an eigenvalue's residual.
        max_iterations: Hessian-vector products at most.
        seed: Of the start vectors.
        count: Workers.
    """

    pool: WorkerPool
    drawn: DrawnExamples
    data: dict[str, Any]
    rtol: float
    max_iterations: int
    seed: int
    count: int

    def results(
        self, blocks: Mapping[str, Sequence[str]], num: int = 1
    ) -> Iterator[tuple[str, TopEigenvalues]]:
        """Yield each block's name with its first ``num`` eigenvalues, as they are found."""
        names = list(blocks)
        how = self.data | {
            "rtol": self.rtol,
            "max_iterations": self.max_iterations,
            "seed": self.seed,
            "num": num,
        }
        calls = {i: (list(blocks[name]), how) for i, name in enumerate(names)}
        for i, (result, _) in self.pool.results("eigenvalues", calls):
            yield names[i], result


@contextmanager
def power_iterations(
    task: Task,
    state: dict[str, Tensor],
    *,
    settings: CurvatureConfig,
    workers: WorkersConfig,
    rtol: float,
    seed: int,
    progress: Progress,
) -> Iterator[PowerIterations]:
    """Start workers, and draw the examples that all blocks' Hessians are of.

    Args:
        task: The network, its data and its loss.
        state: The weights.
        settings: On how many examples, with how many products at most.
        workers: How many, and how large.
        rtol: Of an eigenvalue's residual.
        seed: Of the draw and of the start vectors.
        progress: Told how far the draw is.
    """
    task, _ = curved(task)
    count = num_workers(workers.count, workers.cpus, workers.gpus)
    size = task.size("train")
    few = task.batch("train", torch.arange(min(settings.batch_size, size, 2)))
    factored = task.curvature(task.model(), few) is not None
    with WorkerPool(task, state, workers=count, cpus=workers.cpus, gpus=workers.gpus) as pool:

        def look(examples: Sequence[int]) -> Tensor:
            return pool.look(
                "train",
                examples,
                settings.batch_size,
                lambda done: progress(done, len(examples), "images", "which examples matter"),
            )

        drawn = drawn_examples(
            size, look if factored else None, settings.examples, settings.pool, seed
        )
        data = {
            "split": "train",
            "examples": drawn.examples,
            "batch_size": settings.batch_size,
            "example_weights": drawn.weights,
        }
        yield PowerIterations(pool, drawn, data, rtol, settings.max_probes, seed, count)


def block_record(
    block: str, layers: Sequence[str], state: Mapping[str, Tensor], top: TopEigenvalues
) -> BlockEigenvalue:
    """Return a block's first eigenvalue as it is kept."""
    return BlockEigenvalue(
        block=block,
        layers=list(layers),
        n=sum(state[f"{layer}.weight"].numel() for layer in layers),
        eigenvalue=float(top.values[0]),
        residual=float(top.residual[0]),
        data_error=float(top.data_error[0]),
        iterations=int(top.iterations[0]),
        converged=bool(top.converged[0]),
    )


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

    found: dict[str, BlockEigenvalue]
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
        settings: On how many examples, to what residual, with how many products at most.
        workers: How many, and how large.
        seed: Of the draw and of the start vectors.
        progress: Told how far it is.
        note: Told what is done.

    Raises:
        NonFiniteTraceError: If a loss or a product is NaN or infinite.
    """
    started = time.monotonic()
    with power_iterations(
        task,
        state,
        settings=settings,
        workers=workers,
        rtol=settings.rtol,
        seed=seed,
        progress=progress,
    ) as iterations:
        drawn = iterations.drawn
        note(f"power iteration on {len(blocks)} blocks, {len(drawn.examples)} examples")
        found = {}
        for name, top in iterations.results(blocks):
            found[name] = top
            progress(len(found), len(blocks), "blocks", name)
        surfaces = _surfaces(iterations, blocks, found, progress)
        return Eigenvalues(
            {name: block_record(name, blocks[name], state, found[name]) for name in blocks},
            surfaces,
            drawn,
            iterations.count,
            iterations.pool.cpu_seconds,
            time.monotonic() - started,
        )


def _surfaces(
    iterations: PowerIterations,
    blocks: Mapping[str, Sequence[str]],
    found: Mapping[str, TopEigenvalues],
    progress: Progress,
) -> list[BlockSurface]:
    """Look around the blocks of largest and of smallest eigenvalue."""
    # Of equal ones the first in the network's order, whichever was found first.
    order = sorted(blocks, key=lambda name: abs(found[name].values[0]))
    large = [name for name in order if sum(v.numel() for v in found[name].vectors[0]) > 1]
    shown = list(dict.fromkeys([*large[-1:], *large[:1]]))
    pairs = {}
    for name, top in iterations.results({name: blocks[name] for name in shown}, num=2):
        pairs[name] = top
        progress(len(pairs), len(shown), "second eigenvectors", name)
    steepest = max((abs(float(pairs[name].values[0])) for name in shown), default=0.0)
    if not steepest:
        return []
    # One distance for both, or the flat one would look as steep.
    radius = (2 * _ADDED_LOSS / steepest) ** 0.5
    offsets = radius * np.arange(-(_POINTS // 2), _POINTS // 2 + 1) / (_POINTS // 2)
    around = iterations.data | {"radius": radius, "num": _POINTS}
    calls = {i: (list(blocks[n]), pairs[n].vectors, around) for i, n in enumerate(shown)}
    surfaces = {}
    for i, (losses, _) in iterations.pool.results("surface", calls):
        first, second = pairs[shown[i]].values.tolist()
        surfaces[i] = BlockSurface(shown[i], (first, second), offsets, losses)
        progress(len(surfaces), len(shown), "surfaces", shown[i])
    return [surfaces[i] for i in range(len(shown))]
