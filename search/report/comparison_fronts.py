"""The figure of sizes and scores over several budgets, and how much of it each method covers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from search.comparison.hypervolume import covered_share
from search.comparison.scale import Scale
from search.comparison.standings import Standing
from search.quantities import mib
from search.report.canvas import canvas
from search.report.palette import Look

__all__ = ["Share", "covered", "size_and_score"]


@dataclass(frozen=True, slots=True)
class Share:
    """How much of the rectangle of sizes and scores a method covers.

    Attributes:
        method: Its name.
        median: Over seeds, in [0, 1].
        quartiles: Over seeds; None for what has none.
    """

    method: str
    median: float
    quartiles: tuple[float, float] | None


def size_and_score(found: Sequence[Standing], scale: Scale, looks: Mapping[str, Look]) -> go.Figure:
    """Draw what each method found under every budget, scores with their quartiles."""
    figure = canvas("Weights (MiB)", scale.axis)
    for method in dict.fromkeys(s.method for s in found):
        mine = [s for s in found if s.method == method]
        figure.add_trace(_points(mine, scale, looks[method]))
    return figure


def covered(found: Sequence[Standing]) -> list[Share]:
    """Return the share of each method that has found something under every budget, largest first.

    The rectangle reaches from the smallest size and highest score of all to a reference that is
    a tenth of the range beyond the largest and lowest. A search's points are those of its seed.
    """
    budgets = list(dict.fromkeys(s.budget for s in found))
    every = np.array([(best.weight_bits, best.score) for s in found for best in s.bests])
    size, score = every[:, 0], every[:, 1]
    if len(budgets) < 2 or np.ptp(size) == 0 or np.ptp(score) == 0:
        return []
    ideal = (float(size.min()), float(score.max()))
    reference = (
        float(size.max() + 0.1 * np.ptp(size)),
        float(score.min() - 0.1 * np.ptp(score)),
    )
    shares = []
    for method in dict.fromkeys(s.method for s in found):
        mine = [s for s in found if s.method == method]
        fronts = _fronts(mine) if len(mine) == len(budgets) else []
        if fronts:
            values = [covered_share(front, ideal=ideal, reference=reference) for front in fronts]
            low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
            shares.append(Share(method, median, (low, high) if len(values) > 1 else None))
    return sorted(shares, key=lambda share: -share.median)


def _fronts(mine: Sequence[Standing]) -> list[NDArray[np.float64]]:
    """Return a method's sizes and scores over the budgets, once for each seed that has them all."""
    by_seed: dict[int, list[tuple[int, float]]] = {}
    for s in mine:
        seeds = [search.seed for search in s.searches] or [0]
        for seed, best in zip(seeds, s.bests, strict=True):
            by_seed.setdefault(seed, []).append((best.weight_bits, best.score))
    return [np.array(points, float) for points in by_seed.values() if len(points) == len(mine)]


def _points(mine: Sequence[Standing], scale: Scale, look: Look) -> go.Scatter:
    size = [float(np.median([best.weight_bits for best in s.bests])) for s in mine]
    order = np.argsort(size).tolist()
    sorted_ = [mine[i] for i in order]
    ends = [s.quartiles or (s.median, s.median) for s in sorted_]
    return go.Scatter(
        meta=mine[0].method,
        x=[mib(round(size[i])) for i in order],
        y=[scale.factor * s.median for s in sorted_],
        error_y={
            "array": [
                scale.factor * (high - s.median) for s, (_, high) in zip(sorted_, ends, strict=True)
            ],
            "arrayminus": [
                scale.factor * (s.median - low) for s, (low, _) in zip(sorted_, ends, strict=True)
            ],
            "width": 4,
            "thickness": 1.2,
        },
        mode="lines+markers",
        line={"color": look.color, "width": 1.2, "dash": look.dash},
        marker={
            "color": look.color,
            "symbol": look.symbol,
            "size": 10,
            "line": {"color": "white", "width": 1},
        },
        text=[escape(f"{s.method}, {s.budget}") for s in sorted_],
        hovertemplate="%{text}<br>%{x:.4~g} MiB<br>%{y:.4~g}<extra></extra>",
    )
