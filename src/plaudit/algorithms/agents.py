"""Agents by the configuration that describes them, and the policy-gradient family as one of them."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv

from plaudit.algorithms.a3c import A3CAgent
from plaudit.algorithms.acer_agent import AcerAgent
from plaudit.algorithms.base import Agent, TaskSizes
from plaudit.algorithms.build import build_algorithm
from plaudit.algorithms.dqn import DQN
from plaudit.algorithms.dyna_agent import Dyna
from plaudit.algorithms.feudal import Feudal
from plaudit.algorithms.option_critic import OptionCritic
from plaudit.algorithms.stepping import scheduled_rate, set_learning_rate
from plaudit.algorithms.world_model import WorldModel
from plaudit.configs.a3c import A3CConfig
from plaudit.configs.acer import AcerConfig
from plaudit.configs.agents import AgentConfig
from plaudit.configs.base import Config
from plaudit.configs.dyna import DynaConfig
from plaudit.configs.feudal import FeudalConfig
from plaudit.configs.option_critic import OptionCriticConfig
from plaudit.configs.policy_gradient import PolicyGradientConfig
from plaudit.configs.q_learning import QLearningConfig
from plaudit.configs.world_model import WorldModelConfig
from plaudit.models.control import ActorCriticNetwork
from plaudit.rollout.control import ControlPolicy
from plaudit.rollout.episodes import FinishedEpisodes
from plaudit.rollout.trajectory import Trajectory


class PolicyGradientAgent:
    """REINFORCE, actor-critic, A2C or PPO with a small network of its own; satisfies `Agent`.

    Without a learned value (REINFORCE) nothing can stand in for what follows the last step of a batch, so the steps of
    an episode wait until it has ended; a time limit then counts as an end.

    Attributes:
        policy, num_environments, num_steps: see `Agent`.
        algorithm: `plaudit.algorithms.updating.PolicyGradient`.
    """

    def __init__(self, config: PolicyGradientConfig, sizes: TaskSizes, *, total_steps: int, seed: int) -> None:
        """See `Agent`."""
        playing = config.playing()
        self.num_environments, self.num_steps = config.num_environments, int(playing["rollout_steps"])
        self.total_updates = max(1, total_steps // (self.num_environments * self.num_steps))
        self.schedule: Literal["constant", "linear"] = playing["schedule"]
        self.learning_rate = float(playing["learning_rate"])
        self.policy = ControlPolicy(ActorCriticNetwork(*sizes, hidden=config.hidden, seed=seed))
        self.optimizer = OPTIMIZERS[playing["optimizer"]](self.policy.parameters(), self.learning_rate)
        self.algorithm = build_algorithm(
            config,
            self.policy,
            self.optimizer,
            max_gradient_norm=config.max_gradient_norm,
            total_updates=self.total_updates,
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.num_updates = 0
        self.episodes = None if self.algorithm.needs_critic else FinishedEpisodes()

    def greedy_policy(self) -> ControlPolicy:
        """The likeliest action of the network as it learns on."""
        return ControlPolicy(self.policy.network, greedy=True)

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        """One update of the algorithm on these steps, or on the episodes that they have ended."""
        rate = scheduled_rate(self.schedule, self.learning_rate, done=self.num_updates, total=self.total_updates)
        set_learning_rate(self.optimizer, rate)
        self.num_updates += 1
        found: Trajectory | None = trajectory
        if self.episodes is not None:
            found = self.episodes.add(trajectory)
        if found is None:
            return {"episodes/waiting_steps": float(trajectory.mask.sum())}
        return self.algorithm.update(found, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, coefficients, place in the schedules, random state."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "algorithm": self.algorithm.state_dict(),
            "num_updates": self.num_updates,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Episodes that had not ended are forgotten, as the environments are."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.algorithm.load_state_dict(state["algorithm"])
        self.num_updates = int(state["num_updates"])
        self.generator.set_state(state["generator"])
        self.episodes = None if self.algorithm.needs_critic else FinishedEpisodes()


OPTIMIZERS: Mapping[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate, eps=1e-5),
    "rmsprop": lambda parameters, rate: torch.optim.RMSprop(parameters, lr=rate, alpha=0.99, eps=1e-5),
}
"""As Stable-Baselines3 sets them for PPO and A2C."""

AGENTS: Mapping[type[Config], Callable[..., Agent]] = {
    PolicyGradientConfig: PolicyGradientAgent,
    QLearningConfig: DQN,
    OptionCriticConfig: OptionCritic,
    FeudalConfig: Feudal,
    AcerConfig: AcerAgent,
    A3CConfig: A3CAgent,
    DynaConfig: Dyna,
    WorldModelConfig: WorldModel,
}
"""What each configuration of `AgentConfig` makes."""


def build_agent(config: AgentConfig, sizes: TaskSizes, *, total_steps: int, seed: int = 0) -> Agent:
    """The agent that a configuration describes.

    Args:
        config: one of `plaudit.configs.agents.AgentConfig`.
        sizes: of the task, see `task_sizes`.
        total_steps: environment steps of the whole run; schedules run over them.
        seed: of weights and of the agent's own draws.
    """
    return AGENTS[type(config)](config, sizes, total_steps=total_steps, seed=seed)


def task_sizes(environments: VectorEnv[Any, Any, Any]) -> TaskSizes:
    """The sizes of what `plaudit.rollout.environments.make_environments` has made."""
    seen, done = environments.single_observation_space, environments.single_action_space
    assert isinstance(done, spaces.Discrete)
    size = int(seen.n) if isinstance(seen, spaces.Discrete) else int(seen.shape[0])  # type: ignore[index]
    return TaskSizes(size, int(done.n))
