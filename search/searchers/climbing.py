"""Hill climbing from the Hessian's solution."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hawq.allocate import Front
from hawq.allocation import Allocation
from hawq.space import Kind
from search.evaluate import Evaluation
from search.searchers.problem import Problem, Searcher
from search.searchers.processes import distinct
from search.tables import Tables

__all__ = ["ClimbingSearcher", "around"]

# A step changes how much so many layers count at most.
_MOST_CHANGES = 3


@dataclass(frozen=True, slots=True)
class ClimbingSearcher:
    """Correct the Hessian where scores say so: a (1 + 1) evolution strategy.

    What is varied is how much each layer, or tensor, counts in Ω: a step multiplies this, of one to
    three of them, by 2 to the power of a standard normal number. The allocation is then the base
    method's within the same budgets. It begins with factors of 1, the Hessian's own solution. A
    step that scores no worse is taken.

    Attributes:
        base: Chooses for given sensitivities.
    """

    base: Searcher
    is_random: bool = True
    needs_blocks: bool = False
    needs_scores: bool = True

    @property
    def starts(self) -> tuple[Searcher, ...]:
        """What it begins with."""
        return (self.base,)

    def beginnings(self, problem: Problem) -> list[Allocation]:
        """Return what it begins with: the Hessian's solution."""
        return [found.allocation for found in self.base.search(problem, evaluations=1, seed=0)]

    @property
    def by_channel(self) -> bool:
        """As the base method."""
        return self.base.by_channel

    @property
    def needs_sums(self) -> bool:
        """As the base method."""
        return self.base.needs_sums

    def front(self, tables: Tables, kind: Kind) -> Front | None:  # noqa: ARG002
        """There is none: a search is of one budget."""
        return None

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:
        """Yield scored allocations, each once.

        Raises:
            InfeasibleBudgetError: If nothing is within the budgets.
        """
        yield from distinct(self._climb(problem, seed), evaluations)

    def _climb(self, problem: Problem, seed: int) -> Generator[Evaluation]:
        rng = np.random.default_rng(seed)
        owner = _owners(problem)
        num_owners = int(owner.max()) + 1
        at = np.zeros(num_owners)
        (solution,) = self.beginnings(problem)
        best = problem.evaluate(solution)
        yield best
        while True:
            num_changes = min(num_owners, int(rng.integers(1, _MOST_CHANGES + 1)))
            changes = rng.choice(num_owners, num_changes, replace=False)
            tried = at.copy()
            tried[changes] += rng.standard_normal(num_changes)
            found = problem.evaluate(_chosen(self.base, problem, tried[owner]))
            if found.score >= best.score:
                best, at = found, tried
            yield found


def around(base: Searcher, problem: Problem, rng: np.random.Generator) -> Allocation:
    """Draw an allocation from around a base method's: every layer counts more or less by chance."""
    owner = _owners(problem)
    return _chosen(base, problem, rng.standard_normal(int(owner.max()) + 1)[owner])


def _owners(problem: Problem) -> NDArray[np.int64]:
    """Return the number of each group's layer or tensor, shape (L,)."""
    named = [f"{group.name[:2]}{group.owner}" for group in problem.tables.space.groups]
    place = {owner: i for i, owner in enumerate(dict.fromkeys(named))}
    return np.array([place[owner] for owner in named])


def _chosen(base: Searcher, problem: Problem, exponents: NDArray[np.float64]) -> Allocation:
    """Let a method choose where Ω of each group counts 2^exponent times, shape (L,)."""
    tables = problem.tables
    sensitivity = tables.sensitivity * np.exp2(exponents)[:, None]
    varied = replace(problem, tables=replace(tables, sensitivity=sensitivity))
    (found,) = base.search(varied, evaluations=1, seed=0)
    return found.allocation
