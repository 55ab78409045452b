"""What the pages of ``hawq trace`` say in words: what was done, on what, and what it cost."""

from search.quantities import count, counted, duration, moment
from search.report.estimators import ESTIMATORS
from search.report.sites import Sites
from search.traced import EigenvalueDocument, TraceDocument

__all__ = ["effort", "iterated", "traced"]


def traced(found: TraceDocument, sites: Sites) -> str:
    """Say what was done, on what, and why in this way."""
    channels = len(sites.all_channels)
    what = f"{counted(len(sites.groups), sites.noun)}" + (
        f" and of {'its' if len(sites.groups) == 1 else 'their'} {counted(channels, 'channel')}"
        if channels
        else ""
    )
    probes = f"{counted(found.num_probes, 'probe')} an example" if found.num_probes else "no probes"
    return (
        f"How much the loss bends in the {found.subject} of {what}: the traces of its Hessian’s "
        f"blocks. {ESTIMATORS[found.estimator]}, {probes}, on {_examples(found)}. Why this "
        f"estimator: {found.reason.removesuffix('.')}."
    )


def iterated(found: EigenvalueDocument) -> str:
    """Say what was done, on what, and what for."""
    return (
        "The eigenvalue λ of largest modulus of the loss’s Hessian in all weights of a block "
        f"together, for {counted(len(found.blocks), 'block')}, by power iteration on "
        f"{_examples(found)}: what HAWQ orders blocks by (Dong et al., 2019)."
    )


def effort(found: TraceDocument | EigenvalueDocument) -> dict[str, str]:
    """Tell on what an estimation was made, and what it cost."""
    return {
        "examples": count(found.num_examples),
        "pool": f"{count(found.pool_size)} that these were drawn from",
        "population": f"{count(found.population_size)} that the pool was drawn from",
        "seed": str(found.seed),
        "workers": count(found.workers),
        "time": duration(found.seconds),
        "CPU time": f"{duration(found.cpu_seconds)}, all workers",
        "finished": moment(found.finished),
    }


def _examples(found: TraceDocument | EigenvalueDocument) -> str:
    if found.num_examples == found.population_size:
        return f"all {counted(found.num_examples, 'example')}"
    if found.num_examples == found.pool_size:
        return f"{counted(found.num_examples, 'example')} drawn from {count(found.population_size)}"
    text = f"{counted(found.num_examples, 'example')} drawn by importance from"
    if found.pool_size == found.population_size:
        return f"{text} {count(found.pool_size)}"
    return f"{text} {count(found.pool_size)} of {count(found.population_size)}"
