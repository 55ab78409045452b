"""How a comparison writes its scores: accuracies in percent, −Ω as it is."""

from dataclasses import dataclass

from search.evaluate import Fidelity
from search.quantities import percent, points, significant

__all__ = ["Scale", "accuracy_points"]


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of the scores that the searches saw.

    Attributes:
        fidelity: How an allocation was scored.
    """

    fidelity: Fidelity

    @property
    def factor(self) -> int:
        """What a figure multiplies scores by."""
        return 1 if self.fidelity == "proxy" else 100

    @property
    def axis(self) -> str:
        """Title of an axis."""
        return "Score, −Ω" if self.fidelity == "proxy" else "Score on the search split (%)"

    @property
    def unit(self) -> str:
        """What a column of scores is in."""
        return "−Ω" if self.fidelity == "proxy" else "%"

    def number(self, score: float) -> str:
        """Write a score without its unit."""
        return significant(score) if self.fidelity == "proxy" else percent(score)

    def score(self, score: float) -> str:
        """Write a score: ``88.21 %``."""
        return self.number(score) if self.fidelity == "proxy" else f"{percent(score)} %"

    def difference(self, value: float) -> str:
        """Write a difference: ``+0.31 points``."""
        if self.fidelity == "proxy":
            return f"{'+' if value > 0 else ''}{significant(value)}"
        return accuracy_points(value)


def accuracy_points(value: float) -> str:
    """Write a difference of accuracies: ``+0.31 points``."""
    return f"{points(value)} points"
