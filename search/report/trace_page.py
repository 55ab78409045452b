"""The pages of ``hawq trace``: what to say in which order, filled into their templates.

Like the report they load nothing and depend on their documents alone: equal documents give equal
pages.
"""

import math

from search.quantities import count, significant
from search.report.channel_figure import channels, num_drawn
from search.report.channel_spread import spreads
from search.report.eigenvalue_figure import by_sensitivity, order
from search.report.eigenvalue_parts import block_figures, has_holes
from search.report.estimators import ESTIMATORS
from search.report.named_axis import make_room
from search.report.share_figure import shares
from search.report.sites import sites_of
from search.report.template import fill
from search.report.trace_caveats import eigenvalue_caveats, trace_caveats
from search.report.trace_figure import traces
from search.report.trace_findings import effort, iterated, traced
from search.traced import EigenvalueDocument, TraceDocument

__all__ = ["MAX_ROWS", "render_eigenvalues", "render_traces"]

# More channels than that only crowd a page; they are in the document.
MAX_ROWS = 1000


def render_traces(found: TraceDocument) -> str:
    """Write what was traced as one HTML page."""
    sites = sites_of(found)
    figures = {
        "averages-figure": traces(
            sites, x=f"{sites.noun.capitalize()}, in the network's order", unit=sites.unit
        ),
        "shares-figure": shares(sites),
    }
    num_channels = len(sites.all_channels)
    if num_channels:
        figures["channels-figure"] = channels(sites)
    return fill(
        "trace.html",
        figures,
        title=f"{found.name}: Hessian traces of {found.subject}",
        done=traced(found, sites),
        caveats=trace_caveats(found, sites),
        found=found,
        sites=sites,
        sizes=make_room(figures, sites.layers),
        num_channels=num_channels,
        num_drawn=num_drawn(sites),
        max_rows=MAX_ROWS,
        spreads=spreads(sites) if num_channels else [],
        has_lost_error=found.num_probes > 0
        and found.num_examples < found.population_size
        and any(group.data_error == 0 for group in found.groups),
        measured=_measured,
        facts={
            "estimator": ESTIMATORS[found.estimator],
            "probes": f"{count(found.num_probes)} an example" if found.num_probes else "none",
            "tolerance": f"{100 * found.rtol:g} % of each trace, for its probe error",
            **effort(found),
        },
    )


def render_eigenvalues(found: EigenvalueDocument) -> str:
    """Write the blocks' eigenvalues and the loss around two of them as one HTML page."""
    ranked = by_sensitivity(found.blocks)
    figures = {**block_figures(found), "order-figure": order(found.blocks)}
    return fill(
        "eigenvalues.html",
        figures,
        title=f"{found.name}: top Hessian eigenvalues",
        done=iterated(found),
        caveats=eigenvalue_caveats(found),
        found=found,
        sizes=make_room(figures, [block.block for block in found.blocks]),
        ranks={block.block: i for i, block in enumerate(ranked, 1)},
        has_holes=has_holes(found),
        facts={
            "method": "power iteration",
            "tolerance": f"{100 * found.rtol:g} % of |λ|, for the residual",
            **effort(found),
        },
    )


def _measured(value: float, error: float) -> str:
    """Write a value and its error, to the error's second digit: ``17.006 ± 0.062``."""
    if not 1e-6 < error < math.inf:
        return f"{significant(value)} ± {significant(error)}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}".replace("-", "−").replace(" ", "\u00a0")
