"""CW-HAWQ's decision process: how many channels receive each bit-width (Qian et al., 2020).

The Hessian orders the channels; only the ratios of the bit-widths are searched. What an episode
can lead to is a staircase along that order, and an episode has a step a width, not one a channel.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Any, Literal, get_args

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from numpy.typing import NDArray
from typing_extensions import override

from envs.picture import listing, picture
from hawq.allocate import InfeasibleBudgetError
from hawq.allocate.front import merge_ties
from hawq.allocation import Allocation
from hawq.space import PREFIX, Space

__all__ = ["ChannelRatios", "Ranked", "Scope", "Unit"]

Unit = Literal["channels", "weights"]
Scope = Literal["network", "layer"]
Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Ranked:
    """The weights, or the activations, with the order in which they receive their bits.

    Attributes:
        space: Their groups; tied ones are one row.
        groups: Where these are in the whole space, shape (G,).
        cost: What is limited, shape (G, B), columns ``space.widths``; it must not fall with the
            width.
        limit: The most that they may cost.
        sensitivity: Ω, shape (G, B); infinite where it is barred.
        order: Indices of ``space.rows()``, the most sensitive first, shape (R,): from
            ``hawq.ranking.ranking``.
    """

    space: Space
    groups: NDArray[np.int64]
    cost: NDArray[np.int64]
    limit: int
    sensitivity: NDArray[np.float64]
    order: NDArray[np.int64]


class ChannelRatios(gymnasium.Env[Vector, Vector]):
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

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}  # noqa: RUF012 (as Gymnasium has it)

    def __init__(
        self,
        *,
        space: Space,
        parts: Sequence[Ranked],
        evaluate: Callable[[Allocation], tuple[float, Mapping[str, Any]]],
        unit: Unit = "channels",
        scope: Scope = "network",
        render_mode: str | None = None,
    ) -> None:
        _check(space, parts, unit, scope)
        self.render_mode = render_mode
        self.action_space = Box(0, 1, (1,), np.float32)
        self.observation_space = Box(0, 1, (10,), np.float32)
        self._space = space
        self._evaluate = evaluate
        laid = [_Rows.of(part, unit) for part in parts]
        self._parts = [_total(part, rows) for part, rows in zip(parts, laid, strict=True)]
        self._walks = [
            walk
            for i, (part, rows) in enumerate(zip(parts, laid, strict=True))
            for walk in _walks(part, rows, i, scope)
        ]
        self._schedule = [
            (i, step) for i, walk in enumerate(self._walks) for step in range(len(walk.widths) - 1)
        ]
        if not self._schedule:
            raise ValueError("menu must hold two widths at least in some group, got one in each")
        self._narrowest = np.empty(len(space), np.int64)
        for rows in laid:
            for groups, bits in zip(rows.members, rows.bits[:, 0], strict=True):
                self._narrowest[groups] = bits
        self._widest = max(int(walk.widths[0]) for walk in self._walks)
        # ``Allocation.of`` would make them anew: half a second for 26,000 channels.
        self._names, self._fingerprint = space.names, space.fingerprint
        self._episode = self._start()

    @property
    def num_steps(self) -> int:
        """Actions in an episode."""
        return len(self._schedule)

    def allocation_of(self, actions: Sequence[float]) -> Allocation:
        """Return what a whole episode's actions lead to, without evaluating it.

        Args:
            actions: ``num_steps`` numbers; those outside 0..1 count as its nearer end.

        Raises:
            ValueError: If there are more or fewer, or one is no number.
        """
        if len(actions) != self.num_steps:
            raise ValueError(f"actions must be {self.num_steps}, got {len(actions)}")
        episode = self._start()
        for action in actions:
            self._take(episode, _fraction(action))
        return self._allocation(episode)

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
        if allocation.space != self._fingerprint:
            raise ValueError(
                f"the allocation must belong to space {self._fingerprint}, got one of "
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
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Vector, dict[str, Any]]:
        super().reset(seed=seed)
        self._episode = self._start()
        return self._observe(), {}

    @override
    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        if self._episode.step == self.num_steps:
            raise ResetNeeded("reset must be called before the first step of another episode")
        self._take(self._episode, _fraction(action[0]))
        if self._episode.step < self.num_steps:
            return self._observe(), 0.0, False, False, {}
        allocation = self._allocation(self._episode)
        reward, told = self._evaluate(allocation)
        info = {**told, "allocation": allocation}
        return self._observe(), float(reward), True, False, info

    @override
    def render(self) -> NDArray[np.uint8] | str | None:  # type: ignore[override]
        if self.render_mode is None:
            return None
        bits, assigned = self._bits(self._episode)
        pairs = zip(bits.tolist(), assigned.tolist(), strict=True)
        shown = [b if known else None for b, known in pairs]
        draw = picture if self.render_mode == "rgb_array" else listing
        return draw(self._space, shown)

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

    def _bits(self, episode: "_Episode") -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return every group's bits, which mean something where they are assigned, and where."""
        bits, assigned = self._narrowest.copy(), np.ones(len(self._space), np.bool_)
        for walk, cuts in zip(self._walks, episode.cuts, strict=True):
            steps, known = walk.steps_of(cuts)
            bits[walk.groups] = walk.bits[walk.rows, steps[walk.rows]]
            assigned[walk.groups] = known[walk.rows]
        return bits, assigned

    def _allocation(self, episode: "_Episode") -> Allocation:
        bits, _ = self._bits(episode)
        return Allocation(self._names, tuple(bits.tolist()), self._fingerprint)

    def _observe(self) -> Vector:
        episode = self._episode
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
        # Ω of noisy traces may rise with the width, or be negative.
        return seen.clip(0, 1).astype(np.float32)


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


@dataclass(frozen=True, slots=True, eq=False)
class _Walk:
    """Some rows of a part in order, with the sums of the first k of them.

    Attributes:
        part: Index of the part.
        widths: To walk, decreasing, shape (W,).
        bits: What a row receives at each width, shape (N, W).
        extra: What the first k rows cost more at a width than at their narrowest, shape (W, N + 1).
        relief: How much Ω falls by that, shape (W, N + 1).
        least: Cost of the first k rows at their narrowest, shape (N + 1,).
        amount: The first k rows in units, shape (N + 1,).
        steepness: See entry 8 of the observation, shape (N,).
        groups: Groups of the space that are in these rows, shape (M,).
        rows: Which of the rows each of them is in, shape (M,).
    """

    part: int
    widths: NDArray[np.int64]
    bits: NDArray[np.int64]
    extra: NDArray[np.int64]
    relief: NDArray[np.float64]
    least: NDArray[np.int64]
    amount: NDArray[np.int64]
    steepness: NDArray[np.float64]
    groups: NDArray[np.int64]
    rows: NDArray[np.int64]

    def reach(self, step: int, begin: int, room: int) -> int:
        """Return the furthest cut that costs at most ``room`` more than the narrowest."""
        most = int(self.extra[step, begin]) + room
        return int(np.searchsorted(self.extra[step], most, side="right")) - 1

    def nearest(self, begin: int, end: int, fraction: float) -> int:
        """Return the cut nearest to a fraction of the way."""
        span = int(self.amount[end] - self.amount[begin])
        return min(max(self._cut(int(self.amount[begin]) + fraction * span), begin), end)

    def share(self, begin: int, cut: int, end: int) -> float:
        """Return what fraction of the way a cut is; 0 where there is no way."""
        span = int(self.amount[end] - self.amount[begin])
        return int(self.amount[cut] - self.amount[begin]) / span if span else 0.0

    def steps_of(self, cuts: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return at which step each row receives its bits, and which have them."""
        every = np.arange(len(self.bits))
        steps = np.searchsorted(np.array(cuts[1:], np.int64), every, side="right")
        return steps, (every < cuts[-1]) | (len(cuts) == len(self.widths))

    def cuts_of(self, bits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the cuts, shape (W − 1,), that give these bits, or as much of each width."""
        mine = np.empty(len(self.bits), np.int64)
        mine[self.rows] = bits[self.groups]
        fits = self.bits == mine[:, None]
        last = fits.shape[1] - 1
        steps = np.maximum.accumulate(fits.argmax(1))
        widths = np.arange(last)
        if fits[np.arange(len(mine)), steps].all():
            return np.searchsorted(steps, widths, side="right")
        wider = mine[:, None] >= self.widths[:-1]
        amounts = np.diff(self.amount) @ wider
        return np.array([self._cut(amount) for amount in amounts], np.int64)

    def _cut(self, amount: float) -> int:
        middles = (self.amount[1:] + self.amount[:-1]) / 2
        return int(np.searchsorted(middles, amount, side="right"))


@dataclass(frozen=True, slots=True)
class _Part:
    """The totals of a part.

    Attributes:
        is_activations: Whether it is the activations.
        limit: The most that it may cost.
        least: Its cost with everything at its narrowest.
        fixed: Cost of its rows of one width.
        omega: Ω with everything at its narrowest.
    """

    is_activations: bool
    limit: int
    least: int
    fixed: int
    omega: float


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """What each row of a part receives and costs at each of its widths, in the space's order.

    Attributes:
        widths: Of the part's tables, shape (B,).
        bits: The widest width on its menu that is no wider, else its narrowest, shape (R, B).
        cost: At those bits, same shape.
        omega: Ω at those bits, same shape.
        amount: In units, shape (R,).
        members: Groups of the whole space in each row.
        owners: Layer, or tensor, of each row's first group.
    """

    widths: NDArray[np.int64]
    bits: NDArray[np.int64]
    cost: NDArray[np.int64]
    omega: NDArray[np.float64]
    amount: NDArray[np.int64]
    members: Sequence[NDArray[np.int64]]
    owners: Sequence[str]

    @staticmethod
    def of(ranked: Ranked, unit: Unit) -> "_Rows":
        space = ranked.space
        rows = merge_ties(space, ranked.sensitivity, ranked.cost)
        allowed = np.isfinite(rows.sensitivity)
        wider = np.maximum.accumulate(np.where(allowed, np.arange(allowed.shape[1]), -1), 1)
        columns = np.where(wider < 0, allowed.argmax(1)[:, None], wider)
        cost = np.take_along_axis(rows.cost, columns, 1)
        falls = (np.diff(cost, axis=1) < 0).any(1)
        if falls.any():
            name = space.groups[rows.members[int(falls.argmax())][0]].name
            raise ValueError(f"{name}: cost must not fall with the width, got one that does")
        sizes = np.array([group.num_elements for group in space.groups], np.int64)
        elements = [int(sizes[list(members)].sum()) for members in rows.members]
        widths = np.array(space.widths, np.int64)
        return _Rows(
            widths=widths,
            bits=widths[columns],
            cost=cost,
            omega=np.take_along_axis(rows.sensitivity, columns, 1),
            amount=np.array(elements if unit == "weights" else [1] * len(elements), np.int64),
            members=[ranked.groups[list(members)] for members in rows.members],
            owners=[space.groups[members[0]].owner for members in rows.members],
        )

    @property
    def is_free(self) -> NDArray[np.bool_]:
        """Which rows have a choice, shape (R,)."""
        return self.bits[:, 0] < self.bits[:, -1]

    def steepness(self) -> NDArray[np.float64]:
        """Return entry 8 of the observation for each row, shape (R,)."""
        fall = self.omega[:, 0] - self.omega[:, -1]
        spent = np.maximum(self.cost[:, -1] - self.cost[:, 0], 1)
        counts = self.is_free & (fall > 0)
        scale = np.zeros(len(fall))
        if counts.any():
            logs = np.log(fall[counts] / spent[counts])
            span = np.ptp(logs)
            scale[counts] = (logs - logs.min()) / span if span > 0 else 1
        return scale

    def walk(self, part: int, order: NDArray[np.int64]) -> _Walk:
        """Lay out a walk of some rows in an order."""
        bits, cost, omega = self.bits[order], self.cost[order], self.omega[order]
        # Where no row receives more than at the next narrower width, there is nothing to choose.
        columns = np.append(np.flatnonzero((np.diff(bits, axis=1) > 0).any(0))[::-1] + 1, 0)
        members = [self.members[row] for row in order]
        return _Walk(
            part=part,
            widths=self.widths[columns],
            bits=bits[:, columns],
            extra=_sums((cost - cost[:, :1])[:, columns].T),
            relief=_sums((omega[:, :1] - omega)[:, columns].T),
            least=_sums(cost[:, 0]),
            amount=_sums(self.amount[order]),
            steepness=self.steepness()[order],
            groups=np.concatenate(members),
            rows=np.repeat(np.arange(len(order)), [len(groups) for groups in members]),
        )


def _sums(table: NDArray[Any]) -> NDArray[Any]:
    """Return the sums of the first k along the last axis, k from 0."""
    return np.concatenate([np.zeros_like(table[..., :1]), np.cumsum(table, -1)], -1)


def _walks(ranked: Ranked, rows: _Rows, part: int, scope: Scope) -> list[_Walk]:
    """Lay out the walks of a part: none where nothing can be chosen."""
    if sorted(ranked.order.tolist()) != list(range(len(rows.members))):
        raise ValueError(f"order must hold each of {len(rows.members)} rows once")
    order = ranked.order[rows.is_free[ranked.order]]
    if not len(order):
        return []
    whole = rows.walk(part, order)
    if len(order) < len(whole.widths):
        raise ValueError(
            f"channels must be at least as many as widths, got {len(order)} channels and "
            f"{len(whole.widths)} widths"
        )
    if scope == "network":
        return [whole]
    owners = np.array(rows.owners)
    layers = dict.fromkeys(owners[np.sort(order)].tolist())
    return [rows.walk(part, order[owners[order] == layer]) for layer in layers]


def _total(ranked: Ranked, rows: _Rows) -> _Part:
    cost = rows.cost[:, 0]
    if cost.sum() > ranked.limit:
        raise InfeasibleBudgetError(ranked.limit, int(cost.sum()))
    return _Part(
        is_activations=_is_activations(ranked),
        limit=ranked.limit,
        least=int(cost.sum()),
        fixed=int(cost[~rows.is_free].sum()),
        omega=float(rows.omega[:, 0].sum()),
    )


def _is_activations(ranked: Ranked) -> bool:
    return ranked.space.groups[0].name.startswith(PREFIX["activations"])


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
    if len({_is_activations(part) for part in parts}) < len(parts):
        raise ValueError("parts must be the weights, the activations, or one of each")


def _fraction(action: float) -> float:
    fraction = float(action)
    if isnan(fraction):
        raise ValueError("action must be a number in 0..1, got nan")
    # What an agent computed to be the end of the box may be a rounding error outside it.
    return min(max(fraction, 0.0), 1.0)
