"""Deep deterministic policy gradient (Lillicrap et al., 2016) as an RLlib algorithm.

RLlib has none. An actor μ answers an observation with one action, a critic q learns what it is
worth, and the actor follows ∂q/∂a; both learn from transitions that are replayed at random.

What is particular here comes from searches of bit-widths, where an episode is a dozen steps and
only its last has a reward: the noise of HAQ (Wang et al., 2019), the return copied to every step,
and the moving baseline of AMC (He et al., 2018).

Inside, an action is in [−1, 1]; RLlib stretches it to the bounds of the action space.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal, cast

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch import TorchRLModule
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.env_runner_group import EnvRunnerGroup
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
)
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
from torch import Tensor, nn

__all__ = ["DDPG", "DDPGConfig", "DDPGOptions", "ReplayBuffer", "explore", "transitions"]

Noise = Literal["truncated_normal", "normal"]
Spread = Literal["none", "copy", "share"]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class DDPGOptions:
    """The numbers of DDPG; where nothing else is said, HAQ's.

    Attributes:
        hidden: Units of the hidden layers of actor and critic.
        actor_lr: Adam's rate for the actor.
        critic_lr: Adam's rate for the critic.
        gamma: Discount a step.
        tau: Share of the new weights in the target networks, an update.
        batch_size: Transitions an update.
        capacity: Transitions kept for replay.
        updates_per_step: Updates for every step sampled after the warm-up.
        warmup_episodes: Episodes of uniformly random actions, before anything is learned.
        noise: Its form, around the actor's action: cut off at the bounds, or clipped to them.
        noise_std: Its standard deviation after the warm-up, as a share of an action's range.
        noise_decay: Factor of ``noise_std`` an episode.
        baseline_rate: Weight of a batch's mean reward in the moving baseline that rewards are
            taken against; None for no baseline.
        first_actions: Actions of the first episodes, a tuple of all of an episode's numbers each,
            within the bounds of the action space; what they earn is learned from like the rest.
        spread: What a step is rewarded with: ``none``: its own reward; ``copy``: the episode's
            return, as in HAQ; ``share``: an equal part of it.
    """

    hidden: tuple[int, ...] = (300, 300)
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    gamma: float = 1.0
    tau: float = 0.01
    batch_size: int = 64
    capacity: int = 2000
    updates_per_step: float = 1.0
    warmup_episodes: int = 20
    noise: Noise = "truncated_normal"
    noise_std: float = 0.5
    noise_decay: float = 0.99
    baseline_rate: float | None = 0.5
    first_actions: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    spread: Spread = "copy"

    def __post_init__(self) -> None:
        for name in ("actor_lr", "critic_lr", "updates_per_step", "batch_size", "capacity"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("gamma", "tau", "noise_decay"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be within [0, 1], got {value}")
        if self.baseline_rate is not None and not 0 < self.baseline_rate <= 1:
            raise ValueError(f"baseline_rate must be within (0, 1], got {self.baseline_rate}")
        for name in ("warmup_episodes", "noise_std"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")

    def std(self, episode: int) -> float:
        """Return the noise of an episode; infinite in the warm-up, which makes it uniform."""
        if episode < self.warmup_episodes:
            return math.inf
        return self.noise_std * self.noise_decay ** (episode - self.warmup_episodes)


def explore(action: Tensor, std: float, noise: Noise) -> Tensor:
    """Draw an action around the actor's, from torch's global generator.

    Args:
        action: The actor's, in [−1, 1].
        std: Standard deviation as a share of the range, which is 2; infinite for uniform.
        noise: ``truncated_normal``: conditioned on [−1, 1]; ``normal``: clipped to it.
    """
    uniform = torch.rand_like(action, dtype=torch.float64)
    if math.isinf(std):
        drawn = 2 * uniform - 1
    elif std == 0:
        drawn = action.double()
    elif noise == "normal":
        drawn = action + 2 * std * torch.randn_like(action)
    else:  # the normal's quantile, between those of the bounds
        low, high = (torch.special.ndtr((b - action.double()) / (2 * std)) for b in (-1, 1))
        drawn = action + 2 * std * torch.special.ndtri(low + uniform * (high - low))
    return drawn.clamp(-1, 1).to(action.dtype)


class ReplayBuffer:
    """The latest transitions in flat arrays; new ones overwrite the oldest.

    Args:
        capacity: How many.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_added = 0
        self._columns: dict[str, NDArray[Any]] = {}

    def __len__(self) -> int:
        return min(self.num_added, self.capacity)

    def add(self, rows: Arrays) -> None:
        """Append rows of named columns, each of shape (N, ...)."""
        num = len(next(iter(rows.values())))
        place = np.arange(self.num_added, self.num_added + num)[-self.capacity :] % self.capacity
        for name, values in rows.items():
            if name not in self._columns:
                self._columns[name] = np.zeros((self.capacity, *values.shape[1:]), values.dtype)
            self._columns[name][place] = values[-self.capacity :]
        self.num_added += num

    def sample(self, generator: np.random.Generator, num: int) -> dict[str, NDArray[Any]]:
        """Draw rows with replacement."""
        drawn = generator.integers(len(self), size=num)
        return {name: values[drawn] for name, values in self._columns.items()}

    def get_state(self) -> dict[str, Any]:
        """Return what is in it, oldest first where it is not yet full."""
        columns = {name: values[: len(self)].copy() for name, values in self._columns.items()}
        return {"num_added": self.num_added, "columns": columns}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Put back what ``get_state`` of a buffer of the same capacity returned."""
        self.num_added, self._columns = 0, {}
        if state["columns"]:
            self.add(state["columns"])
        self.num_added = state["num_added"]


class DDPGModule(TorchRLModule, InferenceOnlyAPI):
    """Actor, critic and their targets; on a runner the actor alone, and its noise."""

    model_config: dict[str, Any]

    def setup(self) -> None:
        """Build the networks for the spaces of the environment."""
        seen, acted = self.observation_space, self.action_space
        if not isinstance(seen, gymnasium.spaces.Box) or len(seen.shape) != 1:
            raise ValueError(f"observation_space must be a Box of one dimension, got {seen}")
        if not isinstance(acted, gymnasium.spaces.Box) or not acted.is_bounded("both"):
            raise ValueError(f"action_space must be a bounded Box, got {acted}")
        num_seen, num_acted = seen.shape[0], math.prod(acted.shape)
        hidden: tuple[int, ...] = self.model_config["hidden"]
        self.noise: Noise = self.model_config["noise"]
        self.noise_std = math.inf
        self.given_actions: list[float] = []
        self.register_buffer("low", torch.tensor(acted.low.ravel()), persistent=False)
        self.register_buffer("high", torch.tensor(acted.high.ravel()), persistent=False)
        self.actor = nn.Sequential(_mlp(num_seen, *hidden, num_acted), nn.Tanh())
        if not self.inference_only:
            self.critic = _mlp(num_seen + num_acted, *hidden, 1)
            self.target_actor = deepcopy(self.actor).requires_grad_(False)
            self.target_critic = deepcopy(self.critic).requires_grad_(False)

    def get_non_inference_attributes(self) -> list[str]:
        """Name what runners do without."""
        return ["critic", "target_actor", "target_critic"]

    def _forward_inference(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: self.actor(batch[Columns.OBS])}

    def _forward_exploration(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        action = self.actor(batch[Columns.OBS])
        if self.given_actions:
            given = action.new_tensor([self.given_actions.pop(0) for _ in range(action.numel())])
            scaled = 2 * (given - self.low) / (self.high - self.low) - 1
            return {Columns.ACTIONS: scaled.reshape(action.shape).clamp(-1, 1)}
        return {Columns.ACTIONS: explore(action, self.noise_std, self.noise)}

    def _forward_train(self, batch: dict[str, Any], **_: Any) -> dict[str, Any]:
        seen, seen_next = batch[Columns.OBS], batch[Columns.NEXT_OBS]
        with torch.no_grad():
            next_action = self.target_actor(seen_next)
            target = self.target_critic(torch.cat([seen_next, next_action], -1))
        # The actor follows the critic's gradient, which must not move the critic.
        self.critic.requires_grad_(False)
        q_actor = self.critic(torch.cat([seen, self.actor(seen)], -1))
        self.critic.requires_grad_(True)
        return {
            "q": self.critic(torch.cat([seen, batch[Columns.ACTIONS]], -1)).squeeze(-1),
            "q_target_next": target.squeeze(-1),
            "q_actor": q_actor.squeeze(-1),
        }


def _mlp(*sizes: int) -> nn.Sequential:
    """Build an MLP of ReLUs whose first outputs are near 0 (Lillicrap et al., 2016, section 7)."""
    layers = [layer for size in pairwise(sizes) for layer in (nn.Linear(*size), nn.ReLU())][:-1]
    for parameter in layers[-1].parameters():
        nn.init.uniform_(parameter, -3e-3, 3e-3)
    return nn.Sequential(*layers)


class DDPGLearner(TorchLearner):
    """One step of the critic and one of the actor, then the targets move after them."""

    config: "DDPGConfig"

    def configure_optimizers_for_module(
        self, module_id: str, config: AlgorithmConfig | None = None
    ) -> None:
        """Give actor and critic an Adam each."""
        assert config is self.config
        module, options = self.module[module_id], self.config.options
        for name, lr in (("actor", options.actor_lr), ("critic", options.critic_lr)):
            params = list(getattr(module, name).parameters())
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=torch.optim.Adam(params, fused=True),
                params=params,
                lr_or_lr_schedule=lr,
            )

    def compute_loss_for_module(
        self,
        *,
        module_id: str,  # noqa: ARG002
        config: AlgorithmConfig,  # noqa: ARG002
        batch: dict[str, Any],
        fwd_out: dict[str, Any],
    ) -> Tensor:
        """Add the losses of critic and actor, which share no parameter that learns."""
        # An episode that was only cut off goes on as far as its value is concerned.
        goes_on = 1 - batch[Columns.TERMINATEDS].float()
        gamma = self.config.options.gamma
        target = batch[Columns.REWARDS] + gamma * goes_on * fwd_out["q_target_next"]
        loss: Tensor = F.mse_loss(fwd_out["q"], target) - fwd_out["q_actor"].mean()
        return loss

    def apply_gradients(self, gradients_dict: dict[Any, Any]) -> None:  # noqa: ARG002
        """Step both optimizers and move the targets (Polyak averaging).

        The gradients are where the optimizers look for them. RLlib's own step would first look
        twice at each for numbers that are not finite, which costs a sixth of an update.
        """
        for _, optimizer in self.get_optimizers_for_module(DEFAULT_MODULE_ID):
            cast(torch.optim.Optimizer, optimizer).step()
        module = cast(DDPGModule, self.module[DEFAULT_MODULE_ID])
        for learned, target in (
            (module.actor, module.target_actor),
            (module.critic, module.target_critic),
        ):
            with torch.no_grad():
                torch._foreach_lerp_(
                    list(target.parameters()), list(learned.parameters()), self.config.options.tau
                )


class DDPGConfig(AlgorithmConfig):
    """Everything RLlib lets one configure, and DDPG's own options.

    Args:
        options: DDPG's.
    """

    def __init__(self, options: DDPGOptions | None = None) -> None:
        super().__init__(algo_class=DDPG)
        self.options = options or DDPGOptions()

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """Name the networks."""
        networks = {"hidden": self.options.hidden, "noise": self.options.noise}
        return RLModuleSpec(module_class=DDPGModule, model_config=networks)

    def get_default_learner_class(self) -> type[DDPGLearner]:
        """Name the learner."""
        return DDPGLearner

    def validate(self) -> None:
        """Refuse what DDPG cannot do.

        Raises:
            ValueError: Then.
        """
        super().validate()
        if not self.normalize_actions:
            raise ValueError("normalize_actions must be True: the actor's actions are in [−1, 1]")
        if self.options.spread != "none" and self.batch_mode != "complete_episodes":
            raise ValueError(
                f"batch_mode must be complete_episodes to spread returns, got {self.batch_mode}"
            )


class DDPG(Algorithm):
    """Sample, replay, learn.

    The same seed gives the same run with one runner. A state, and so a checkpoint, holds the
    replay buffer, the generator that draws from it, and the counters.
    """

    config: DDPGConfig
    env_runner_group: EnvRunnerGroup
    learner_group: LearnerGroup
    metrics: MetricsLogger

    @classmethod
    def get_default_config(cls) -> DDPGConfig:
        """Return HAQ's numbers."""
        return DDPGConfig()

    def setup(self, config: Any) -> None:
        """Build runners, learner and an empty buffer."""
        super().setup(config)
        self.buffer = ReplayBuffer(self.config.options.capacity)
        self.num_episodes = 0
        self._generator = np.random.default_rng(self.config.seed)
        self._updates_due = 0.0
        self._baseline: float | None = None

    def training_step(self) -> None:
        """Sample from every runner once, then make up for the steps with updates."""
        options = self.config.options
        self.env_runner_group.foreach_env_runner(
            partial(
                _prepare,
                std=options.std(self.num_episodes),
                given=options.first_actions[self.num_episodes :],
            ),
            timeout_seconds=0.0,
        )
        sampled = synchronous_parallel_sample(
            worker_set=self.env_runner_group,
            sample_timeout_s=self.config.sample_timeout_s,
            _uses_new_env_runners=True,
            _return_metrics=True,
        )
        episodes, results = cast(tuple[list[SingleAgentEpisode], list[dict[str, Any]]], sampled)
        self.metrics.aggregate(results, key=ENV_RUNNER_RESULTS)
        for episode in episodes:
            self.buffer.add(transitions(episode, options.spread))
            self.num_episodes += episode.is_done
        if self.num_episodes >= options.warmup_episodes and len(self.buffer):
            self._updates_due += options.updates_per_step * sum(map(len, episodes))
            if self._updates_due >= 1:
                self._learn(int(self._updates_due))
                self._updates_due %= 1

    def _learn(self, num_updates: int) -> None:
        """Update on minibatches that are handed over together: each call costs milliseconds."""
        size = self.config.options.batch_size
        rows = self.buffer.sample(self._generator, num_updates * size)
        for rewards in rows[Columns.REWARDS].reshape(num_updates, size):  # a view of the rows
            rewards -= self._moved_baseline(float(rewards.mean()))  # noqa: PLW2901
        steps = self.metrics.peek((ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0)
        results = self.learner_group.update(
            batch=MultiAgentBatch({DEFAULT_MODULE_ID: SampleBatch(rows)}, num_updates * size),
            timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: steps},
            minibatch_size=size,
            num_epochs=1,
        )
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        self.env_runner_group.sync_weights(
            from_worker_or_learner_group=self.learner_group, inference_only=True
        )

    def _moved_baseline(self, mean: float) -> float:
        rate = self.config.options.baseline_rate
        if rate is None:
            return 0.0
        old = mean if self._baseline is None else self._baseline
        self._baseline = old + rate * (mean - old)
        return self._baseline

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Return RLlib's state and what it leaves out."""
        state: dict[str, Any] = super().get_state(
            components, not_components=not_components, **options
        )
        state["replay"] = {
            "buffer": self.buffer.get_state(),
            "generator": self._generator.bit_generator.state,
            "num_episodes": self.num_episodes,
            "updates_due": self._updates_due,
            "baseline": self._baseline,
        }
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        super().set_state(state)
        replay = state["replay"]
        self.buffer.set_state(replay["buffer"])
        self._generator.bit_generator.state = replay["generator"]
        self.num_episodes = replay["num_episodes"]
        self._updates_due, self._baseline = replay["updates_due"], replay["baseline"]


def _prepare(runner: EnvRunner, std: float, given: Sequence[Sequence[float]]) -> None:
    """Tell a runner what its next episode's noise is, or its very actions."""
    place = max(0, runner.worker_index - 1)
    module = cast(DDPGModule, cast(SingleAgentEnvRunner, runner).module)
    module.noise_std = std
    module.given_actions = list(given[place]) if place < len(given) else []


def transitions(episode: SingleAgentEpisode, spread: Spread) -> Arrays:
    """Take an episode, or a piece of one, apart into rows for the buffer."""
    seen = np.asarray(episode.get_observations(), np.float32)
    actions = np.asarray(episode.get_actions(), np.float32)
    rewards = np.asarray(episode.get_rewards(), np.float32)
    num = len(rewards)
    if spread != "none":
        rewards = np.full(num, rewards.sum() / (num if spread == "share" else 1), np.float32)
    terminated = np.zeros(num, np.bool_)
    terminated[-1] = episode.is_terminated
    return {
        Columns.OBS: seen[:-1],
        Columns.ACTIONS: actions.reshape(num, -1),
        Columns.REWARDS: rewards,
        Columns.NEXT_OBS: seen[1:],
        Columns.TERMINATEDS: terminated,
    }
