"""Searchers by name: each proposes allocations for a budget, the best of which is its candidate.

``SEARCHERS`` is the table that a config's ``methods`` names. A searcher gets a problem and yields
evaluations, one for each distinct allocation that it scored. The Hessian methods need no more
than one, by proxy; an agent or a sampler yields as many as it may and scores them as it likes.

Weights and activations are chosen each by itself wherever no budget joins them: Ω is a sum, so the
best of both is the best of all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from hawq.allocate import (
    Budget,
    Front,
    InfeasibleBudgetsError,
    Options,
    Verdict,
    best_pair,
    lagrangian_solution,
    milp_solution,
    monotone_front,
    pareto_front,
)
from hawq.allocation import Allocation
from hawq.cost import Cost
from hawq.space import Kind, Space
from search.evaluate import Evaluate, Evaluation
from search.tables import Part, Tables

__all__ = ["SEARCHERS", "Problem", "Rules", "Searcher"]

_KINDS: tuple[Kind, Kind] = ("weights", "activations")


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
    """

    tables: Tables
    budgets: tuple[Budget, ...]
    evaluate: Evaluate
    rules: Rules = Rules()

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
        parts = [part for kind in _KINDS if (part := self.tables.part(kind)) is not None]
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
    """

    @property
    def by_channel(self) -> bool: ...

    def front(self, tables: Tables, kind: Kind) -> Front | None:
        """Return every point the method can offer over all sizes, where it knows them."""
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


# Makes a front of a part, over a cost of shape (R, C).
MakeFront = Callable[[Part, NDArray[np.int64]], Front]


@dataclass(frozen=True, slots=True)
class FrontSearcher:
    """Take the least sensitive point of a front that fits.

    Where budgets join weights and activations, or are several: with ``exact`` an integer programme;
    without, the best pair of a point of the weights' front over size and one of the activations'.
    """

    make_front: MakeFront
    exact: bool
    by_channel: bool = False

    def front(self, tables: Tables, kind: Kind) -> Front | None:
        """Return the front over the size of all weights, or of one example's activations."""
        part = tables.part(kind)
        return None if part is None else self.make_front(part, part.size)

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:  # noqa: ARG002
        """Yield one allocation, scored by −Ω.

        Raises:
            ValueError: If without ``exact`` no pair of points is within the budgets, though
                another allocation is.
        """
        tables, halves = problem.tables, problem.halves()
        if halves is not None:
            chosen = []
            for half in halves:
                front = self.make_front(half.part, half.cost)
                chosen.append(front.allocation(front.within(half.limit)))
            allocation = _together(tables.space, chosen)
            yield tables.proxy(allocation, tables.omega(allocation) if self.exact else None)
        elif self.exact:
            solution = milp_solution(tables.space, tables.sensitivity, problem.budgets)
            yield tables.proxy(solution.allocation, solution.bound)
        else:
            yield tables.proxy(self._pair(problem))

    def _pair(self, problem: Problem) -> Allocation:
        tables = problem.tables
        fronts: list[Front] = []
        options: list[Options] = []
        for kind in _KINDS:
            part = tables.part(kind)
            if part is not None:
                front = self.make_front(part, part.size)
                fronts.append(front)
                options.append(Options(part.rows, part.columns[front.choice], front.sensitivity))
        first, second = [*options, Options.none()][:2]
        pair = best_pair(first, second, problem.budgets)
        if pair is None:
            _refuse(problem, "its fronts over size")
        points = zip(fronts, pair, strict=False)  # of a missing half there is no front
        return _together(tables.space, [front.allocation(point) for front, point in points])


@dataclass(frozen=True, slots=True)
class ChannelSearcher:
    """Give every channel its own bits, by prices, with a proven gap."""

    by_channel: bool = True

    def front(self, tables: Tables, kind: Kind) -> Front | None:  # noqa: ARG002
        """There is none of the size of a picture: the hull has a point for every channel."""
        return None

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:  # noqa: ARG002
        """Yield one allocation, scored by −Ω.

        Raises:
            ValueError: If the budgets are not one of the weights and one of the activations.
        """
        tables, halves = problem.tables, problem.halves()
        if halves is None:
            raise ValueError("budgets must be one sum of the weights and one of the activations")
        solutions = [
            lagrangian_solution(
                half.part.space,
                half.part.sensitivity,
                half.cost,
                half.limit,
                max_widths=problem.rules.max_widths,
                multiple=problem.rules.multiple,
            )
            for half in halves
        ]
        allocation = _together(tables.space, [solution.allocation for solution in solutions])
        yield tables.proxy(allocation, sum(solution.bound for solution in solutions))


@dataclass(frozen=True, slots=True)
class UniformSearcher:
    """The reference that knows nothing: the same bits everywhere.

    The largest width of weights and of activations that fit together, the lesser of the two as
    large as can be; what is left of the budgets gives the next width to layers and tensors in a
    seeded random order, wherever it still fits. At a budget of exactly b bits a weight this is
    plain uniform quantization. Pinned layers keep their bits; a menu that lacks b gives its
    largest width below it, or else its least.
    """

    by_channel: bool = False

    def front(self, tables: Tables, kind: Kind) -> None:  # noqa: ARG002
        """There is none: the order is random."""
        return

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:  # noqa: ARG002
        """Yield one allocation, scored by −Ω."""
        space = problem.tables.space
        of = {kind: part.widths for kind in _KINDS if (part := space.part(kind)) is not None}
        weights, tensors = of.get("weights", (0,)), of.get("activations", (0,))
        pairs = sorted(
            ((w, a) for w in weights for a in tensors),
            key=lambda pair: (min(pair), sum(pair), pair),
        )
        uniform = [_uniform(space, w, a) for w, a in pairs]
        fits = [i for i, bits in enumerate(uniform) if problem.fits(Allocation.of(space, bits))]
        # Least bits fit wherever anything does, but for latency, which may favour many bits.
        if not fits:
            _refuse(problem, "uniform bits")
        chosen = fits[-1]
        bits = list(uniform[chosen])
        w, a = pairs[chosen]
        wider = _uniform(space, _next(weights, w), _next(tensors, a))
        rows = space.rows()
        for row in np.random.default_rng(seed).permutation(len(rows)):
            trial = list(bits)
            for i in rows[row]:
                trial[i] = wider[i]
            if trial != bits and problem.fits(Allocation.of(space, trial)):
                bits = trial
        yield problem.tables.proxy(Allocation.of(space, bits))


def _uniform(space: Space, weight_width: int, activation_width: int) -> list[int]:
    bits = [0] * len(space)
    for members in space.rows():
        menu = space.menu_of(members)
        is_weight = space.names[members[0]].startswith("w:")
        width = weight_width if is_weight else activation_width
        below = [b for b in menu if b <= width]
        for i in members:
            bits[i] = below[-1] if below else menu[0]
    return bits


def _next(widths: tuple[int, ...], width: int) -> int:
    return min((b for b in widths if b > width), default=width)


def _kinds(cost: Cost, space: Space) -> list[Kind]:
    """Tell whether a cost depends on weights, on activations, or on both."""
    varies = (cost.steps != cost.steps[:, :, :1]).any((0, 2))
    rows = {i for pair in cost.pairs for i in (pair.first, pair.second)}
    rows |= set(np.flatnonzero(varies).tolist())
    names = space.names
    return [kind for kind in _KINDS if any(names[i][0] == kind[0] for i in rows)]


def _refuse(problem: Problem, what: str) -> NoReturn:
    """Say that nothing is within the budgets, or that none of these allocations is."""
    milp_solution(problem.tables.space, problem.tables.sensitivity, problem.budgets)
    raise ValueError(f"no allocations of {what} are within the budgets, others are")


def _refuse_constant(budget: Budget, space: Space) -> None:
    least = budget.cost.of(space, Allocation.of(space, _uniform(space, 0, 0)))
    if least > budget.limit:
        verdict = Verdict(budget.cost.name, budget.limit, least, None)
        raise InfeasibleBudgetsError([verdict])


def _together(space: Space, chosen: Sequence[Allocation]) -> Allocation:
    """Join allocations of parts to one of the whole."""
    bits: dict[str, int] = {}
    for allocation in chosen:
        bits |= dict(zip(allocation.names, allocation.bits, strict=True))
    return Allocation.of(space, bits)


SEARCHERS: dict[str, Searcher] = {
    "uniform": UniformSearcher(),
    "hawq-v2": FrontSearcher(
        lambda tables, cost: monotone_front(tables.space, tables.sensitivity, cost, tables.traces),
        exact=False,
    ),
    "exact": FrontSearcher(
        lambda part, cost: pareto_front(part.space, part.sensitivity, cost), exact=True
    ),
    "channel": ChannelSearcher(),
}
