"""How the methods of a comparison look: the Hessian's in ink, searches in colour.

A search that starts from the Hessian's choices has the colour of the one that does not, another
marker and a broken line.
"""

from collections.abc import Sequence
from dataclasses import replace

from search.comparison.families import family, warm_twin
from search.report.palette import Look, looks

__all__ = ["comparison_looks", "faded"]

_INK = "#1f2933"
_DASHES = ("solid", "dash", "dot", "dashdot")
_NUM_COLORS = 7
_WARM = {"solid": "dot", "dash": "dashdot"}


def comparison_looks(methods: Sequence[str]) -> dict[str, Look]:
    """Give every method of a comparison a look, in the methods' order."""
    choices = [method for method in methods if family(method) in {"reference", "hessian"}]
    searches = [method for method in methods if method not in choices]
    twins = {warm_twin(method): method for method in searches}
    cold = [method for method in searches if method not in twins]
    places = looks(_beside_grey([*cold, *(method for method in searches if method in twins)]))
    found = {
        method: replace(look, color=_INK, dash=_DASHES[i % len(_DASHES)])
        for i, (method, look) in enumerate(looks(choices).items())
    }
    found |= {method: places[method] for method in cold}
    for method, twin in twins.items():
        if method in searches:
            dash = _WARM.get(found[twin].dash, "dot")
            found[method] = replace(places[method], color=found[twin].color, dash=dash)
    return {method: found[method] for method in methods}


def _beside_grey(methods: Sequence[str]) -> list[str]:
    """Leave every place free that the palette gives its grey, which is too near the ink."""
    placed: list[str] = []
    for method in methods:
        if len(placed) % _NUM_COLORS == _NUM_COLORS - 1:
            placed.append(f"grey {len(placed)}")
        placed.append(method)
    return placed


def faded(color: str, opacity: float) -> str:
    """Write a colour ``#rrggbb`` with an opacity, as plotly reads it."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity:g})"
