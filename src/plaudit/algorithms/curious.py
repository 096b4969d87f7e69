"""Any agent, paid a bonus for what is new on top of its environment's rewards."""

from typing import Any

from plaudit.algorithms.base import Agent, TaskSizes
from plaudit.algorithms.bonuses import Bonus, CountBonus, DistillationBonus
from plaudit.configs.bonus import BonusConfig, CountBonusConfig
from plaudit.rollout.trajectory import StepPolicy, Trajectory


class CuriousAgent:
    """An agent whose every step also pays `Bonus.pay` of what it led to; satisfies `Agent`.

    An agent with a replay remembers the bonus as it was when the step was made. What is evaluated is the environment's
    reward alone.

    Attributes:
        agent, bonus: its parts.
        num_environments, num_steps: the agent's.
    """

    def __init__(self, agent: Agent, bonus: Bonus) -> None:
        """Put both together."""
        self.agent, self.bonus = agent, bonus
        self.num_environments, self.num_steps = agent.num_environments, agent.num_steps

    @property
    def policy(self) -> StepPolicy:
        """The agent's."""
        return self.agent.policy

    def greedy_policy(self) -> StepPolicy:
        """The agent's."""
        return self.agent.greedy_policy()

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        """The agent's update on rewards with the bonus in them.

        Raises:
            ValueError: if the trajectory does not say what followed each step.
        """
        if trajectory.next_observations is None:
            raise ValueError("a bonus is paid for trajectory.next_observations, which is None")
        paid = self.bonus.pay(trajectory.next_observations).to(trajectory.rewards)
        metrics = self.agent.update(trajectory.with_fields(rewards=trajectory.rewards + paid))
        return metrics | {"exploration/bonus": float(paid.mean())}

    def state_dict(self) -> dict[str, Any]:
        """Of both parts."""
        return {"agent": self.agent.state_dict(), "bonus": self.bonus.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.agent.load_state_dict(state["agent"])
        self.bonus.load_state_dict(state["bonus"])


def build_bonus(config: BonusConfig, sizes: TaskSizes, *, seed: int = 0) -> Bonus:
    """The bonus that a configuration describes, for observations of these sizes."""
    if isinstance(config, CountBonusConfig):
        return CountBonus(config)
    return DistillationBonus(config, sizes.observation_size, seed=seed)
