"""Episodes as a search needs them: what each ended with, once, whichever agent played it.

A runner plays ``ReportingEnv``, which builds the caller's environment and speaks for it: it puts
what an episode ended with into the last info as one object, out of reach of whatever RLlib and
gymnasium make of dictionaries, and a callback hands that to the driver with the runner's metrics.
"""

import pickle
import random
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, SupportsFloat, cast

import gymnasium
import numpy as np
import torch
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

__all__ = ["ENDS", "EpisodeEnd", "EpisodeFailure", "OwnRandomness", "ReportEnds", "ReportingEnv"]

ENDS = "episode_ends"

Env = gymnasium.Env[Any, Any]
Step = tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class EpisodeEnd:
    """What an episode ended with.

    Attributes:
        runner: Who played it: 1, 2, …; 0 for the driver itself.
        episode: Which one of the runner's, from 0; a runner that was replaced begins anew.
        episode_return: Sum of its rewards.
        info: The environment's last, as it was.
    """

    runner: int
    episode: int
    episode_return: float
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class EpisodeFailure:
    """An episode that the environment's own exception ended.

    Attributes:
        runner: Who played it.
        episode: Which one of the runner's.
        message: The exception, in one line.
        trace: Where it was raised.
    """

    runner: int
    episode: int
    message: str
    trace: str


class OwnRandomness:
    """Global generators of one's own: those of Python, NumPy and torch.

    RLlib draws from the global generators and seeds them; so may an environment. Each of them
    has its own, so that neither disturbs the other, nor the program around them.

    Args:
        seed: Where they begin.
    """

    def __init__(self, seed: int) -> None:
        words = np.random.SeedSequence(seed).generate_state(3)
        self.state: tuple[Any, Any, Any] = (
            random.Random(int(words[0])).getstate(),
            np.random.RandomState(words[1]).get_state(),
            torch.Generator().manual_seed(int(words[2])).get_state(),
        )

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Draw from them."""
        outer = random.getstate(), np.random.get_state(), torch.get_rng_state()
        _set_generators(self.state)
        try:
            yield
        finally:
            self.state = random.getstate(), np.random.get_state(), torch.get_rng_state()
            _set_generators(outer)


def _set_generators(state: tuple[Any, Any, Any]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


class ReportingEnv(gymnasium.Env[Any, Any]):
    """The caller's environment, which it builds and reports on.

    Where that raises, the episode ends with an ``EpisodeFailure``: RLlib would put another runner
    in the place of this one, which would fail as well.

    RLlib resets every episode with the runner's seed. Here an episode's seed depends on the
    search's, the runner and the episode's number, so that episodes differ and can be repeated.

    Args:
        context: ``pickled_make_env``, ``spaces`` (of observations and actions), ``seed``, and
            ``first_episode``, the number to count from.
    """

    def __init__(self, context: EnvContext) -> None:
        self._pickled_make_env: bytes = context["pickled_make_env"]
        self.observation_space, self.action_space = context["spaces"]
        self._runner = int(context.worker_index or 0)
        self._seed = int(context["seed"])
        self._episode = int(context["first_episode"]) - 1
        self._env: Env | None = None
        self._return = 0.0
        self._seen: Any = np.zeros(self.observation_space.shape or (), self.observation_space.dtype)
        self._failure: EpisodeFailure | None = None

    def reset(
        self,
        *,
        seed: int | None = None,  # noqa: ARG002 (RLlib's, the same for every episode)
        options: dict[str, Any] | None = None,  # noqa: ARG002
    ) -> tuple[Any, dict[str, Any]]:
        """Begin the next episode."""
        self._episode += 1
        self._return, self._failure = 0.0, None
        self._randomness = OwnRandomness(self._episode_seed)
        observation, *_ = self._played(self._begun)
        return observation, {}

    def step(self, action: Any) -> Step:
        """Step; the last info of an episode holds its ``EpisodeEnd`` under ``ENDS``."""
        if self._failure is None:
            observation, reward, terminated, truncated, info = self._played(
                lambda env: env.step(action)
            )
        if self._failure is not None:
            return self._seen, 0.0, False, True, {ENDS: self._failure}
        self._return += float(reward)
        if not (terminated or truncated):
            return observation, reward, terminated, truncated, {}
        end = EpisodeEnd(self._runner, self._episode, self._return, info)
        return observation, reward, terminated, truncated, {ENDS: end}

    def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            self._env.close()  # type: ignore[no-untyped-call]
            self._env = None

    @property
    def _episode_seed(self) -> int:
        sequence = np.random.SeedSequence([self._seed, self._runner, self._episode])
        return int(sequence.generate_state(1)[0])

    def _begun(self, env: Env) -> Step:
        observation, info = env.reset(seed=self._episode_seed)
        return observation, 0.0, False, False, info

    def _played(self, play: Callable[[Env], Step]) -> Step:
        """Let the environment play, and remember why it could not."""
        try:
            with self._randomness():
                if self._env is None:
                    self._env = pickle.loads(self._pickled_make_env)()
                step = play(self._env)
        except Exception as error:  # whatever it is, the caller shall see it as it is
            self._env = None
            self._failure = EpisodeFailure(
                self._runner,
                self._episode,
                "".join(traceback.format_exception_only(error)).strip(),
                traceback.format_exc(),
            )
            return self._seen, 0.0, False, True, {}
        self._seen = step[0]
        return step


class ReportEnds(RLlibCallback):
    """Hands ends from the runners to the driver, each once, with the metrics of the sample."""

    def on_episode_end(
        self,
        *,
        episode: Any,
        metrics_logger: MetricsLogger | None = None,
        **_: Any,
    ) -> None:
        """Log what the episode ended with."""
        assert metrics_logger is not None
        end = cast(SingleAgentEpisode, episode).get_infos(-1)[ENDS]
        metrics_logger.log_value(ENDS, end, reduce="item_series")

    def on_env_runners_recreated(
        self,
        *,
        algorithm: Any,
        env_runner_group: EnvRunnerGroup,
        env_runner_indices: list[int],
        **_: Any,
    ) -> None:
        """Give a runner that replaces another randomness of its own, not the lost one's again."""
        words = [algorithm.config.seed, algorithm.iteration]

        def seed(runner: EnvRunner) -> None:
            sequence = np.random.SeedSequence([*words, runner.worker_index])
            torch.manual_seed(int(sequence.generate_state(1)[0]))

        env_runner_group.foreach_env_runner(
            seed, remote_worker_ids=env_runner_indices, local_env_runner=False
        )
