"""RLlib's agents on environments whose best answer is known, and the driver that runs them."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import ray

from search.agents.ddpg import DDPGOptions
from search.agents.episodes import EpisodeEnd
from search.agents.rllib import EnvironmentFailedError, run_agent

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

# Workers cannot import the tests.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SMALL = DDPGOptions(hidden=(32, 32), warmup_episodes=4, batch_size=16)


class Answers(gymnasium.Env):
    """Three steps with an answer each in [0, 1]; the reward comes at the end and is at best 0.

    Observation: which step it is, one-hot, shape (4,). Action: shape (1,). The last info holds
    all answers.
    """

    observation_space = gymnasium.spaces.Box(0, 1, (4,))
    action_space = gymnasium.spaces.Box(0, 1, (1,))
    wanted = np.array([0.1, 0.5, 0.8])

    def __init__(self, fails: bool = False, log: Path | None = None):
        self._fails, self._log = fails, log

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._answers = []
        return self._seen(), {}

    def step(self, action):
        self._answers.append(float(action[0]))
        done = len(self._answers) == 3
        if not done:
            return self._seen(), 0.0, False, False, {"nothing": "of interest"}
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{os.getpid()}\n")
        if self._fails:
            self._fail()
        reward = -float(np.square(self._answers - self.wanted).sum())
        info = {"answers": tuple(self._answers), "pid": os.getpid(), "nested": {"one": 1}}
        return self._seen(), reward, True, False, info

    def _fail(self):
        raise OSError("no space left on this planet")

    def _seen(self):
        return np.eye(4, dtype=np.float32)[len(self._answers)]


def answers(ends: list[EpisodeEnd]) -> list[tuple[float, ...]]:
    return [end.info["answers"] for end in ends]


def flat(iterations: Iterator[list[EpisodeEnd]]) -> list[EpisodeEnd]:
    return [end for ends in iterations for end in ends]


@pytest.mark.parametrize("name", ["ddpg", "sac", "ppo"])
def test_every_agent_reports_each_episode_once(name):
    ends = flat(run_agent(name, Answers, episodes=30, seed=0, options=SMALL))
    assert len(ends) >= 30
    assert [end.episode for end in ends] == list(range(len(ends)))
    assert len(set(answers(ends))) == len(ends)
    for end in ends:
        assert end.episode_return == pytest.approx(
            -np.square(np.array(end.info["answers"]) - Answers.wanted).sum(), abs=1e-6
        )
        assert end.info["nested"] == {"one": 1}


def test_two_runners_lose_and_double_nothing_and_end_when_closed(tmp_path):
    log = tmp_path / "played"
    make_env = partial(Answers, log=log)
    playing = run_agent(
        "ddpg", make_env, episodes=99, seed=0, num_runners=2, cpus_per_runner=0.5, options=SMALL
    )
    iterations = [next(playing) for _ in range(12)]
    playing.close()
    ends = [end for iteration in iterations for end in iteration]
    assert [[end.runner for end in iteration] for iteration in iterations] == [[1, 2]] * 12
    assert [end.episode for end in ends if end.runner == 2] == list(range(12))
    assert len(set(answers(ends))) == len(ends)
    played = log.read_text().split()
    assert sorted(played) == sorted(str(end.info["pid"]) for end in ends)
    assert len(set(played)) == 2
    assert str(os.getpid()) not in played
    assert all(gone(int(pid)) for pid in set(played))


def test_ddpg_finds_the_answers():
    options = DDPGOptions(
        hidden=(64, 64), actor_lr=1e-3, noise_decay=0.97, updates_per_step=4, spread="share"
    )
    ends = flat(run_agent("ddpg", Answers, episodes=150, seed=0, options=options))
    warmup = max(end.episode_return for end in ends[:20])
    assert max(end.episode_return for end in ends) > -0.005 > warmup


@pytest.mark.parametrize("name", ["ddpg", "sac", "ppo"])
def test_a_stopped_agent_goes_on_as_if_it_had_not_been_stopped(name, tmp_path):
    run = partial(run_agent, name, Answers, seed=0, options=SMALL)
    whole = flat(run(episodes=60))
    stopped = run(episodes=60, checkpoint=tmp_path / "agent")
    first: list[EpisodeEnd] = []
    for ends in stopped:
        np.random.random()  # the program's own randomness is none of the agent's business
        first += ends
        if len(first) >= 30:
            break
    stopped.close()
    second = flat(run(episodes=60, checkpoint=tmp_path / "agent"))
    assert first + second == whole
    assert not flat(run(episodes=60, checkpoint=tmp_path / "agent"))


@pytest.mark.parametrize(
    "name",
    [
        "ddpg",
        pytest.param("sac", marks=pytest.mark.slow),
        pytest.param("ppo", marks=pytest.mark.slow),
    ],
)
def test_a_killed_runner_is_replaced(name):
    iterations = run_agent(
        name, Answers, episodes=100_000, seed=0, num_runners=2, cpus_per_runner=0.5, options=SMALL
    )
    ends = list(next(iterations))
    os.kill(ends[0].info["pid"], signal.SIGKILL)
    # The agent goes on with the other one while the new process starts, which takes its time.
    for played in iterations:
        ends += played
        if len(processes(ends, 1)) == 2:
            break
    iterations.close()
    assert len({(end.info["pid"], end.episode) for end in ends}) == len(ends)
    assert len(processes(ends, 1)) == 2
    assert len(processes(ends, 2)) == 1


def processes(ends, runner):
    return {end.info["pid"] for end in ends if end.runner == runner}


@pytest.mark.parametrize("num_runners", [0, 1])
def test_an_environment_that_always_raises_is_heard(num_runners):
    run = run_agent(
        "ddpg", partial(Answers, fails=True), episodes=9, seed=0, num_runners=num_runners
    )
    with pytest.raises(EnvironmentFailedError, match="OSError: no space left on this planet") as e:
        list(run)
    assert "in _fail" in "".join(e.value.__notes__)


def gone(pid: int) -> bool:
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_the_checkpoint_of_another_search_is_refused(tmp_path):
    run = partial(run_agent, "ddpg", Answers, episodes=2, seed=0, checkpoint=tmp_path / "agent")
    flat(run(fingerprint="digits"))
    with pytest.raises(ValueError, match=r"must be of .*cifar10.*, got one of .*digits"):
        flat(run(fingerprint="cifar10"))
    with pytest.raises(ValueError, match=r"observations Box\(0.0, 1.0, \(4,\).*got one of"):
        flat(run(fingerprint="digits", options=SMALL))
