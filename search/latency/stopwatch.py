"""Short pieces of work timed in turns, less what a call costs that does nothing."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Run", "Timing", "timed_in_turns"]

_WARM_UP = 5
_LEAST, _MOST = 9, 2000  # rounds

Run = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """How long something takes.

    Attributes:
        ns: Nanoseconds, at least 1.
        error_ns: Standard error over the repeats of this run.
    """

    ns: int
    error_ns: int

    @staticmethod
    def total(parts: Iterable["Timing"]) -> "Timing":
        """Add up; errors too, for parts may be one measurement, taken several times."""
        listed = list(parts)
        return Timing(sum(t.ns for t in listed), sum(t.error_ns for t in listed))


def timed_in_turns(
    runs: Sequence[Run],
    empty: Run,
    seconds: float,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> list[Timing]:
    """Time pieces of work against an empty call.

    They run one after the other, round by round, forwards and backwards: what else the machine
    does falls on all alike.

    Args:
        runs: The pieces.
        empty: Does nothing, the way that they do something.
        seconds: For all rounds together, warm-up not counted; nine rounds run in any case.
        clock: Tells nanoseconds.

    Returns:
        For each piece, the median over the rounds of what it took longer than ``empty``.
    """
    turns = [empty, *runs]
    for run in turns * _WARM_UP:
        run()
    rounds: list[list[int]] = []
    deadline = clock() + 1e9 * seconds
    while len(rounds) < _LEAST or (len(rounds) < _MOST and clock() < deadline):
        elapsed = [0] * len(turns)
        order = range(len(turns))
        for index in order if len(rounds) % 2 else reversed(order):
            started = clock()
            turns[index]()
            elapsed[index] = clock() - started
        rounds.append(elapsed)
    table = np.array(rounds)
    return [_median(column) for column in (table[:, 1:] - table[:, :1]).T]


def _median(elapsed: NDArray[np.int64]) -> Timing:
    """Return the median of repeats with its standard error, as if they were normal."""
    median = np.median(elapsed)
    deviation = 1.4826 * np.median(np.abs(elapsed - median))
    error = np.sqrt(np.pi / 2 / len(elapsed)) * deviation
    return Timing(max(1, round(float(median))), int(np.ceil(error)))
