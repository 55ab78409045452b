"""Searches that score what they try: agents, samplers and climbers, one after another or at once.

A search is a method under a budget with a seed. What it scored is on disk line by line, so that
one that is killed goes on where it was.
"""

from search.searches.evaluator import EvaluationFailedError, Retried, TrainedScores
from search.searches.running import SearchFailedError, SearchSpec, run_search, run_searches

__all__ = [
    "EvaluationFailedError",
    "Retried",
    "SearchFailedError",
    "SearchSpec",
    "TrainedScores",
    "run_search",
    "run_searches",
]
