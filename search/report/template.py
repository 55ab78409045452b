"""Pages from templates: HTML files that hold their figures and plotly.js, and load nothing."""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from search import quantities

__all__ = ["fill"]


def fill(template: str, figures: Mapping[str, go.Figure], **values: Any) -> str:
    """Fill one of the package's templates.

    Args:
        template: Name of its file; the filters are the functions of ``quantities``.
        figures: By the ids of their elements.
        values: What the template shows.

    Returns:
        HTML to be written as UTF-8.
    """
    environment = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(quantities, name) for name in quantities.__all__}
    return environment.get_template(template).render(
        plotlyjs=Markup(get_plotlyjs()), figures=_script(figures), **values
    )


def _source(name: str) -> str:
    return files("search.report").joinpath(name).read_text(encoding="utf-8")


def _script(figures: Mapping[str, go.Figure]) -> Markup:
    """Write the figures as a JavaScript object by the ids of their elements."""
    # Plotly's JSON escapes every < and >, so no name in it can end the script element.
    drawings = ", ".join(f'"{name}": {figure.to_json()}' for name, figure in figures.items())
    return Markup(f"{{{drawings}}}")
