"""CW-HAWQ's decision process: how many channels receive each bit-width (Qian et al., 2020).

The Hessian orders the channels; only the ratios of the bit-widths are searched. What an episode
can lead to is a staircase along that order, and an episode has a step a width, not one a channel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from envs.allocation_env import AllocationEnv, Evaluate
from envs.ranked import Part, Ranked, Rows, Unit
from envs.walk import Scope, walks_of
from hawq.allocation import Allocation
from hawq.space import Space

__all__ = ["ChannelRatios"]


class ChannelRatios(AllocationEnv["_Episode"]):
    """Choose how many channels receive each bit-width, within a budget for each part.

    The weights are walked first, then the activations. Their widths come from the widest to the
    narrowest, a step each but for the narrowest, which takes what is left. A step gives its width
    to the next rows of the ranking; how many can take it at most is known from the budget, with
    all the rest at its narrowest. A row whose menu lacks the width takes the next narrower one
    that it has, else its narrowest; a width that would thus change nothing is no step. A row of one
    width, such as a pinned one, is not walked.

    ===========  ===================================================================================
    Action       ``Box(0, 1, (1,))``: the fraction, of the rows that can take this width, that does;
                 rounded to whole rows. With ``unit="weights"``, the fraction of their elements.
    Observation  ``Box(0, 1, (10,))``, as below.
    Reward       0 until the end, then the first of what ``evaluate`` returns.
    Start        Everything at its narrowest. Deterministic.
    End          Terminated after the last width, always within every budget; no truncation.
                 ``info`` is then the second of what ``evaluate`` returns, and ``allocation``.
    ===========  ===================================================================================

    =====  =========================================================================================
    Entry  Observed before each step; after the last one 0, 1, 2, 3, 6 and 8 describe no step and
           are 1, 0, 0, 0, 0, 0.
    =====  =========================================================================================
    0      Steps taken / steps of an episode.
    1      1 if activations are walked, 0 if weights are.
    2      The width at hand / the widest of all.
    3      What is left to assign of this walk, as a share of it, in ``unit``.
    4      Cost of the weights that have their bits / their limit.
    5      The same of the activations.
    6      Least cost that this part can still have / its limit.
    7      Ω, with what is left at its narrowest / Ω with everything at its narrowest.
    8      Sensitivity of the next row: Ω's fall by unit of cost, on a logarithmic scale from 0 for
           the part's least sensitive row to 1 for its most.
    9      The action before.
    =====  =========================================================================================

    Args:
        space: The whole space; its groups may be channels or layers.
        parts: The weights, the activations, or both.
        evaluate: Reward of a finished allocation, higher is better, with what ``info`` says of it.
        unit: What an action is a fraction of: rows, or their elements.
        scope: ``network`` makes one walk of a part; ``layer`` one of every layer, in the space's
            order, while the rest of the network is at its narrowest.
        render_mode: ``rgb_array``, ``ansi``, or None.

    Raises:
        InfeasibleBudgetError: If a part is above its limit even at its narrowest.
        ValueError: If nothing can be chosen, a part has fewer rows than widths to choose from, or
            a table or an order is wrong.
    """

    def __init__(
        self,
        *,
        space: Space,
        parts: Sequence[Ranked],
        evaluate: Evaluate,
        unit: Unit = "channels",
        scope: Scope = "network",
        render_mode: str | None = None,
    ) -> None:
        _check(space, parts, unit, scope)
        laid = [Rows.of(part, unit) for part in parts]
        self._parts = [Part.of(part, rows) for part, rows in zip(parts, laid, strict=True)]
        self._walks = [
            walk
            for i, (part, rows) in enumerate(zip(parts, laid, strict=True))
            for walk in walks_of(part, rows, i, scope)
        ]
        self._schedule = [
            (i, step) for i, walk in enumerate(self._walks) for step in range(len(walk.widths) - 1)
        ]
        self._narrowest = np.empty(len(space), np.int64)
        for rows in laid:
            for groups, bits in zip(rows.members, rows.bits[:, 0], strict=True):
                self._narrowest[groups] = bits
        self._widest = max((int(walk.widths[0]) for walk in self._walks), default=0)
        super().__init__(
            space,
            evaluate,
            num_steps=len(self._schedule),
            num_observed=10,
            render_mode=render_mode,
        )

    @override
    def actions_of(self, allocation: Allocation) -> list[float]:
        """Return actions that lead to an allocation, or near it.

        A staircase along the ranking and within the budgets is met exactly. Of any other, each
        width's cut is put where as much of the ranking, in ``unit``, comes before it as receives
        that width or a wider one in the allocation, as far as the budget goes.

        Returns:
            ``num_steps`` fractions, each as far as it can be from where the rounding turns.

        Raises:
            ValueError: If the allocation belongs to another space.
        """
        if allocation.space != self._space.fingerprint:
            raise ValueError(
                f"the allocation must belong to space {self._space.fingerprint}, got one of "
                f"{allocation.space}"
            )
        bits = np.array(allocation.bits, np.int64)
        wanted = [walk.cuts_of(bits) for walk in self._walks]
        episode, actions = self._start(), []
        for i, step in self._schedule:
            begin, end = self._reach(episode)
            cut = min(max(int(wanted[i][step]), begin), end)
            actions.append(self._walks[i].share(begin, cut, end))
            self._take(episode, actions[-1])
        return actions

    @override
    def _start(self) -> "_Episode":
        return _Episode(
            least=[part.least for part in self._parts],
            assigned=[part.fixed for part in self._parts],
            cuts=[[0] for _ in self._walks],
        )

    def _reach(self, episode: "_Episode") -> tuple[int, int]:
        """Return the rows that have their bits, and how many could after the next step."""
        i, step = self._schedule[episode.step]
        walk, begin = self._walks[i], episode.cuts[i][-1]
        room = self._parts[walk.part].limit - episode.least[walk.part]
        return begin, walk.reach(step, begin, room)

    @override
    def _take(self, episode: "_Episode", fraction: float) -> None:
        i, step = self._schedule[episode.step]
        walk = self._walks[i]
        begin, end = self._reach(episode)
        cut = walk.nearest(begin, end, fraction)
        more = int(walk.extra[step, cut] - walk.extra[step, begin])
        is_last = step == len(walk.widths) - 2
        received = walk.least[-1 if is_last else cut] - walk.least[begin]
        episode.least[walk.part] += more
        episode.assigned[walk.part] += more + int(received)
        episode.relief += float(walk.relief[step, cut] - walk.relief[step, begin])
        episode.cuts[i].append(cut)
        episode.step, episode.action = episode.step + 1, fraction

    @override
    def _bits(self, episode: "_Episode") -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        bits, assigned = self._narrowest.copy(), np.ones(len(self._space), np.bool_)
        for walk, cuts in zip(self._walks, episode.cuts, strict=True):
            steps, known = walk.steps_of(cuts)
            bits[walk.groups] = walk.bits[walk.rows, steps[walk.rows]]
            assigned[walk.groups] = known[walk.rows]
        return bits, assigned

    @override
    def _observe(self, episode: "_Episode") -> NDArray[np.float64]:
        seen = np.zeros(10)
        seen[0] = episode.step / self.num_steps
        for part, assigned in zip(self._parts, episode.assigned, strict=True):
            seen[5 if part.is_activations else 4] = assigned / max(part.limit, 1)
        omega = sum(part.omega for part in self._parts)
        seen[7] = (omega - episode.relief) / omega if omega > 0 else 0
        seen[9] = episode.action
        if episode.step < self.num_steps:
            i, step = self._schedule[episode.step]
            walk, begin = self._walks[i], episode.cuts[i][-1]
            part = self._parts[walk.part]
            seen[1] = part.is_activations
            seen[2] = walk.widths[step] / self._widest
            seen[3] = 1 - walk.amount[begin] / walk.amount[-1]
            seen[6] = episode.least[walk.part] / max(part.limit, 1)
            seen[8] = walk.steepness[begin] if begin < len(walk.steepness) else 0
        return seen


@dataclass(slots=True)
class _Episode:
    """Where an episode stands.

    Attributes:
        least: Cost of each part with what is open at its narrowest.
        assigned: Cost of what has its bits, of each part.
        cuts: Of each walk, how many rows have their bits after each of its steps so far, from 0.
        step: Actions so far.
        action: The last one.
        relief: How much Ω has fallen.
    """

    least: list[int]
    assigned: list[int]
    cuts: list[list[int]]
    step: int = 0
    action: float = 0.0
    relief: float = 0.0


def _check(space: Space, parts: Sequence[Ranked], unit: Unit, scope: Scope) -> None:
    for what, value, known in (("unit", unit, get_args(Unit)), ("scope", scope, get_args(Scope))):
        if value not in known:
            raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
    names = space.names
    held = [name for part in parts for name in part.space.names]
    meant = [names[i] for part in parts for i in part.groups]
    if held != meant or sorted(held) != sorted(names):
        raise ValueError(
            f"parts must hold each of the space's {len(names)} groups once, got {len(held)}"
        )
    if len({part.is_activations for part in parts}) < len(parts):
        raise ValueError("parts must be the weights, the activations, or one of each")
