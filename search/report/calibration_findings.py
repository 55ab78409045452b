"""What the report says of how far Ω can be trusted."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from search.artefacts import (
    Agreement,
    BudgetStability,
    CalibrationArtefact,
    CandidateIncrease,
    Summary,
)
from search.quantities import count, counted, significant, with_error
from search.report.calibration_figure import increases, is_drawn, matrix

__all__ = ["Increase", "Trust", "trust"]


@dataclass(frozen=True, slots=True)
class Increase:
    """A candidate's increase of the loss.

    Attributes:
        methods: Those that chose it, with their budgets where those differ from this one.
        budget: The first budget that it was chosen for.
        found: What was predicted and measured.
        beyond: Measured over the sum of the groups' own increases; empty where that is not known
            or not positive.
    """

    methods: tuple[str, ...]
    budget: str
    found: CandidateIncrease
    beyond: str


@dataclass(frozen=True, slots=True)
class Trust:
    """What the section shows.

    Attributes:
        agreement: One sentence of how well Ω ranks single choices.
        undrawn: What the logarithmic figure lacks, and why; empty where it lacks nothing.
        candidates: Candidates' increases.
        stability: Each budget's, with the group that moves most.
        figures: By the ids of their elements, the one of increases first.
        sizes: Their least widths and heights, in pixels.
    """

    agreement: str
    undrawn: str
    candidates: tuple[Increase, ...]
    stability: tuple[tuple[BudgetStability, str], ...]
    figures: dict[str, go.Figure]
    sizes: dict[str, tuple[int, int]]


def trust(summary: Summary) -> Trust | None:
    """Put the section together; None where the run has no calibration."""
    calibration = summary.calibration
    if calibration is None:
        return None
    figures = {"increases-figure": increases(calibration, summary)}
    sizes = {"increases-figure": (300, figures["increases-figure"].layout.height)}
    if calibration.interactions is not None:
        drawn = matrix(calibration.interactions)
        figures["interactions-figure"] = drawn
        sizes["interactions-figure"] = (drawn.layout.width, drawn.layout.height)
        drawn.update_layout(width=None)
    return Trust(
        _agreement(calibration),
        _undrawn(calibration),
        tuple(_increase(found, summary) for found in calibration.candidates),
        tuple((found, _moves_most(found)) for found in calibration.stability),
        figures,
        sizes,
    )


def _agreement(calibration: CalibrationArtefact) -> str:
    every, clear = calibration.all_choices, calibration.clear_choices
    told = (
        f"Over {counted(every.num_choices, 'single choice')} the rank correlation of predicted "
        f"and measured increases of the loss is {_correlation(every)}"
    )
    if clear.num_choices == 0:
        return f"{told}; no measured increase is above two standard errors."
    told += (
        f"; over the {count(clear.num_choices)} measured above two standard errors it is "
        f"{_correlation(clear)}"
    )
    if clear.ratio is None or clear.ratio_error is None:
        return f"{told}."
    return (
        f"{told}, and there the measured increase is "
        f"{with_error(clear.ratio, clear.ratio_error)} times the predicted in the median."
    )


def _undrawn(calibration: CalibrationArtefact) -> str:
    found = []
    for things, noun in (
        (calibration.choices, "single choice"),
        (calibration.candidates, "candidate"),
    ):
        lower = sum(thing.increase <= 0 for thing in things)
        zero = sum(not is_drawn(thing) for thing in things) - lower
        if lower:
            found.append(f"{counted(lower, noun)} with a measured increase of zero or less")
        if zero:
            found.append(f"{counted(zero, noun)} with Ω = 0")
    if calibration.num_overflows:
        found.append(f"{count(calibration.num_overflows)} of a loss that is not finite")
    return ", ".join(found)


def _increase(found: CandidateIncrease, summary: Summary) -> Increase:
    same = [c for c in summary.candidates.candidates if c.digest == found.digest]
    budget, together = same[0].budget, found.sum_of_singles
    return Increase(
        tuple(c.method if c.budget == budget else f"{c.method} at {c.budget}" for c in same),
        budget,
        found,
        significant(found.increase / together) if together is not None and together > 0 else "",
    )


def _moves_most(found: BudgetStability) -> str:
    """Name the group whose bits vary most over the draws: ``conv1: 4 … 8, median 6``."""
    spans = _spans(found)
    if max(spans) == 0:
        return "none moves"
    i = spans.index(max(spans))
    return (
        f"{found.groups[i].removeprefix('w:')}: {found.least_bits[i]} … {found.most_bits[i]}, "
        f"median {found.median_bits[i]}"
    )


def _spans(found: BudgetStability) -> Sequence[int]:
    return [most - least for least, most in zip(found.least_bits, found.most_bits, strict=True)]


def _correlation(found: Agreement) -> str:
    if found.correlation is None or found.correlation_error is None:
        return "not defined"
    return with_error(found.correlation, found.correlation_error)
