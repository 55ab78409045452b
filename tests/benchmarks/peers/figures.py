"""What the measurements of one method come to: its cost, its spread, and both together.

With s_l the relative standard deviation of one probe in layer l, K probes have the relative error
s_l / √K, so every layer's is at most ε from K = max_l (s_l / ε)² probes on. The largest of many
estimated spreads is rather too large than too small, the more so the fewer probes ran.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RTOL", "Figures", "figures"]

RTOL = 0.05


@dataclass(frozen=True, slots=True)
class Figures:
    """Cost and errors of one method.

    Attributes:
        cpu_s: CPU-seconds a probe, or of the whole where exact: minimum, median.
        wall_s: Likewise.
        setup_cpu_s: CPU-seconds before the first probe, median.
        peak_mib: Peak memory of a process, the largest.
        loaded_mib: Memory of a process that has loaded the problem, median.
        probes: Probes that ran; 0 where there are none.
        at_once: Of them, those of one step, which cannot be had singly.
        spread: One probe's standard deviation, relative to the reference, shape (L,), or (1,) of
            the whole network's trace; empty where exact, or where fewer than two probes ran.
        deviation: Where probes ran, the mean's from the reference in standard errors, same shape;
            where exact, relative to the reference.
        versions: Of torch and the peer.
    """

    cpu_s: tuple[float, float]
    wall_s: tuple[float, float]
    setup_cpu_s: float
    peak_mib: float
    loaded_mib: float
    probes: int
    at_once: int
    spread: NDArray[np.float64]
    deviation: NDArray[np.float64]
    versions: dict[str, str]

    @property
    def needed(self) -> float | None:
        """Probes until every layer's error is at most ``RTOL``; None where it is not known."""
        if not len(self.spread):
            return None
        return max(1.0, float(np.square(self.spread.max() / RTOL)))

    @property
    def cpu_s_needed(self) -> float | None:
        """CPU-seconds until then, of the whole where exact; None where it is not known."""
        if self.needed is not None:
            steps = math.ceil(self.needed / self.at_once)
            return self.setup_cpu_s + steps * self.at_once * self.cpu_s[0]
        exact = not self.probes and len(self.deviation)
        return self.setup_cpu_s + self.cpu_s[0] if exact else None


def figures(records: Sequence[dict[str, Any]], reference: NDArray[np.float64]) -> Figures:
    """Pool the steps of all processes of one method.

    Args:
        records: What ``measure`` wrote, one a process.
        reference: The layers' traces, shape (L,).
    """
    steps = [step for record in records for step in record["steps"]]
    counts = np.array([step["probes"] for step in steps])
    means = np.array([step["mean"] for step in steps])
    cpu, wall = (
        np.array([step[key] for step in steps]) / np.maximum(counts, 1)
        for key in ("cpu_s", "wall_s")
    )
    spread, deviation = _errors(steps, counts, means, reference)
    return Figures(
        (float(cpu.min()), float(np.median(cpu))),
        (float(wall.min()), float(np.median(wall))),
        float(np.median([record["setup"]["cpu_s"] for record in records])),
        max(record["peak_mib"] for record in records),
        float(np.median([record["loaded_mib"] for record in records])),
        int(counts.sum()),
        int(counts.max()),
        spread,
        deviation,
        records[0]["versions"],
    )


def _errors(
    steps: Sequence[dict[str, Any]],
    counts: NDArray[np.int64],
    means: NDArray[np.float64],
    reference: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return spread and deviation; see ``Figures``."""
    nothing, probes = np.zeros(0), int(counts.sum())
    if means.shape[1] == 1:
        reference = reference.sum(keepdims=True)
    if not means.size or probes == 1:
        return nothing, nothing
    if not probes:
        return nothing, means.mean(0) / reference - 1
    mean = counts @ means / probes
    within = np.array([step["squares"] for step in steps]).sum(0)
    between = counts @ np.square(means - mean)
    deviant = np.sqrt((within + between) / (probes - 1))
    return deviant / np.abs(reference), (mean - reference) / (deviant / np.sqrt(probes))
