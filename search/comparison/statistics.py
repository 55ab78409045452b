"""The statistics of a comparison: differences and agreements, with their errors.

Intervals are percentile bootstraps of 95 % (Efron, 1979), drawn from the seed that is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu, rankdata

__all__ = [
    "MIN_SEEDS",
    "Interval",
    "SearchDifference",
    "finalist_difference",
    "holm",
    "median_lead",
    "rank_agreement",
    "search_differences",
]

# With fewer searches on a side nothing is claimed of two methods: Mann–Whitney's test would miss
# all but the largest differences, and its silence would be read as equality.
MIN_SEEDS = 10
_LEVEL = 0.05
_NUM_BOOTSTRAPS = 2000
_CHUNK = 100

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate between the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or −1 where the interval excludes zero; 0 where the error may be all there is."""
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


@dataclass(frozen=True, slots=True)
class SearchDifference:
    """How much better one method's searches end than another's.

    Attributes:
        medians: Of the final scores of the first minus those of the second.
        p: Of Mann and Whitney's two-sided test, after Holm's correction; None makes no claim, as
            one side has fewer than ``MIN_SEEDS`` searches.
    """

    medians: Interval
    p: float | None

    @property
    def is_told(self) -> bool:
        """Whether the two are told apart, at 5 %."""
        return self.p is not None and self.p < _LEVEL


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, 1979): the i-th smallest of m times m − i + 1."""
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(np.maximum.accumulate(np.asarray(p)[order] * factors), 1)
    found: list[float] = corrected.tolist()
    return found


def search_differences(pairs: Sequence[tuple[Vector, Vector]], seed: int) -> list[SearchDifference]:
    """Compare methods by the final scores of their searches, two methods at a time.

    Args:
        pairs: The final scores of two methods, shapes (S,) and (S',). Holm's correction is over
            all pairs with enough seeds.
        seed: Of the bootstraps.

    Returns:
        A difference a pair, in their order.
    """
    generator = np.random.default_rng(seed)
    medians = [_median_difference(first, second, generator) for first, second in pairs]
    tested = [i for i, pair in enumerate(pairs) if min(map(len, pair)) >= MIN_SEEDS]
    corrected = holm([_mann_whitney(*pairs[i]) for i in tested])
    p = dict(zip(tested, corrected, strict=True))
    return [SearchDifference(found, p.get(i)) for i, found in enumerate(medians)]


def median_lead(scores: Vector, reference: float, seed: int) -> Interval | None:
    """Return how far the median search ends above a single score.

    Args:
        scores: Final scores of the searches, shape (S,).
        reference: A score that has no seed.
        seed: Of the bootstrap.

    Returns:
        The lead; None, no claim, with fewer than ``MIN_SEEDS`` searches.
    """
    if len(scores) < MIN_SEEDS:
        return None
    return _median_difference(scores, np.array([reference]), np.random.default_rng(seed))


def finalist_difference(
    first: NDArray[np.float64], second: NDArray[np.float64], seed: int
) -> Interval:
    """Return the difference of two networks' mean scores, bootstrapped over images × seeds.

    Images and training seeds are drawn independently of each other, and alike for both networks
    (Owen, 2007). R draws of R seeds spread by (R − 1) / R too little, so their weights are spread
    by the inverse: few seeds do not look surer than they are. One seed tells nothing of another:
    the interval is then over the images alone.

    Args:
        first: Scores of each training and example, shape (R, N); rows are training seeds.
        second: The same seeds and examples.
        seed: Of the bootstrap.

    Raises:
        ValueError: If the shapes differ or hold fewer than two examples.
    """
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] < 2:
        raise ValueError(
            f"first and second must have one shape (R, N) with two examples or more, "
            f"got {first.shape} and {second.shape}"
        )
    gained = np.asarray(first, np.float64) - second
    num_seeds, num_images = gained.shape
    generator = np.random.default_rng(seed)
    rows = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), _NUM_BOOTSTRAPS)
    spread = (num_seeds / (num_seeds - 1)) ** 0.5 if num_seeds > 1 else 1.0
    weights = 1 / num_seeds + spread * (rows / num_seeds - 1 / num_seeds)
    # Of right and wrong answers few columns differ: how often each is drawn is all that counts.
    _, found, times = np.unique(gained, axis=1, return_index=True, return_counts=True)
    order = np.argsort(found)  # as met, so that exchanging the two exchanges the ends
    columns, times = gained[:, found[order]], times[order]
    drawn = []
    for chunk in np.array_split(weights, _NUM_BOOTSTRAPS // _CHUNK):
        again = generator.multinomial(num_images, times / num_images, len(chunk)) / num_images
        drawn.append((chunk * (again @ columns.T)).sum(1))
    return _interval(float(gained.mean()), np.concatenate(drawn))


def rank_agreement(
    first: Vector, second: Vector, groups: Sequence[str], seed: int
) -> Interval | None:
    """Return Spearman's ρ of two measurements of the same things, ranked within groups.

    Ranks are taken in each group alone and centred, so that what groups differ in, such as the
    size that a budget allows, earns no agreement. With one group it is Spearman's ρ (1904). The
    bootstrap draws things within their groups.

    Args:
        first: One measurement, shape (N,).
        second: The other, shape (N,).
        groups: The group of each thing.
        seed: Of the bootstrap.

    Returns:
        The correlation; None where it is not defined, as one of the two does not vary.
    """
    members = [np.flatnonzero(np.array(groups) == group) for group in dict.fromkeys(groups)]
    once = [mine[None] for mine in members]
    value = _correlations(first, second, once)
    if len(value) == 0:
        return None
    generator = np.random.default_rng(seed)
    again = [
        mine[generator.integers(len(mine), size=(_NUM_BOOTSTRAPS, len(mine)))] for mine in members
    ]
    return _interval(float(value[0]), _correlations(first, second, again))


def _correlations(first: Vector, second: Vector, drawn: Sequence[NDArray[np.int64]]) -> Vector:
    """Correlate ranks within groups, once for every draw that has a correlation.

    Args:
        first: One measurement, shape (N,).
        second: The other, shape (N,).
        drawn: Indices into both for each group of M things, shape (draws, M).
    """
    x, y = (
        np.hstack([rankdata(values[mine], axis=1) - (mine.shape[1] + 1) / 2 for mine in drawn])
        if drawn
        else np.zeros((1, 0))
        for values in (first, second)
    )
    scale = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    varies = scale > 0
    found: Vector = (x * y).sum(1)[varies] / scale[varies]
    return found


def _median_difference(first: Vector, second: Vector, generator: np.random.Generator) -> Interval:
    drawn = [
        np.median(side[generator.integers(len(side), size=(_NUM_BOOTSTRAPS, len(side)))], axis=1)
        for side in (first, second)
    ]
    return _interval(float(np.median(first) - np.median(second)), drawn[0] - drawn[1])


def _mann_whitney(first: Vector, second: Vector) -> float:
    # With nothing but ties the test statistic has no variance, and the test no answer.
    if np.ptp(np.concatenate([first, second])) == 0:
        return 1.0
    return float(mannwhitneyu(first, second, alternative="two-sided").pvalue)


def _interval(value: float, drawn: Vector) -> Interval:
    low, high = np.quantile(drawn, [_LEVEL / 2, 1 - _LEVEL / 2]).tolist()
    return Interval(value, low, high)
