"""Bits for every channel."""

from collections.abc import Iterator
from dataclasses import dataclass

from hawq.allocate import Front, lagrangian_solution
from hawq.space import Kind
from search.evaluate import Evaluation
from search.searchers.problem import Problem, Searcher, halves_of, together
from search.tables import Tables

__all__ = ["ChannelSearcher"]


@dataclass(frozen=True, slots=True)
class ChannelSearcher:
    """Give every channel its own bits, by prices, with a proven gap."""

    by_channel: bool = True
    is_random: bool = False
    needs_sums: bool = True
    needs_blocks: bool = False
    needs_scores: bool = False
    starts: tuple[Searcher, ...] = ()

    def front(self, tables: Tables, kind: Kind) -> Front | None:  # noqa: ARG002
        """There is none of the size of a picture: the hull has a point for every channel."""
        return None

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:  # noqa: ARG002
        """Yield one allocation, scored by −Ω.

        Raises:
            ValueError: If the budgets are not one of the weights and one of the activations.
        """
        solutions = [
            lagrangian_solution(
                half.part.space,
                half.part.sensitivity,
                half.cost,
                half.limit,
                max_widths=problem.rules.max_widths,
                multiple=problem.rules.multiple,
            )
            for half in halves_of(problem)
        ]
        allocation = together(problem.tables.space, [solution.allocation for solution in solutions])
        yield problem.tables.proxy(allocation, sum(solution.bound for solution in solutions))
