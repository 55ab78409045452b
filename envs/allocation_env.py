"""What the decision processes share: an episode makes an allocation, and its end is evaluated."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any, Generic, Protocol, TypeVar

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Box
from numpy.typing import NDArray
from typing_extensions import override

from envs.picture import listing, picture
from hawq.allocation import Allocation
from hawq.space import Space

__all__ = ["AllocationEnv", "Evaluate", "Vector"]

Vector = NDArray[np.float32]
Evaluate = Callable[[Allocation], tuple[float, Mapping[str, Any]]]


class Episode(Protocol):
    """Where an episode stands.

    Attributes:
        step: Actions so far.
    """

    step: int


E = TypeVar("E", bound=Episode)


class AllocationEnv(gymnasium.Env[Vector, Vector], ABC, Generic[E]):
    """Make an allocation, an action a step; what it is worth is told at the end.

    A process says where an episode starts, what an action does to it, which bits that has come to,
    and what of it is observed. It must be whole before this is initialized.

    Args:
        space: The whole space.
        evaluate: Reward of a finished allocation, higher is better, with what ``info`` says of it.
        num_steps: Actions in an episode.
        num_observed: Entries of an observation.
        render_mode: ``rgb_array``, ``ansi``, or None.

    Raises:
        ValueError: If there is nothing to choose.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array", "ansi"], "render_fps": 4}  # noqa: RUF012 (as Gymnasium has it)

    def __init__(
        self,
        space: Space,
        evaluate: Evaluate,
        *,
        num_steps: int,
        num_observed: int,
        render_mode: str | None,
    ) -> None:
        if not num_steps:
            raise ValueError("menu must hold two widths at least in some group, got one in each")
        self.num_steps = num_steps
        self.render_mode = render_mode
        self.action_space = Box(0, 1, (1,), np.float32)
        self.observation_space = Box(0, 1, (num_observed,), np.float32)
        self._space = space
        self._evaluate = evaluate
        self._episode = self._start()

    @abstractmethod
    def actions_of(self, allocation: Allocation) -> list[float]:
        """Return ``num_steps`` actions that lead to an allocation, or near it.

        Raises:
            ValueError: If the allocation belongs to another space.
        """

    @abstractmethod
    def _start(self) -> E:
        """Return where an episode starts."""

    @abstractmethod
    def _take(self, episode: E, fraction: float) -> None:
        """Move an episode on by an action in 0..1."""

    @abstractmethod
    def _bits(self, episode: E) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return every group's bits, which mean something where they are assigned, and where."""

    @abstractmethod
    def _observe(self, episode: E) -> NDArray[np.float64]:
        """Return what is seen of an episode; clipped to 0..1, which noisy traces may leave."""

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

    @override
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Vector, dict[str, Any]]:
        super().reset(seed=seed)
        self._episode = self._start()
        return self._observation(), {}

    @override
    def step(self, action: Vector) -> tuple[Vector, float, bool, bool, dict[str, Any]]:
        if self._episode.step == self.num_steps:
            raise ResetNeeded("reset must be called before the first step of another episode")
        self._take(self._episode, _fraction(action[0]))
        if self._episode.step < self.num_steps:
            return self._observation(), 0.0, False, False, {}
        allocation = self._allocation(self._episode)
        reward, told = self._evaluate(allocation)
        info = {**told, "allocation": allocation}
        return self._observation(), float(reward), True, False, info

    @override
    def render(self) -> NDArray[np.uint8] | str | None:  # type: ignore[override]
        if self.render_mode is None:
            return None
        bits, assigned = self._bits(self._episode)
        pairs = zip(bits.tolist(), assigned.tolist(), strict=True)
        shown = [b if known else None for b, known in pairs]
        draw = picture if self.render_mode == "rgb_array" else listing
        return draw(self._space, shown)

    def _allocation(self, episode: E) -> Allocation:
        bits, _ = self._bits(episode)
        return Allocation(self._space.names, tuple(bits.tolist()), self._space.fingerprint)

    def _observation(self) -> Vector:
        return self._observe(self._episode).clip(0, 1).astype(np.float32)


def _fraction(action: float) -> float:
    """Return an action within 0..1.

    Raises:
        ValueError: If it is no number.
    """
    value = float(action)
    if isnan(value):
        raise ValueError("action must be a number in 0..1, got nan")
    # What an agent computed to be the end of the box may be a rounding error outside it.
    return min(max(value, 0.0), 1.0)
