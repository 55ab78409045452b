"""The columns of the results that say what a candidate costs, and how good it is proved to be.

A column stands where some candidate has something to say in it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hawq.cost import FLOAT_BITS
from search.artefacts import Candidate, Summary
from search.quantities import mib, significant

__all__ = ["CostColumn", "cost_columns"]

_NOTHING = "—"
# So near to the proved bound, the rest is rounding.
_OPTIMAL = 1e-9


@dataclass(frozen=True, slots=True)
class CostColumn:
    """One column.

    Attributes:
        heading: What it shows.
        unit: Below the heading.
        unquantized: The unquantized network's cell.
        cell: Writes a candidate's cell.
    """

    heading: str
    unit: str
    unquantized: str
    cell: Callable[[Candidate], str]


def cost_columns(summary: Summary) -> list[CostColumn]:
    """Choose the columns of a run, from left to right."""
    full = significant(mib(FLOAT_BITS * summary.model.num_quantizable))
    columns = (
        CostColumn("Weights", "MiB", full, lambda c: significant(mib(c.weight_bits))),
        CostColumn("Stored", "MiB", full, _stored),
        CostColumn("Smaller", "×", "1.00", lambda c: f"{c.compression:.2f}"),
        CostColumn("Bits", "weights", f"{FLOAT_BITS:.2f}", lambda c: f"{c.average_bits:.2f}"),
        CostColumn("Bits", "activations", f"{FLOAT_BITS:.2f}", _activation_bits),
        CostColumn("GBOPs", "an example", _NOTHING, lambda c: _over(c.costs.get("bops"), 1e9)),
        CostColumn("Latency", "ms", _NOTHING, lambda c: _over(c.costs.get("latency_ns"), 1e6)),
        CostColumn("Ω", "", _NOTHING, lambda c: significant(c.sensitivity)),
        CostColumn("Gap", "% of Ω", _NOTHING, _gap),
    )
    candidates = summary.candidates.candidates
    return [c for c in columns if any(c.cell(found) != _NOTHING for found in candidates)]


def _stored(candidate: Candidate) -> str:
    bits = candidate.costs.get("stored_bits")
    return _NOTHING if bits is None else significant(mib(bits))


def _activation_bits(candidate: Candidate) -> str:
    bits = candidate.activation_average_bits
    return _NOTHING if bits is None else f"{bits:.2f}"


def _over(cost: int | None, unit: float) -> str:
    return _NOTHING if cost is None else significant(cost / unit)


def _gap(candidate: Candidate) -> str:
    if candidate.bound is None:
        return _NOTHING
    gap = candidate.sensitivity - candidate.bound
    if gap < _OPTIMAL * candidate.sensitivity or gap <= 0:
        return "optimal"
    return significant(100 * gap / candidate.sensitivity)
