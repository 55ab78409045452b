"""The driver of RLlib's agents: an agent in, what its episodes ended with out.

The agents own their loops; a search only listens. What it hears is the same for every agent: the
ends of episodes, in an order that does not depend on which runner was faster.
"""

import logging
import pickle
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import gymnasium
import numpy as np
import ray
from ray import cloudpickle
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.sac import SACConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from search.agents.ddpg import DDPGConfig, DDPGOptions
from search.agents.episodes import (
    ENDS,
    EpisodeEnd,
    EpisodeFailure,
    OwnRandomness,
    ReportEnds,
    ReportingEnv,
)
from search.folder import write_atomically

__all__ = ["AgentName", "EnvironmentFailedError", "run_agent"]

AgentName = Literal["ddpg", "sac", "ppo"]

_CHECKPOINT_SECONDS = 5.0
# A runner dies of the machine, or because its environment takes the process with it.
_MAX_RESTARTS = 5
_MAX_SILENT_ITERATIONS = 10


class EnvironmentFailedError(RuntimeError):
    """The environment raised; ``failure`` says what and where."""

    def __init__(self, failure: EpisodeFailure) -> None:
        super().__init__(
            f"{failure.message} (episode {failure.episode} of runner {failure.runner})"
        )
        self.failure = failure
        self.add_note(failure.trace)


def run_agent(
    name: AgentName,
    make_env: Callable[[], gymnasium.Env[Any, Any]],
    *,
    episodes: int,
    seed: int,
    num_runners: int = 0,
    cpus_per_runner: float = 1.0,
    gpus_per_runner: float = 0.0,
    checkpoint: Path | None = None,
    fingerprint: str = "",
    options: DDPGOptions | None = None,
) -> Generator[list[EpisodeEnd], None, None]:
    """Let an agent play, and yield what its episodes ended with.

    Ray must be up. Closing the generator stops the agent and everything that it started. What was
    yielded is in the checkpoint only afterwards, so after a crash the last episodes may be yielded
    again, never lost. Without runners an agent that was stopped and resumed yields what it would
    have yielded undisturbed; with runners their random streams begin anew.

    Args:
        name: ``ddpg``: ours. ``sac``, ``ppo``: RLlib's.
        make_env: Builds the environment, here and on every runner. Its observations are a Box of
            one dimension, its actions a bounded Box.
        episodes: How many to play at least, those before a resumption included.
        seed: Of everything random.
        num_runners: Processes that play side by side, one environment each; 0 plays here.
        cpus_per_runner: What Ray reserves for each.
        gpus_per_runner: What Ray reserves for each.
        checkpoint: File to go on from, where it exists, and to keep the agent's state in.
        fingerprint: Of whatever the environment depends on beyond its spaces.
        options: DDPG's numbers.

    Yields:
        The episodes that ended in an iteration: by runner, then as they were played.

    Raises:
        ValueError: If the checkpoint is another agent's or environment's, or Ray is not up.
        EnvironmentFailedError: If the environment raises.
        RuntimeError: If the runners die again and again.
    """
    if not ray.is_initialized():
        raise ValueError("ray must be up before an agent runs: see search.cluster.connected")
    spaces = _spaces(make_env)
    if name == "ddpg":
        options = options or DDPGOptions()
    identity = f"agent {name}, seed {seed}, {options}, {fingerprint or 'no fingerprint'}, " + (
        f"observations {spaces[0]}, actions {spaces[1]}"
    )
    saved = _read(checkpoint, identity)
    done = 0 if saved is None else int(saved["episodes"])
    randomness = OwnRandomness(seed)
    # Runners seed themselves with this: resumed ones must not draw again what they drew before.
    runner_seed = int(np.random.SeedSequence([seed, done]).generate_state(1)[0] >> 2)
    context = {
        "pickled_make_env": cloudpickle.dumps(make_env),
        "spaces": spaces,
        "seed": seed,
        "first_episode": done,
    }
    config = (
        _CONFIGS[name](options)
        .environment(ReportingEnv, env_config=context)
        .env_runners(
            num_env_runners=num_runners,
            num_cpus_per_env_runner=cast(int, cpus_per_runner),  # a share will do
            num_gpus_per_env_runner=gpus_per_runner,
            batch_mode="complete_episodes",
            sample_timeout_s=None,  # a reward may take as long as it takes
        )
        .fault_tolerance(
            restart_failed_env_runners=True,
            max_num_env_runner_restarts=_MAX_RESTARTS,
            delay_between_env_runner_restarts_s=0.0,
        )
        .callbacks(ReportEnds)
        .reporting(min_time_s_per_iteration=0, min_sample_timesteps_per_iteration=0)
        .debugging(seed=runner_seed, log_level="CRITICAL")
    )
    with _quiet():
        with randomness(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*Overriding environment")  # RLlib's, by RLlib
            algorithm = config.build_algo()
        try:
            if saved is not None:
                with randomness():
                    _restore(algorithm, saved["state"])
                randomness.state = saved["randomness"]
            yield from _played(algorithm, randomness, episodes, done, checkpoint, identity)
        finally:
            algorithm.stop()


def _played(
    algorithm: Algorithm,
    randomness: OwnRandomness,
    episodes: int,
    done: int,
    checkpoint: Path | None,
    identity: str,
) -> Generator[list[EpisodeEnd], None, None]:
    """Train, yield, keep."""
    written, silent = time.monotonic(), 0

    def keep() -> None:
        if checkpoint is not None:
            state = {"episodes": done, "state": _state(algorithm), "randomness": randomness.state}
            write_atomically(checkpoint, pickle.dumps({"identity": identity, **state}))

    try:
        while done < episodes:
            with randomness():
                result = algorithm.train()
            ends = _ends(result)
            silent = 0 if ends else silent + 1
            if silent == _MAX_SILENT_ITERATIONS:
                raise RuntimeError(
                    f"runners must finish episodes, got none in {silent} iterations: their "
                    "processes end before, such as for want of memory"
                )
            if not ends:
                continue
            done += len(ends)
            yield ends
            if time.monotonic() - written >= _CHECKPOINT_SECONDS:
                keep()
                written = time.monotonic()
    except GeneratorExit:
        keep()
        raise
    keep()


def _ends(result: dict[str, Any]) -> list[EpisodeEnd]:
    found = result["env_runners"].get(ENDS, [])
    found = found if isinstance(found, list) else [found]  # RLlib gives one alone as itself
    for end in found:
        if isinstance(end, EpisodeFailure):
            raise EnvironmentFailedError(end)
    return sorted(found, key=lambda end: (end.runner, end.episode))


def _spaces(
    make_env: Callable[[], gymnasium.Env[Any, Any]],
) -> tuple[gymnasium.Space[Any], gymnasium.Space[Any]]:
    env = make_env()
    try:
        return env.observation_space, env.action_space
    finally:
        env.close()  # type: ignore[no-untyped-call]


def _state(algorithm: Algorithm) -> dict[str, Any]:
    """Return everything; RLlib leaves its own replay buffers out."""
    state: dict[str, Any] = algorithm.get_state()
    buffer = algorithm.local_replay_buffer
    if buffer is not None:
        state["stock_buffer"] = (buffer.get_state(), buffer.rng.bit_generator.state)
    return state


def _restore(algorithm: Algorithm, state: dict[str, Any]) -> None:
    algorithm.set_state(state)
    buffer = algorithm.local_replay_buffer
    if buffer is not None:
        buffer.set_state(state["stock_buffer"][0])
        buffer.rng.bit_generator.state = state["stock_buffer"][1]


def _read(checkpoint: Path | None, identity: str) -> dict[str, Any] | None:
    if checkpoint is None or not checkpoint.exists():
        return None
    saved: dict[str, Any] = pickle.loads(checkpoint.read_bytes())
    if saved["identity"] != identity:
        raise ValueError(
            f"checkpoint {checkpoint} must be of {identity}, got one of {saved['identity']}"
        )
    return saved


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep RLlib from printing pages: what matters reaches the caller as a value or an error."""
    loggers = [
        logging.getLogger(name) for name in ("ray.rllib", "ray.tune", "ray._common.deprecation")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _ddpg(options: DDPGOptions | None) -> AlgorithmConfig:
    return DDPGConfig(options)


def _sac(_: DDPGOptions | None) -> AlgorithmConfig:
    """SAC (Haarnoja et al., 2018), for episodes of about ten steps whose last has the reward."""
    config = SACConfig()
    size = 64  # as DDPG's
    config.training(
        gamma=1.0,  # the one reward is as good from the first step as from the last
        tau=0.01,  # as DDPG's
        actor_lr=3e-4,  # the paper's rates; RLlib's actor is ten times slower
        critic_lr=3e-4,
        alpha_lr=3e-4,
        initial_alpha=0.1,  # rewards are tenths: at 1 the entropy would be all that counts
        train_batch_size_per_learner=size,
        training_intensity=8 * size,  # 8 updates an episode of every runner, and 8 more
        replay_buffer_config={"type": "EpisodeReplayBuffer", "capacity": 2000},
        num_steps_sampled_before_learning_starts=200,  # about DDPG's 20 episodes
        n_step=1,
    )
    config.rl_module(
        model_config=DefaultModelConfig(
            fcnet_hiddens=[64, 64], fcnet_activation="relu", head_fcnet_hiddens=[]
        )
    )
    return config


def _ppo(_: DDPGOptions | None) -> AlgorithmConfig:
    """PPO (Schulman et al., 2017), for the same."""
    config = PPOConfig()
    config.training(
        gamma=1.0,  # as SAC's
        lambda_=1.0,  # returns as they were: over so few steps their variance is small
        lr=1e-3,  # few updates of small networks
        train_batch_size_per_learner=64,  # at least; some five to ten episodes an update
        minibatch_size=64,
        num_epochs=10,
        clip_param=0.2,
        use_kl_loss=False,  # clipping alone, as in the paper's best
        vf_clip_param=float("inf"),  # else a value off by more than 3 never learns
        entropy_coeff=0.0,
        grad_clip=0.5,
    )
    config.rl_module(
        model_config=DefaultModelConfig(
            fcnet_hiddens=[64, 64], fcnet_activation="tanh", vf_share_layers=False
        )
    )
    return config


_CONFIGS: dict[AgentName, Callable[[DDPGOptions | None], AlgorithmConfig]] = {
    "ddpg": _ddpg,
    "sac": _sac,
    "ppo": _ppo,
}
