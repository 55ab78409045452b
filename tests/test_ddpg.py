"""DDPG against its definition, worked out by hand."""

import math
from copy import deepcopy

import gymnasium
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from torch import nn

from search.agents.ddpg import DDPGConfig, DDPGOptions, ReplayBuffer, explore, transitions

STEPS = 4


class Identity(gymnasium.Env):
    """One's observation is the answer, in [−2, 2], four times; the reward is minus the distance.

    An episode is cut off, or ends where ``ends`` is set.
    """

    observation_space = gymnasium.spaces.Box(-2, 2, (1,))
    action_space = gymnasium.spaces.Box(-2, 2, (1,))

    def __init__(self, config):
        self._ends = config.get("ends", False)

    def reset(self, *, seed=None, options=None):
        # RLlib gives the same seed every time.
        super().reset(seed=seed if self._np_random is None else None)
        self._step = 0
        return self._draw(), {}

    def step(self, action):
        reward = -abs(float(action[0] - self._answer[0]))
        self._step += 1
        done = self._step == STEPS
        return self._draw(), reward, done and self._ends, done and not self._ends, {}

    def _draw(self):
        self._answer = self.np_random.uniform(-2, 2, 1).astype(np.float32)
        return self._answer


def build(options, seed=0, **env_config):
    config = DDPGConfig(options).environment(Identity, env_config=env_config)
    config.env_runners(num_env_runners=0, batch_mode="complete_episodes")
    config.reporting(min_time_s_per_iteration=0).debugging(seed=seed, log_level="CRITICAL")
    return config.build_algo()


def module_of(algorithm):
    return algorithm.learner_group._learner.module["default_policy"]


def acts(algorithm, answers):
    with torch.no_grad():
        return 2 * module_of(algorithm).actor(torch.tensor(answers)[:, None]).squeeze(-1)


@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:.*Overriding environment")
class TestAlgorithm:
    @pytest.fixture(autouse=True)
    def _cluster(self, ray_cluster):
        pass

    def test_it_learns_to_answer_with_what_it_sees(self):
        options = DDPGOptions(
            hidden=(64,), actor_lr=1e-3, gamma=0.0, noise="normal", noise_std=0.1, spread="none"
        )
        algorithm = build(options)
        for _ in range(200):
            algorithm.train()
        algorithm.stop()
        answers = [-1.5, -0.5, 0.0, 0.5, 1.5]
        torch.testing.assert_close(
            acts(algorithm, answers), torch.tensor(answers), atol=0.2, rtol=0
        )

    @pytest.mark.parametrize("ends", [False, True])
    def test_one_update_is_the_papers(self, ends):
        options = DDPGOptions(
            hidden=(8,),
            gamma=0.9,
            tau=0.2,
            batch_size=5,
            warmup_episodes=1,
            updates_per_step=1 / STEPS,
            baseline_rate=0.5,
            spread="none",
            capacity=6,
        )
        algorithm = build(options, ends=ends)
        module = module_of(algorithm)
        for weight in module.target_critic.parameters():  # else it is the critic itself at first
            weight.data += 0.1
        before = deepcopy(module)
        drawn = deepcopy(algorithm._generator)
        algorithm.train()
        algorithm.stop()
        rows = {k: torch.from_numpy(v) for k, v in algorithm.buffer.sample(drawn, 5).items()}
        seen, acted, seen_next = (rows[k] for k in (Columns.OBS, Columns.ACTIONS, Columns.NEXT_OBS))
        rewards = rows[Columns.REWARDS] - rows[Columns.REWARDS].mean()
        assert rows[Columns.TERMINATEDS].any() == ends

        critic, actor = before.critic, before.actor
        adams = (
            torch.optim.Adam(critic.parameters(), 1e-3),
            torch.optim.Adam(actor.parameters(), 1e-4),
        )
        loss = 0.0
        for i in range(5):
            with torch.no_grad():
                next_action = before.target_actor(seen_next[i])
                value = before.target_critic(torch.cat([seen_next[i], next_action]))[0]
            target = rewards[i] + (0.0 if rows[Columns.TERMINATEDS][i] else 0.9 * value)
            loss = loss + (critic(torch.cat([seen[i], acted[i]]))[0] - target) ** 2 / 5
        critic_gradient = torch.autograd.grad(loss, list(critic.parameters()))
        worth = sum(critic(torch.cat([seen[i], actor(seen[i])]))[0] for i in range(5)) / 5
        actor_gradient = torch.autograd.grad(-worth, list(actor.parameters()))
        for adam, gradients in zip(adams, (critic_gradient, actor_gradient), strict=True):
            for weight, gradient in zip(adam.param_groups[0]["params"], gradients, strict=True):
                weight.grad = gradient
            adam.step()
        # Adam's first step hardly knows more of a gradient than its sign.
        for learned, by_hand in ((module.critic, critic_gradient), (module.actor, actor_gradient)):
            for weight, gradient in zip(learned.parameters(), by_hand, strict=True):
                torch.testing.assert_close(weight.grad, gradient, atol=1e-6, rtol=1e-4)
        same_weights(module.critic, critic)
        same_weights(module.actor, actor)
        for target, learned in (("target_critic", critic), ("target_actor", actor)):
            moved = getattr(before, target)
            for old, new in zip(moved.parameters(), learned.parameters(), strict=True):
                old.data = 0.8 * old.data + 0.2 * new.data
            same_weights(getattr(module, target), moved)

    def test_a_state_goes_round(self):
        options = DDPGOptions(hidden=(8,), warmup_episodes=1, batch_size=4, capacity=6)
        one, other = build(options), build(options, seed=1)
        for _ in range(3):
            one.train()
        other.set_state(one.get_state())
        assert other.num_episodes == one.num_episodes == 3
        assert len(other.buffer) == 6
        drawn = one._generator.integers(1000, size=5)
        assert (other._generator.integers(1000, size=5) == drawn).all()
        assert other._baseline == one._baseline is not None
        for name in ("actor", "critic", "target_actor", "target_critic"):
            same_weights(getattr(module_of(one), name), getattr(module_of(other), name))
        one.stop()
        other.stop()

    def test_first_actions_are_taken_first(self):
        given = ((-2.0, 0.0, 1.0, 2.0), (0.5, 0.5, -0.5, -0.5))
        algorithm = build(DDPGOptions(hidden=(8,), first_actions=given))
        for _ in range(3):
            algorithm.train()
        algorithm.stop()
        acted = 2 * algorithm.buffer.get_state()["columns"][Columns.ACTIONS].reshape(3, STEPS)
        np.testing.assert_allclose(acted[:2], given, atol=1e-6)
        assert len(set(acted[2])) == STEPS

    def test_the_same_seed_gives_the_same_run(self):
        options = DDPGOptions(hidden=(8,), warmup_episodes=1, batch_size=4)
        weights = []
        for seed in (0, 0, 1):
            algorithm = build(options, seed)
            for _ in range(3):
                algorithm.train()
            algorithm.stop()
            weights.append(nn.utils.parameters_to_vector(module_of(algorithm).parameters()))
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])

    def test_returns_cannot_be_spread_over_pieces_of_episodes(self):
        config = DDPGConfig().environment(Identity).env_runners(batch_mode="truncate_episodes")
        with pytest.raises(ValueError, match="batch_mode must be complete_episodes"):
            config.validate()


def same_weights(one: nn.Module, other: nn.Module) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@given(st.floats(-1, 1), st.floats(1e-4, 10), st.integers(0, 99))
def test_noise_stays_within_the_bounds(action, std, seed):
    torch.manual_seed(seed)
    for noise in ("truncated_normal", "normal"):
        drawn = explore(torch.full((50,), action), std, noise)
        assert drawn.abs().max() <= 1
        assert drawn.isfinite().all()


@pytest.mark.parametrize(("action", "std"), [(0.0, 0.5), (0.9, 0.25), (-1.0, 0.1)])
def test_truncated_noise_has_the_moments_of_a_truncated_normal(action, std):
    torch.manual_seed(0)
    drawn = explore(torch.full((20_000,), action), std, "truncated_normal").double()
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    density = torch.exp(-((grid - action) ** 2) / (2 * (2 * std) ** 2))
    density /= density.sum()
    mean = (grid * density).sum()
    variance = ((grid - mean) ** 2 * density).sum()
    assert abs(drawn.mean() - mean) < 4 * (variance / 20_000) ** 0.5
    assert drawn.var() == pytest.approx(float(variance), rel=0.05)


def test_noise_without_end_is_uniform():
    torch.manual_seed(0)
    drawn = explore(torch.full((20_000,), 0.9), math.inf, "truncated_normal")
    counts = torch.histc(drawn, 10, -1, 1)
    assert (counts - 2000).abs().max() < 4 * 2000**0.5


def test_noise_decays_from_the_end_of_the_warmup():
    options = DDPGOptions(warmup_episodes=2, noise_std=0.4, noise_decay=0.5)
    assert [options.std(e) for e in range(5)] == [math.inf, math.inf, 0.4, 0.2, 0.1]
    torch.manual_seed(0)
    for std in (0.4, 0.0):
        drawn = explore(torch.zeros(5000), std, "normal")
        assert (drawn.std() < 1e-9) == (std == 0)


@given(st.integers(1, 7), st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_a_full_buffer_keeps_the_latest(capacity, sizes):
    buffer, added = ReplayBuffer(capacity), 0
    for size in sizes:
        numbers = np.arange(added, added + size)
        buffer.add({"number": numbers, "vector": np.stack([numbers, -numbers], 1)})
        added += size
    assert len(buffer) == min(added, capacity)
    rows = buffer.sample(np.random.default_rng(0), 200)
    assert set(rows["number"]) == set(range(max(0, added - capacity), added))
    assert (rows["vector"][:, 1] == -rows["number"]).all()
    again = ReplayBuffer(capacity)
    again.set_state(buffer.get_state())
    again.add({"number": np.array([-1]), "vector": np.zeros((1, 2), int)})
    buffer.add({"number": np.array([-1]), "vector": np.zeros((1, 2), int)})
    for name, values in buffer.get_state()["columns"].items():
        assert (again.get_state()["columns"][name] == values).all()


@pytest.mark.parametrize(
    ("spread", "expected"),
    [("none", [0, 0, 6]), ("copy", [6, 6, 6]), ("share", [2, 2, 2])],
)
def test_a_return_is_spread(spread, expected):
    box = gymnasium.spaces.Box(-9, 9, (1,))
    episode = SingleAgentEpisode(
        observations=[np.full(1, i, np.float32) for i in range(4)],
        actions=[np.full(1, 10 + i, np.float32) for i in range(3)],
        rewards=[0.0, 0.0, 6.0],
        terminated=True,
        observation_space=box,
        action_space=box,
        len_lookback_buffer=0,
    ).to_numpy()
    rows = transitions(episode, spread)
    assert rows[Columns.REWARDS].tolist() == expected
    assert rows[Columns.OBS].ravel().tolist() == [0, 1, 2]
    assert rows[Columns.NEXT_OBS].ravel().tolist() == [1, 2, 3]
    assert rows[Columns.ACTIONS].ravel().tolist() == [10, 11, 12]
    assert rows[Columns.TERMINATEDS].tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gamma": 1.5}, r"gamma must be within \[0, 1\], got 1.5"),
        ({"capacity": 0}, "capacity must be above 0, got 0"),
        ({"baseline_rate": 0.0}, r"baseline_rate must be within \(0, 1\], got 0.0"),
        ({"noise_std": -1.0}, "noise_std must be at least 0, got -1.0"),
    ],
)
def test_impossible_numbers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DDPGOptions(**wrong)
