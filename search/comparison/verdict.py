"""What a comparison says to someone who asks whether searching is worth its price.

A search learns from scores, and only fine-tuned accuracy counts. So scores are believed only as far
as they rank allocations as fine-tuning does; searches are compared only over enough seeds; what
lies inside the error is not told apart; and the finalists' accuracy has the last word.
"""

from collections.abc import Sequence

from search.comparison.document import ComparisonDocument
from search.comparison.families import family
from search.comparison.finals import accuracy, worth
from search.comparison.phrases import few, spread
from search.comparison.race import beside_the_hessian, between_searches, warm_starts
from search.comparison.standings import Standing, standings
from search.comparison.trust import is_trusted, trust, trust_among_finalists

__all__ = ["verdict"]


def verdict(document: ComparisonDocument) -> list[str]:
    """Say what a comparison shows, a sentence each, reservations first and accuracy last."""
    found = standings(document)
    told = [trust(document), _price(found)]
    if is_trusted(document):
        told += between_searches(document, found)
        told += beside_the_hessian(document, found)
        told += warm_starts(found)
        told += trust_among_finalists(document, found)
    return [*told, *accuracy(document, found), *worth(document, found)]


def _price(found: Sequence[Standing]) -> str:
    searches = [s for s in found if s.searches]
    if not searches:
        return "No search has finished."
    told = (
        f"A search took {spread([s.evaluations for s in searches], few)} evaluations and "
        f"{spread([s.core_seconds for s in searches])} core-seconds, medians over seeds"
    )
    own = [s for s in found if family(s.method) == "hessian"]
    if not own:
        return f"{told}; no Hessian method is beside it."
    return (
        f"{told}; the Hessian’s choice took no evaluation and "
        f"{spread([s.core_seconds for s in own])} core-seconds, the curvature included."
    )
