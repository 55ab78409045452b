"""A comparison as markdown, for the terminal and a README."""

from search.comparison.document import ComparisonDocument
from search.comparison.scale import Scale
from search.comparison.table import machines_said, rows
from search.comparison.verdict import verdict

__all__ = ["comparison_text"]


def comparison_text(document: ComparisonDocument) -> str:
    """Write a comparison's table and verdict in markdown."""
    unit = Scale(document.fidelity).unit
    headings = [
        "budget",
        "method",
        "searches",
        "evaluations",
        "episodes",
        "core-seconds",
        f"best score, {unit} [quartiles]",
        f"fine-tuned {document.score_name}, %",
    ]
    lines = [headings, ["---"] * len(headings)]
    for row in rows(document):
        score = f"{row.score} [{row.quartiles}]" if row.quartiles else row.score
        cells = [row.budget, row.method, row.seeds, row.evaluations, row.episodes]
        lines.append([*cells, row.core_seconds, score, row.accuracy])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    told = "\n".join(f"- {sentence}" for sentence in verdict(document))
    notes = (
        "Evaluations, episodes, core-seconds and scores are medians over a method’s searches, the "
        "curvature included where it is needed. What is fine-tuned is on the test split, ± one "
        "standard error over images and training seeds."
    )
    notes = f"{notes} {machines_said(document)}".rstrip()
    return f"{table}\n\n{notes}\n\n{told}\n"
