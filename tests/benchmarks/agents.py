"""Our DDPG against stable-baselines3's on Pendulum-v1, and two runners against one.

Both learn with the same numbers on one thread: 50 steps, then 50 updates, in turn. Returns are
those of ten episodes without noise from the same starts, averaged over seeds, ± half the width of
a 95 % interval (Student's t). CPU-seconds are of the process that learns; the peer takes turns
with ours, so that what else the machine does falls on both.

The runners play an environment whose reward takes a second.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from search.agents.ddpg import DDPGConfig, DDPGOptions
from search.agents.rllib import run_agent
from search.cluster import connected
from tests.benchmarks.record import Row, record

_TURN, _EPISODE = 50, 200
_OPTIONS = DDPGOptions(
    hidden=(64, 64),
    actor_lr=1e-3,
    critic_lr=1e-3,
    gamma=0.98,
    tau=0.005,
    batch_size=128,
    capacity=20_000,
    warmup_episodes=1,
    noise="normal",
    noise_std=0.05,
    noise_decay=1.0,
    baseline_rate=None,
    spread="none",
)

Act = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class Slow(gymnasium.Env):
    """Three steps; the reward takes a second."""

    observation_space = gymnasium.spaces.Box(0, 1, (1,))
    action_space = gymnasium.spaces.Box(0, 1, (1,))

    def reset(self, *, seed=None, options=None):
        """Begin."""
        super().reset(seed=seed)
        self._left = 3
        return np.zeros(1, np.float32), {}

    def step(self, action):
        """Go on, or take a second to end."""
        self._left -= 1
        if not self._left:
            time.sleep(1)
        return np.zeros(1, np.float32), 0.0, not self._left, False, {}


def main() -> None:
    """Measure learning, then sampling."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.agents")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with connected(None, dashboard=False):
        learned = {"ours": ours, "stable-baselines3": peer}
        returns: dict[str, list[float]] = {name: [] for name in learned}
        rates: dict[str, list[float]] = {name: [] for name in learned}
        for seed in range(given.seeds):
            for name, learn in learned.items():
                started = time.process_time()
                turns = learn(given.steps, seed)
                started += next(turns)  # what it took to build
                act = list(turns)[-1]
                rates[name].append(given.steps / (time.process_time() - started))
                returns[name].append(played(act))
        rows = []
        for name in learned:
            rows.append(Row(f"DDPG on Pendulum, {name}", "", *_interval(returns[name])))
            rows.append(
                Row(f"DDPG, {name}", "", statistics.median(rates[name]), "steps a CPU-second")
            )
        ratios = [a / b for a, b in zip(rates["ours"], rates["stable-baselines3"], strict=True)]
        rows.append(
            Row("DDPG's steps a CPU-second, ours", "stable-baselines3", min(ratios), "×, least")
        )
        rows.append(
            Row("the same", "stable-baselines3", statistics.median(ratios), "×, median of seeds")
        )
        one, two = (episodes_a_second(runners, given.episodes) for runners in (1, 2))
    rows.append(Row("episodes with a reward of 1 s, 1 runner", "", one, "episodes a second"))
    rows.append(Row("episodes with a reward of 1 s, 2 runners", "1 runner", two / one, "×"))
    record("agents", rows)


def ours(steps: int, seed: int) -> Iterator[float | Act]:
    """Learn; yield the CPU-seconds of building, then how to act after every turn."""
    started = time.process_time()
    config = DDPGConfig(_OPTIONS).environment("Pendulum-v1")
    config.env_runners(num_env_runners=0, rollout_fragment_length=_TURN)
    config.reporting(min_time_s_per_iteration=0).debugging(seed=seed, log_level="CRITICAL")
    algorithm = config.build_algo()

    def act(seen: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.no_grad():
            action: NDArray[np.float32] = algorithm.get_module().actor(torch.from_numpy(seen))
        return 2 * np.asarray(action)

    yield time.process_time() - started
    for _ in range(steps // _TURN):
        algorithm.train()
    yield act
    algorithm.stop()


def peer(steps: int, seed: int) -> Iterator[float | Act]:
    """Do the same with stable-baselines3."""
    from stable_baselines3 import DDPG  # noqa: PLC0415 (ours needs it nowhere)
    from stable_baselines3.common.noise import NormalActionNoise  # noqa: PLC0415

    started = time.process_time()
    agent = DDPG(
        "MlpPolicy",
        "Pendulum-v1",
        learning_rate=_OPTIONS.actor_lr,
        buffer_size=_OPTIONS.capacity,
        learning_starts=_EPISODE * _OPTIONS.warmup_episodes,
        batch_size=_OPTIONS.batch_size,
        tau=_OPTIONS.tau,
        gamma=_OPTIONS.gamma,
        train_freq=(_TURN, "step"),
        gradient_steps=_TURN,
        action_noise=NormalActionNoise(np.zeros(1), np.full(1, 2 * _OPTIONS.noise_std)),
        policy_kwargs={"net_arch": list(_OPTIONS.hidden)},
        seed=seed,
        device="cpu",
    )
    yield time.process_time() - started
    agent.learn(steps)
    yield lambda seen: agent.predict(seen, deterministic=True)[0]


def played(act: Act) -> float:
    """Return the mean return of ten episodes without noise."""
    env = gymnasium.make("Pendulum-v1")
    returns = []
    for seed in range(10):
        seen, _ = env.reset(seed=1000 + seed)
        total, truncated = 0.0, False
        while not truncated:
            seen, reward, _, truncated, _ = env.step(act(seen))
            total += float(reward)
        returns.append(total)
    return statistics.mean(returns)


def episodes_a_second(runners: int, episodes: int) -> float:
    """Return the rate after the first episodes, when all runners are up."""
    ends = run_agent(
        "ddpg", Slow, episodes=episodes, seed=0, num_runners=runners, cpus_per_runner=0.5
    )
    next(ends)
    started = time.monotonic()
    num = sum(len(ended) for ended in ends)
    return num / (time.monotonic() - started)


def _interval(values: list[float]) -> tuple[float, str]:
    error = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1) if len(values) > 1 else 0.0
    return statistics.mean(values), f"± {error:.0f}, mean return of {len(values)} seeds"


if __name__ == "__main__":
    main()
