"""Searching through a decision process: an agent, or a sampler, chooses its actions.

All of them choose among the same allocations, by the same actions, within the same budgets, and
none of them can leave these.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from envs.channel_ratios import ChannelRatios
from envs.layer_bits import LayerBits
from envs.ranked import Ranked
from hawq.allocate import Front
from hawq.allocation import Allocation
from hawq.ranking import ranking
from hawq.space import Kind
from search.evaluate import Evaluation
from search.searchers.problem import Half, Problem, Searcher, halves_of
from search.tables import Tables

__all__ = ["MOST_REPEATS", "Drive", "Process", "ProcessSearcher", "distinct"]

# Proposals without anything new after which a search has nothing more to say.
MOST_REPEATS = 200


@dataclass(frozen=True, slots=True)
class Process:
    """Builds the decision process of a problem, here or on a runner.

    Attributes:
        problem: What is searched.
        by_channel: CW-HAWQ's process of the channels' ratios, or HAQ's of the layers.
    """

    problem: Problem
    by_channel: bool

    def __call__(self) -> ChannelRatios | LayerBits:
        """Build it.

        Raises:
            InfeasibleBudgetError: If nothing is within the budgets.
            ValueError: If there is nothing to choose.
        """
        problem = self.problem
        if self.by_channel:
            return ChannelRatios(
                space=problem.tables.space,
                parts=[self._ranked(half) for half in halves_of(problem)],
                evaluate=self.rewarded,
                unit=problem.ratios.unit,
                scope=problem.ratios.scope,
            )
        assert problem.features is not None, "an agent of layers needs to see them"
        return LayerBits(
            space=problem.tables.space,
            budgets=problem.budgets,
            features=problem.features,
            evaluate=self.rewarded,
        )

    def rewarded(self, allocation: Allocation) -> tuple[float, Mapping[str, Any]]:
        """Score an allocation; return its reward and, for ``info``, the evaluation."""
        evaluation = self.problem.evaluate(allocation)
        return self.problem.reward(evaluation), {"evaluation": evaluation}

    def _ranked(self, half: Half) -> Ranked:
        part = half.part
        order = ranking(
            part.space,
            self.problem.ratios.ranking,
            traces=part.traces,
            sensitivity=part.sensitivity,
        )
        return Ranked(part.space, part.rows, half.cost, half.limit, part.sensitivity, order)


class Drive(Protocol):
    """Whoever chooses the actions."""

    def __call__(
        self,
        process: Process,
        *,
        starts: Sequence[Sequence[float]],
        evaluations: int,
        seed: int,
    ) -> Generator[Evaluation]:
        """Yield the evaluation of every episode, repeated allocations included.

        Args:
            process: Builds what is driven.
            starts: Actions of the first episodes.
            evaluations: How many distinct ones are wanted, roughly: schedules go by it.
            seed: Of everything random.
        """
        ...


@dataclass(frozen=True, slots=True)
class ProcessSearcher:
    """Let a driver go through episode after episode.

    Attributes:
        drive: The driver.
        by_channel: Whether it chooses ratios of channels, or bits of layers.
        starts: Hessian methods whose choices are the first episodes.
    """

    drive: Drive
    by_channel: bool
    starts: tuple[Searcher, ...] = ()
    is_random: bool = True
    needs_blocks: bool = False
    needs_scores: bool = True

    @property
    def needs_sums(self) -> bool:
        """Whether each budget must be a sum of the weights or of the activations alone."""
        return self.by_channel

    def front(self, tables: Tables, kind: Kind) -> Front | None:  # noqa: ARG002
        """There is none: a search is of one budget."""
        return None

    def search(self, problem: Problem, *, evaluations: int, seed: int) -> Iterator[Evaluation]:
        """Yield scored allocations, each once.

        Raises:
            InfeasibleBudgetError: If nothing is within the budgets.
            ValueError: If there is nothing to choose.
        """
        process = Process(problem, self.by_channel)
        starts = [actions for actions, _ in self._beginnings(process)]
        driven = self.drive(process, starts=starts, evaluations=evaluations, seed=seed)
        yield from distinct(driven, evaluations)

    def beginnings(self, problem: Problem) -> list[Allocation]:
        """Return what it begins with: the Hessian's choices, as near as the process comes.

        Raises:
            InfeasibleBudgetError: If nothing is within the budgets.
            ValueError: If there is nothing to choose.
        """
        return [allocation for _, allocation in self._beginnings(Process(problem, self.by_channel))]

    def _beginnings(self, process: Process) -> list[tuple[list[float], Allocation]]:
        """Return actions with what they lead to, each allocation once."""
        env = process()
        found: dict[str, tuple[list[float], Allocation]] = {}
        for searcher in self.starts:
            for evaluation in searcher.search(process.problem, evaluations=1, seed=0):
                actions = env.actions_of(evaluation.allocation)
                allocation = env.allocation_of(actions)
                found.setdefault(allocation.digest, (actions, allocation))
        return list(found.values())


def distinct(proposed: Generator[Evaluation], evaluations: int) -> Iterator[Evaluation]:
    """Yield each allocation's first evaluation, until enough, or until nothing new comes.

    Args:
        proposed: Every proposal's evaluation; closed at the end.
        evaluations: How many to yield at most.
    """
    seen: set[str] = set()
    proposals = 0
    with closing(proposed):  # an agent must be stopped
        for evaluation in proposed:
            proposals += 1
            digest = evaluation.allocation.digest
            if digest not in seen:
                seen.add(digest)
                yield replace(evaluation, proposals=proposals)
                proposals = 0
            if len(seen) == evaluations or proposals == MOST_REPEATS:
                return
