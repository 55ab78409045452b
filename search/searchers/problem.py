"""What a searcher is asked, and what it is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from envs.ranked import Unit
from envs.walk import Scope
from hawq.allocate import Budget, Front, InfeasibleBudgetsError, Verdict, milp_solution
from hawq.allocation import Allocation
from hawq.cost import Cost
from hawq.ranking import RankingKey
from hawq.space import Kind, Space
from search.evaluate import Evaluate, Evaluation
from search.tables import Part, Tables

__all__ = [
    "KINDS",
    "Effort",
    "Half",
    "Problem",
    "Ratios",
    "Reward",
    "Rules",
    "Searcher",
    "halves_of",
    "refuse",
    "together",
]

KINDS: tuple[Kind, Kind] = ("weights", "activations")


@dataclass(frozen=True, slots=True)
class Rules:
    """What a layer's channels must follow.

    Attributes:
        max_widths: Different widths that they may have; None for any number.
        multiple: How many of them have a width is a multiple of this.
    """

    max_widths: int | None = None
    multiple: int = 1


@dataclass(frozen=True, slots=True)
class Ratios:
    """How the process of ratios is laid out.

    Attributes:
        ranking: Order in which channels receive their bits.
        unit: What ratios are of.
        scope: Whether one walk is of the network or of a layer.
    """

    ranking: RankingKey = "omega_gain"
    unit: Unit = "channels"
    scope: Scope = "network"


@dataclass(frozen=True, slots=True)
class Reward:
    """What a score is worth to an agent: 0.1 a point above the reference (Wang et al., 2019).

    Attributes:
        reference: Score of the network before quantization; 0 of the proxy.
        scale: Of scores in [0, 1]; of the proxy, 1 / Ω of the least bits.
    """

    reference: float = 0.0
    scale: float = 10.0

    def __call__(self, evaluation: Evaluation) -> float:
        """Return the reward of an evaluation."""
        return self.scale * (evaluation.score - self.reference)


@dataclass(frozen=True, slots=True)
class Effort:
    """How a search is carried out: nothing of what is searched.

    Attributes:
        runners: Processes that score for it, each with an environment of its own; 0: this one.
        cpus: Of each.
        gpus: Of each.
        checkpoint: File in which an agent's state is kept, and from which it goes on.
    """

    runners: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    checkpoint: Path | None = None


@dataclass(frozen=True, slots=True)
class Half:
    """The weights, or the activations, where they can be chosen by themselves.

    Attributes:
        part: Their tables.
        budget: What limits them; None if nothing does.
    """

    part: Part
    budget: Budget | None

    @property
    def cost(self) -> NDArray[np.int64]:
        """What is limited, shape (R, C); their size where nothing is."""
        return self.part.size if self.budget is None else self.part.cost(self.budget.cost)

    @property
    def limit(self) -> int:
        """The most that they may cost."""
        return int(self.cost.max(1).sum()) if self.budget is None else self.budget.limit


@dataclass(frozen=True, slots=True)
class Problem:
    """What a searcher is asked.

    Attributes:
        tables: The space with its costs and sensitivities.
        budgets: What no proposed allocation may exceed.
        evaluate: Scores an allocation; costs what its fidelity costs.
        rules: For channels.
        reward: What a score is worth.
        ratios: For searchers of ratios.
        features: What an agent that goes from layer to layer sees of each, shape (L, F); None
            where no such agent searches.
        effort: How to search.
    """

    tables: Tables
    budgets: tuple[Budget, ...]
    evaluate: Evaluate
    rules: Rules = Rules()
    reward: Reward = Reward()
    ratios: Ratios = Ratios()
    features: NDArray[np.float32] | None = None
    effort: Effort = Effort()

    def fits(self, allocation: Allocation) -> bool:
        """Whether an allocation is within all budgets."""
        space = self.tables.space
        return all(budget.cost.of(space, allocation) <= budget.limit for budget in self.budgets)

    def halves(self) -> list[Half] | None:
        """Return the weights and the activations, each with the one budget that limits it alone.

        None where a budget joins the two, is no plain sum, or is not alone.

        Raises:
            InfeasibleBudgetsError: If a cost that no choice changes is above its limit.
        """
        space = self.tables.space
        parts = [part for kind in KINDS if (part := self.tables.part(kind)) is not None]
        limits: dict[Kind, Budget] = {}
        for budget in self.budgets:
            kinds = _kinds(budget.cost, space)
            if not kinds:
                _refuse_constant(budget, space)
                continue
            plain = not budget.cost.pairs and len(budget.cost.steps) == 1
            if len(kinds) > 1 or not plain or kinds[0] in limits:
                return None
            limits[kinds[0]] = budget
        names = space.names  # made anew at every call, and long
        if any(len({names[i][0] for i in row}) > 1 for row in space.rows()):
            return None
        return [Half(part, limits.get(part.kind)) for part in parts]


class Searcher(Protocol):
    """A way of searching.

    Attributes:
        by_channel: Whether it gives every channel its own bits.
        is_random: Whether another seed may choose otherwise.
        needs_sums: Whether each budget must be a sum, of the weights or of the activations alone.
        needs_blocks: Whether it goes by the top eigenvalues of blocks, and chooses weights alone.
        needs_scores: Whether it scores what it tries: an agent, a sampler, a climber.
        starts: Methods whose choices it begins with; none where it begins with its own.
    """

    @property
    def by_channel(self) -> bool: ...

    @property
    def is_random(self) -> bool: ...

    @property
    def needs_sums(self) -> bool: ...

    @property
    def needs_blocks(self) -> bool: ...

    @property
    def needs_scores(self) -> bool: ...

    @property
    def starts(self) -> "tuple[Searcher, ...]": ...

    def front(self, tables: Tables, kind: Kind) -> Front | None:
        """Return every point the method can offer over all sizes, where it knows them.

        Its sensitivity is Ω: of a method that goes by something else it need not fall.
        """
        ...

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterable[Evaluation]:
        """Yield scored allocations, each distinct and within the budgets.

        Args:
            problem: What to search.
            evaluations: How many allocations may be scored, at most.
            seed: Of whatever is random.

        Raises:
            InfeasibleBudgetsError: If nothing is within the budgets.
        """
        ...


def halves_of(problem: Problem) -> list[Half]:
    """Return the halves of a problem for a method that can do no other.

    Raises:
        ValueError: If the budgets are not one of the weights and one of the activations.
    """
    halves = problem.halves()
    if halves is None:
        raise ValueError("budgets must be one sum of the weights and one of the activations")
    return halves


def refuse(problem: Problem, what: str) -> NoReturn:
    """Say that nothing is within the budgets, or that none of these allocations is."""
    milp_solution(problem.tables.space, problem.tables.sensitivity, problem.budgets)
    raise ValueError(f"no allocations of {what} are within the budgets, others are")


def together(space: Space, chosen: Sequence[Allocation]) -> Allocation:
    """Join allocations of parts to one of the whole."""
    bits: dict[str, int] = {}
    for allocation in chosen:
        bits |= dict(zip(allocation.names, allocation.bits, strict=True))
    return Allocation.of(space, bits)


def _kinds(cost: Cost, space: Space) -> list[Kind]:
    """Tell whether a cost depends on weights, on activations, or on both."""
    varies = (cost.steps != cost.steps[:, :, :1]).any((0, 2))
    rows = {i for pair in cost.pairs for i in (pair.first, pair.second)}
    rows |= set(np.flatnonzero(varies).tolist())
    names = space.names
    return [kind for kind in KINDS if any(names[i][0] == kind[0] for i in rows)]


def _refuse_constant(budget: Budget, space: Space) -> None:
    least = budget.cost.of(space, Allocation.least(space))
    if least > budget.limit:
        verdict = Verdict(budget.cost.name, budget.limit, least, None)
        raise InfeasibleBudgetsError([verdict])
