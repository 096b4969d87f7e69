"""A policy that acts by action values: ε-greedy or Boltzmann, along a schedule that its own steps move."""

from typing import Literal

import torch
from torch import Tensor, nn

from plaudit.models.q_network import QNetwork
from plaudit.rollout.control import observation_vectors
from plaudit.rollout.exploration import boltzmann_logprobs, epsilon_greedy_logprobs, linear_schedule
from plaudit.rollout.trajectory import Evaluation, Sampled, Trajectory, evaluation_of, observations_of


class QPolicy(nn.Module):
    """Acts on `Q(o, ·)`; satisfies `StepPolicy`. `V(o) = max_a Q(o, a)`.

    Attributes:
        network: action values.
        exploration: `epsilon`, `boltzmann` or `none` (always the best action).
        start, end, over: ε or the temperature moves from `start` to `end` over so many steps.
        random_steps: before so many steps actions are uniform.
        steps: of all environments together, so far.
    """

    def __init__(
        self,
        network: QNetwork,
        *,
        exploration: Literal["epsilon", "boltzmann", "none"] = "none",
        start: float = 1.0,
        end: float = 0.05,
        over: float = 1.0,
        random_steps: int = 0,
    ) -> None:
        """Act by a network; `QPolicy(network)` alone is its greedy policy."""
        super().__init__()
        self.network = network
        self.exploration = exploration
        self.start, self.end, self.over, self.random_steps = start, end, over, random_steps
        self.steps = 0

    @property
    def amount(self) -> float:
        """ε, or the temperature, of the next step."""
        return linear_schedule(self.steps, start=self.start, end=self.end, over=self.over)

    def action_values(self, observations: Tensor) -> Tensor:
        """`Q(o, ·)` of observations `[..., O]` (or `[...]` discrete ones), `[..., A]`."""
        found: Tensor = self.network(observation_vectors(observations, self.network.observation_size))
        return found

    def logprobs(self, action_values: Tensor) -> Tensor:
        """Log-probabilities `[..., A]` of all actions as they are explored now."""
        if self.exploration == "none":
            return epsilon_greedy_logprobs(action_values, 0.0)
        if self.steps < self.random_steps:
            return torch.log_softmax(torch.zeros_like(action_values), -1)
        if self.exploration == "epsilon":
            return epsilon_greedy_logprobs(action_values, self.amount)
        return boltzmann_logprobs(action_values, self.amount)

    @torch.no_grad()
    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """One action for each of `[B, O]` observations (or `[B]` discrete ones); counts the steps."""
        action_values = self.action_values(observations)
        logprobs = self.logprobs(action_values)
        if self.exploration == "none":
            actions = action_values.argmax(-1, keepdim=True)
        else:
            actions = torch.multinomial(logprobs.exp(), 1, generator=generator)
        self.steps += len(actions)
        return Sampled(actions.squeeze(1), logprobs.gather(1, actions).squeeze(1), action_values.amax(-1))

    def values(self, observations: Tensor) -> Tensor:
        """`max_a Q(o, a)` of observations `[..., O]`, `[...]`."""
        return self.action_values(observations).amax(-1)

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities, entropies and values `[B, T]`, as they are explored now.

        Raises:
            ValueError: if the trajectory has no observations.
        """
        action_values = self.action_values(observations_of(trajectory))
        return evaluation_of(self.logprobs(action_values), trajectory.actions, action_values.amax(-1))
