"""What a reader must know before believing traces or eigenvalues."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

from search.artefacts import BlockEigenvalue
from search.quantities import count, counted
from search.report.eigenvalue_figure import by_sensitivity
from search.report.sites import Sites
from search.traced import EigenvalueDocument, TraceDocument, TraceGroup

__all__ = ["eigenvalue_caveats", "iteration_caveats", "trace_caveats"]

_Ranked = TypeVar("_Ranked", TraceGroup, BlockEigenvalue)

# Standard errors that leave no doubt which of two is larger: one-sided, at 95 %.
_DOUBT = 1.645


def trace_caveats(found: TraceDocument, sites: Sites) -> list[str]:
    """Say what a reader of traces must know; empty if there is nothing."""
    caveats = []
    if found.estimator == "fisher":
        caveats.append(
            "The empirical Fisher is not the Hessian: it has the squares of the examples’ "
            "gradients in its place."
        )
    if not found.converged:
        loose = _groups(sites, lambda group: group.probe_error > found.rtol * abs(group.trace))
        above = f": the probe error of {loose} is above {_percent(found.rtol)} of the trace"
        caveats.append(
            f"The traces had not converged after {counted(found.num_probes, 'probe')} an example"
            f"{above if loose else ''}."
        )
    negative = _groups(sites, lambda group: group.trace < 0)
    if negative:
        caveats.append(
            f"The trace of {negative} is negative and counts as zero in Ω: the methods see no cost "
            "in quantizing there."
        )
    ranked = sorted(sites.groups, key=lambda group: -group.trace / group.n)
    return [*caveats, *_order("average trace", ranked, _trace_name, _are_traces_apart)]


def eigenvalue_caveats(found: EigenvalueDocument) -> list[str]:
    """Say what a reader of eigenvalues and of their order must know; empty if there is nothing."""
    ranked = by_sensitivity(found.blocks)
    order = _order("S", ranked, lambda block: block.block, _are_blocks_apart)
    return [*iteration_caveats(found), *order]


def iteration_caveats(found: EigenvalueDocument) -> list[str]:
    """Say what a reader of eigenvalues must know; empty if there is nothing."""
    caveats = []
    loose = [block.block for block in found.blocks if not block.converged]
    if loose:
        caveats.append(
            f"The power iteration of {_some(loose, len(found.blocks), 'block')} had not "
            f"converged: the residual is above {_percent(found.rtol)} of |λ|."
        )
    negative = [block.block for block in found.blocks if block.eigenvalue < 0]
    if negative:
        caveats.append(
            f"λ of {_some(negative, len(found.blocks), 'block')} is negative: the weights are not "
            "at a minimum of the loss there, and HAWQ’s order by λ / n puts it last, however large "
            "|λ|."
        )
    return caveats


def _are_traces_apart(larger: TraceGroup, smaller: TraceGroup) -> bool:
    errors = [e / g.n for g in (larger, smaller) for e in (g.probe_error, g.data_error)]
    return larger.trace / larger.n - smaller.trace / smaller.n >= _DOUBT * math.hypot(*errors)


def _are_blocks_apart(larger: BlockEigenvalue, smaller: BlockEigenvalue) -> bool:
    error = _DOUBT * math.hypot(larger.data_error / larger.n, smaller.data_error / smaller.n)
    error += larger.residual / larger.n + smaller.residual / smaller.n
    return larger.eigenvalue / larger.n - smaller.eigenvalue / smaller.n >= error


def _trace_name(group: TraceGroup) -> str:
    return group.group


def _order(
    what: str,
    ranked: Sequence[_Ranked],
    name: Callable[[_Ranked], str],
    are_apart: Callable[[_Ranked, _Ranked], bool],
) -> list[str]:
    """Say which neighbors in an order may stand the other way round."""
    pairs = list(pairwise(ranked))
    doubtful = [f"{name(a)} and {name(b)}" for a, b in pairs if not are_apart(a, b)]
    if not doubtful:
        return []
    shown = "; ".join(doubtful[:3]) + _more(doubtful)
    return [
        f"The order by {what} is not certain: of {counted(len(pairs), 'pair')} of neighbors "
        f"{count(len(doubtful))} may stand the other way round ({shown}), at 95\u00a0% and with "
        "errors taken as independent."
    ]


def _groups(sites: Sites, holds: Callable[[TraceGroup], bool]) -> str:
    """Count the sites and channels for which something holds; empty if there are none."""
    named = [group.group for group in sites.groups if holds(group)]
    channels = sum(map(holds, sites.all_channels))
    parts = [_some(named, len(sites.groups), sites.noun)] if named else []
    if channels:
        parts.append(f"{count(channels)} of {counted(len(sites.all_channels), 'channel')}")
    return " and ".join(parts)


def _some(names: Sequence[str], num: int, noun: str) -> str:
    shown = ", ".join(names[:3]) + _more(names)
    return f"{count(len(names))} of {counted(num, noun)} ({shown})"


def _more(names: Sequence[str]) -> str:
    return f" and {count(len(names) - 3)} more" if len(names) > 3 else ""


def _percent(part: float) -> str:
    return f"{100 * part:g}\u00a0%"
