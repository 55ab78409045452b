"""What a search cannot do without, so that more are not begun than fit."""

from search.config import SearchConfig

__all__ = ["demand", "demands"]


def demands(config: SearchConfig) -> list[tuple[str, float, float]]:
    """Return what a piece of each section's work takes: the section, CPUs, GPUs."""
    workers, trials, searches = config.workers, config.trials, config.searches
    found = [
        ("workers", workers.cpus, workers.gpus),
        ("trials", trials.cpus * trials.workers, trials.gpus * trials.workers),
    ]
    if config.searching:
        scorers = max(1, searches.runners)
        found.append(("searches", searches.cpus * scorers, searches.gpus * scorers))
    return found


def demand(config: SearchConfig) -> tuple[float, float]:
    """Return the CPUs and GPUs of the largest single piece of a search's work.

    Whatever a cluster has more than that makes the search faster, and Ray shares it out.
    """
    _, cpus, gpus = zip(*demands(config), strict=True)
    return max(cpus), max(gpus)
