"""The loss around a network's weights, along two directions of one block.

Along a block's two top eigenvectors the surface shows what its eigenvalues say: a steep valley
cannot take the rounding that a flat one does not notice (Dong et al., 2019, figure 1).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hawq.curvature.network import weights_of
from hawq.space import evaluating
from hawq.task import Task, moved

__all__ = ["loss_surface"]


@torch.no_grad()
def loss_surface(
    task: Task,
    model: nn.Module,
    layers: Sequence[str],
    directions: tuple[Sequence[Tensor], Sequence[Tensor]],
    *,
    split: str,
    examples: Sequence[int],
    batch_size: int,
    radius: float,
    num: int,
    example_weights: Sequence[float] = (),
) -> NDArray[np.float64]:
    """Evaluate the mean loss at the weights W + a·u + b·v on a square grid.

    It takes num² forward passes over the examples; each batch is fetched once.

    Args:
        task: Builds the examples and gives their losses.
        model: The network, on its device; it is left as it was, bit for bit.
        layers: Names of the block's layers.
        directions: u and v, each a tensor a layer, shaped like its weight.
        split: Split of the task that the examples come from.
        examples: Indices into it.
        batch_size: Examples a batch.
        radius: Largest |a| and |b|; a distance in weights where the directions have length 1.
        num: Points a side, odd, so that the weights themselves are the middle one; a and b go from
            −radius to radius in equal steps.
        example_weights: w of each example where they were drawn by importance: the mean is
            (1/N) Σ w_n ℓ_n. Empty where all count alike.

    Returns:
        Losses, shape (num, num), rows by a, columns by b. A loss that overflows is infinite or NaN.

    Raises:
        ValueError: If an argument is out of its range, or a direction does not fit the layers.
    """
    weights = weights_of(model, layers)
    shapes = [weight.shape for weight in weights]
    for direction in directions:
        if [part.shape for part in direction] != shapes:
            raise ValueError(
                f"directions must have the weights' shapes {[tuple(shape) for shape in shapes]}, "
                f"got {[tuple(part.shape) for part in direction]}"
            )
    for what, condition, value, is_met in (
        ("num", "be odd and at least 3", num, num % 2 == 1 and num >= 3),
        ("radius", "be positive", radius, radius > 0),
        ("examples", "be at least one", len(examples), len(examples) > 0),
        ("batch_size", "be positive", batch_size, batch_size > 0),
        (
            "example_weights",
            "be one an example or none",
            len(example_weights),
            len(example_weights) in {0, len(examples)},
        ),
    ):
        if not is_met:
            raise ValueError(f"{what} must {condition}, got {value}")
    half = num // 2
    offsets = [radius * i / half for i in range(-half, half + 1)]  # exactly zero in the middle
    losses = np.zeros((num, num))
    indices = torch.tensor(examples).split(batch_size)
    counts = torch.tensor(example_weights or [1.0] * len(examples)).split(batch_size)
    with evaluating(model), _movable(weights, directions) as move:
        for part, count in zip(indices, counts, strict=True):
            batch = moved(task.batch(split, part), weights[0].device)
            for i, j in np.ndindex(num, num):
                move(offsets[i], offsets[j])
                found = task.losses(model, batch)
                losses[i, j] += float((count.to(found) * found).sum(dtype=torch.float64))
    return losses / len(examples)


@contextmanager
def _movable(
    weights: Sequence[Tensor], directions: Sequence[Sequence[Tensor]]
) -> Iterator[Callable[[float, float], None]]:
    """Give a function that sets the weights to W + a·u + b·v; put W back afterwards."""
    originals = [weight.clone() for weight in weights]
    # Cloned too: a direction may be the weights themselves.
    u, v = (
        [part.to(weight).clone() for part, weight in zip(direction, weights, strict=True)]
        for direction in directions
    )

    def move(a: float, b: float) -> None:
        # From W every time, so that no rounding adds up along the way.
        for i, weight in enumerate(weights):
            weight.copy_(originals[i].add(u[i], alpha=a).add_(v[i], alpha=b))

    try:
        yield move
    finally:
        for weight, original in zip(weights, originals, strict=True):
            weight.copy_(original)
