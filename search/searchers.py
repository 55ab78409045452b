"""Searchers by name: each proposes allocations for a budget, the best of which is its candidate.

``SEARCHERS`` is the table that a config's ``methods`` names. A searcher gets a problem and yields
evaluations, one for each distinct allocation that it scored. The Hessian methods need no more
than one, by proxy; an agent or a sampler yields as many as it may and scores them as it likes.

Weights and activations are chosen each by itself wherever no budget joins them: Ω is a sum, so the
best of both is the best of all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hawq.allocate import (
    Budget,
    Front,
    best_pair,
    lagrangian_solution,
    milp_solution,
    monotone_front,
    pareto_front,
)
from hawq.allocation import Allocation
from hawq.cost import Cost, activation_bits, weight_bits
from hawq.space import Kind, Space
from search.evaluate import Evaluate, Evaluation
from search.tables import Tables

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

    def apart(self) -> "Mapping[Kind, Budget | None] | None":
        """Return the one budget of the weights and the one of the activations, where no other is.

        None where a budget joins the two, is no sum, or is not alone.
        """
        found: dict[Kind, Budget | None] = {}
        for kind in _KINDS:
            part = self.tables.part(kind)
            if part is not None:
                found[kind] = None
        for budget in self.budgets:
            of = _kinds(budget.cost, self.tables.space)
            if budget.cost.pairs or len(budget.cost.steps) > 1 or len(of) > 1:
                return None
            for kind in of:
                if found[kind] is not None:
                    return None
                found[kind] = budget
        names = self.tables.space.names  # made anew at every call, and long
        tied = ({names[i][0] for i in row} for row in self.tables.space.rows())
        return None if any(len(kinds) > 1 for kinds in tied) else found


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


# Makes a front of a space: its tables, and the cost that the front is over, shape (L, B).
MakeFront = Callable[[Tables, NDArray[np.int64]], Front]


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
        return None if part is None else self.make_front(part[0], _size(part[0].space, kind))

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:  # noqa: ARG002
        """Yield one allocation, scored by −Ω."""
        tables = problem.tables
        apart = problem.apart()
        if apart is not None:
            bits: dict[str, int] = {}
            for kind, budget in apart.items():
                part = tables.part(kind)
                assert part is not None
                mine, rows = part
                cost = _size(mine.space, kind)
                if budget is not None:
                    columns = np.searchsorted(tables.space.widths, mine.space.widths)
                    cost = budget.cost.steps[0][np.ix_(np.array(rows), columns)]
                front = self.make_front(mine, cost)
                point = len(front) - 1 if budget is None else front.within(budget.limit)
                chosen = front.allocation(point)
                bits |= dict(zip(chosen.names, chosen.bits, strict=True))
            found = tables.proxy(Allocation.of(tables.space, bits))
            bound = -found.score if self.exact else None
            yield tables.proxy(found.allocation, bound)
        elif self.exact:
            solution = milp_solution(tables.space, tables.sensitivity, problem.budgets)
            yield tables.proxy(solution.allocation, solution.bound)
        else:
            yield tables.proxy(self._pair(problem))

    def _pair(self, problem: Problem) -> Allocation:
        tables, parts = problem.tables, [problem.tables.part(kind) for kind in _KINDS]
        fronts = [self.front(tables, kind) for kind in _KINDS]
        first, second = (
            (front, part[1]) if front is not None and part is not None else (_nothing(), [])
            for front, part in zip(fronts, parts, strict=True)
        )
        pair = best_pair(*first, *second, tables.space.widths, problem.budgets)
        if pair is None:
            # Something fits, or says why nothing does: a latency table need not favour few bits.
            return milp_solution(tables.space, tables.sensitivity, problem.budgets).allocation
        both: dict[str, int] = {}
        for front, point in zip(fronts, pair, strict=True):
            if front is not None:
                chosen = front.allocation(point)
                both |= dict(zip(chosen.names, chosen.bits, strict=True))
        return Allocation.of(tables.space, both)


@dataclass(frozen=True, slots=True)
class ChannelSearcher:
    """Give every channel its own bits, by prices, with a proven gap."""

    by_channel: bool = True

    def front(self, tables: Tables, kind: Kind) -> Front | None:  # noqa: ARG002
        """There is none of the size of a picture: the hull has a point for every channel."""
        return None

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:  # noqa: ARG002
        """Yield one allocation, scored by −Ω."""
        tables, apart = problem.tables, problem.apart()
        assert apart is not None, "a channel's budgets are one of the weights, one of activations"
        bits: dict[str, int] = {}
        bound = 0.0
        for kind, budget in apart.items():
            part = tables.part(kind)
            assert part is not None
            mine, rows = part
            cost, limit = _size(mine.space, kind), 2**62
            if budget is not None:
                columns = np.searchsorted(tables.space.widths, mine.space.widths)
                cost, limit = budget.cost.steps[0][np.ix_(np.array(rows), columns)], budget.limit
            solution = lagrangian_solution(
                mine.space,
                mine.sensitivity,
                cost,
                limit,
                max_widths=problem.rules.max_widths,
                multiple=problem.rules.multiple,
            )
            bound += solution.bound
            bits |= dict(zip(solution.allocation.names, solution.allocation.bits, strict=True))
        yield tables.proxy(Allocation.of(tables.space, bits), bound)


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
        chosen = fits[-1] if fits else 0
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


def _size(space: Space, kind: Kind) -> NDArray[np.int64]:
    return weight_bits(space) if kind == "weights" else activation_bits(space)


def _kinds(cost: Cost, space: Space) -> list[Kind]:
    """Tell whether a cost depends on weights, on activations, or on both."""
    varies = (cost.steps != cost.steps[:, :, :1]).any((0, 2))
    rows = {i for pair in cost.pairs for i in (pair.first, pair.second)}
    rows |= set(np.flatnonzero(varies).tolist())
    names = space.names
    return [kind for kind in _KINDS if any(names[i][0] == kind[0] for i in rows)]


def _nothing() -> Front:
    """A front of no groups, for a pair of which one half is missing."""
    one = Space.from_json([{"name": "w:", "num_elements": 1, "macs": 0, "menu": [1]}])
    return Front(one, np.zeros(1, np.int64), np.zeros(1), np.zeros((1, 0), np.int8))


SEARCHERS: dict[str, Searcher] = {
    "uniform": UniformSearcher(),
    "hawq-v2": FrontSearcher(
        lambda tables, cost: monotone_front(tables.space, tables.sensitivity, cost, tables.traces),
        exact=False,
    ),
    "exact": FrontSearcher(
        lambda tables, cost: pareto_front(tables.space, tables.sensitivity, cost), exact=True
    ),
    "channel": ChannelSearcher(),
}
