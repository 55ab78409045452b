"""Scores of several trainings on the same examples: their mean, its errors, and paired differences.

With x_rn the score of training r of R on example n of N, x̄_n the mean over trainings and x̄_r the
one over examples, the mean of all has the standard errors

    images:  std_n(x̄_n) / √N        another choice of examples
    seeds:   std_r(x̄_r) / √R        another choice of seeds; unknown for R = 1
    both:    √(images² + seeds²)

What belongs to neither alone, an example that one training happens to get right, is in both parts:
the whole is a little too large, never too small. A difference of two candidates is taken seed by
seed on the same examples, x_sn − y_sn, and has the same two parts; what a seed does to both alike,
such as the order of the batches, is in neither.

Trainings of several random draws differ in what is trained as well. Where every draw has a training
of its own the spread between trainings is that of draws and seeds together; where draws meet seeds
crosswise, each draw with several, the two spreads are both added.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Measured", "Replicates"]


@dataclass(frozen=True, slots=True)
class Measured:
    """A mean over trainings and examples, with its standard errors.

    Attributes:
        mean: Of a score, a drop or a difference.
        images_error: Over the choice of examples.
        seeds_error: Over the choice of seeds, and of draws; None where it cannot be told.
        num_seeds: Different seeds.
    """

    mean: float
    images_error: float
    seeds_error: float | None
    num_seeds: int

    @property
    def error(self) -> float:
        """All parts that are known, together."""
        return math.hypot(self.images_error, self.seeds_error or 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Replicates:
    """The trainings of one candidate, scored on the same examples.

    Attributes:
        seeds: Of each training, R of them.
        digests: Of what each trained: one and the same, but for random draws.
        scores: Shape (R, N).

    Raises:
        ValueError: If the shapes differ, or there are fewer than two examples.
    """

    seeds: tuple[int, ...]
    digests: tuple[str, ...]
    scores: NDArray[np.float64]

    def __post_init__(self) -> None:
        num = len(self.seeds)
        if self.scores.ndim != 2 or self.scores.shape[0] != num or len(self.digests) != num:
            raise ValueError(
                f"scores must have shape ({num}, N), a row for each seed and digest, "
                f"got {self.scores.shape}"
            )
        if num < 1 or self.scores.shape[1] < 2:
            raise ValueError(
                f"scores must be of a training and two examples, got shape {self.scores.shape}"
            )

    def measured(self) -> Measured:
        """Return the mean score."""
        return Measured(
            float(self.scores.mean()),
            _standard_error(self.scores.mean(0)),
            self._spread(),
            len(set(self.seeds)),
        )

    def drop_from(self, reference: NDArray[np.float64]) -> Measured:
        """Return how much the mean is below a reference's scores, shape (N,), image by image."""
        return Replicates(self.seeds, self.digests, reference - self.scores).measured()

    def minus(self, other: "Replicates") -> Measured | None:
        """Return the paired difference over the seeds that both have; None where there is none."""
        seeds = sorted(set(self.seeds) & set(other.seeds))
        if not seeds:
            return None
        gained = np.stack([self._of(seed) - other._of(seed) for seed in seeds])
        parts = [
            part
            for side in (self, other)
            for part in [side._only(seeds)._draws_error(len(seeds) == 1)]
            if part is not None
        ]
        if len(seeds) > 1:
            parts.append(_standard_error(gained.mean(1)))
        return Measured(
            float(gained.mean()),
            _standard_error(gained.mean(0)),
            math.hypot(*parts) if parts else None,
            len(seeds),
        )

    def _of(self, seed: int) -> NDArray[np.float64]:
        """Return the mean over the trainings with a seed, shape (N,)."""
        mean: NDArray[np.float64] = self.scores[np.array(self.seeds) == seed].mean(0)
        return mean

    def _only(self, seeds: Sequence[int]) -> "Replicates":
        kept = [r for r, seed in enumerate(self.seeds) if seed in seeds]
        return Replicates(
            tuple(self.seeds[r] for r in kept),
            tuple(self.digests[r] for r in kept),
            self.scores[kept],
        )

    def _spread(self) -> float | None:
        """Return the trainings' part of the error of the mean."""
        means = self.scores.mean(1)
        if len(means) < 2:
            return None
        draws = self._draws_error(False)
        if draws is None:
            return _standard_error(means)
        by_seed = _group_means(means, self.seeds)
        return math.hypot(draws, _standard_error(by_seed) if len(by_seed) > 1 else 0.0)

    def _draws_error(self, within_a_seed: bool) -> float | None:
        """Return the draws' own part: where they meet seeds crosswise, or within a single seed."""
        by_draw = _group_means(self.scores.mean(1), self.digests)
        is_crossed = len(by_draw) < len(self.seeds)
        if len(by_draw) < 2 or not (is_crossed or within_a_seed):
            return None
        return _standard_error(by_draw)


def _group_means(means: NDArray[np.float64], labels: Sequence[object]) -> NDArray[np.float64]:
    rows: dict[object, list[float]] = {}
    for label, mean in zip(labels, means.tolist(), strict=True):
        rows.setdefault(label, []).append(mean)
    return np.array([np.mean(group) for group in rows.values()])


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))
