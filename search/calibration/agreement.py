"""How well predicted and measured loss increases agree, with errors over the images."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from search.artefacts import Agreement

__all__ = ["agreement", "is_clear", "mean_and_error"]

_NUM_BOOTSTRAPS = 200
# An increase is told from none beyond so many standard errors.
_CLEAR = 2.0

Vector = NDArray[np.float64]


def agreement(predicted: Vector, gained: NDArray[np.float64], seed: int) -> Agreement:
    """Compare predictions with measurements of the same choices.

    Errors are the spread over 200 bootstraps of the images (Efron, 1979); the choices stay.

    Args:
        predicted: Loss increases, shape (J,).
        gained: Each image's own increase, shape (J, N).
        seed: Of the bootstraps.
    """
    num_images = gained.shape[1]
    generator = np.random.default_rng(seed)
    times = generator.multinomial(num_images, np.full(num_images, 1 / num_images), _NUM_BOOTSTRAPS)
    again = times @ gained.T / num_images
    correlation, correlation_error = _with_error(_rank_correlation, predicted, gained, again)
    ratio, ratio_error = _with_error(_median_ratio, predicted, gained, again)
    return Agreement(
        num_choices=len(predicted),
        correlation=correlation,
        correlation_error=correlation_error,
        ratio=ratio,
        ratio_error=ratio_error,
    )


def mean_and_error(values: Vector) -> tuple[float, float]:
    """Return the mean over images and its standard error, of values of shape (N,), N ≥ 2."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def is_clear(increase: float, standard_error: float) -> bool:
    """Whether a measured increase is above two standard errors."""
    return increase > _CLEAR * standard_error


def _with_error(
    statistic: Callable[[Vector, Vector], float | None],
    predicted: Vector,
    gained: NDArray[np.float64],
    again: NDArray[np.float64],
) -> tuple[float | None, float | None]:
    value = statistic(predicted, gained.mean(1))
    if value is None:
        return None, None
    spread = [found for row in again if (found := statistic(predicted, row)) is not None]
    return (value, float(np.std(spread, ddof=1))) if len(spread) > 1 else (None, None)


def _rank_correlation(predicted: Vector, measured: Vector) -> float | None:
    """Return Spearman's correlation; None where there are no two ranks to compare."""
    if len(predicted) < 3 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return None
    return float(spearmanr(predicted, measured).statistic)


def _median_ratio(predicted: Vector, measured: Vector) -> float | None:
    positive = predicted > 0
    return float(np.median(measured[positive] / predicted[positive])) if positive.any() else None
