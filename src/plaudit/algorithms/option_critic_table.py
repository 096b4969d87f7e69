"""Option-critic in tables, as in the four rooms of its paper: one update after every step, many runs side by side."""

import torch
from torch import Tensor

from plaudit.core.hierarchy_losses import arrival_values, option_state_values


class TabularOptionCritic:
    """Algorithm 1 of Bacon et al. (arXiv:1609.05140) with intra-option Q-learning, `R` independent runs at once.

    After each step from s by option ω and action a to s', with `y = r + γ U(ω, s')` (0 behind the goal):

    - `Q_Ω(s, ω) += α (y - Q_Ω)`, `Q_U(s, ω, a) += α (y - Q_U)`;
    - `θ_ω(s, ·) += α_θ ∇log π_ω(a|s) (Q_U(s, ω, a) - Q_Ω(s, ω))`, `π = softmax(θ / τ)`, the gradient being with
      respect to `θ / τ`, as in the authors' code;
    - `ϑ_ω(s') -= α_β ∇β_ω(s') (Q_Ω(s', ω) - V_Ω(s') + η)`, `β = σ(ϑ)`, where the episode goes on.

    The next option is ε-greedy in `Q_Ω`. Departures from the authors' code: policies learn from the step just taken
    and not from the action chosen next; terminations from the option that arrived and not from its successor (as the
    theorem says); and their published script draws options by a softmax where paper and here are ε-greedy.

    Attributes:
        values: `[R, S, W]`, `Q_Ω`.
        action_values, preferences: `[R, S, W, A]`, `Q_U` and `θ`.
        endings: `[R, S, W]`, `ϑ`.
        options: `[R]` int64, in force.
        durations: `[R]`, mean steps between two terminations, of late (decay .999).
    """

    def __init__(
        self,
        num_runs: int,
        num_states: int,
        num_actions: int,
        *,
        num_options: int = 4,
        discount: float = 0.99,
        value_rate: float = 0.5,
        policy_rate: float = 0.25,
        termination_rate: float = 0.25,
        exploration: float = 0.01,
        temperature: float = 0.01,
        deliberation_cost: float = 0.0,
        seed: int = 0,
    ) -> None:
        table = (num_runs, num_states, num_options)
        self.values = torch.zeros(table, dtype=torch.float64)
        self.action_values = torch.zeros((*table, num_actions), dtype=torch.float64)
        self.preferences = torch.zeros_like(self.action_values)
        self.endings = torch.zeros_like(self.values)
        self.options = torch.zeros(num_runs, dtype=torch.int64)
        self.durations = torch.ones(num_runs, dtype=torch.float64)
        self.discount, self.exploration, self.temperature = discount, exploration, temperature
        self.value_rate, self.policy_rate, self.termination_rate = value_rate, policy_rate, termination_rate
        self.deliberation_cost = deliberation_cost
        self._rows = torch.arange(num_runs)
        self._generator = torch.Generator().manual_seed(seed)
        self._ends = torch.ones(num_runs, dtype=torch.float64)

    def begin(self, states: Tensor, fresh: Tensor) -> None:
        """Arrive in `states [R]`: `fresh [R]` bool rows begin an episode, in the others an option may end."""
        chance = self.endings[self._rows, states, self.options].sigmoid()
        ends = self._draw() < chance
        self._ends = 0.999 * self._ends + 0.001 * ends
        self.durations = 1 / self._ends.clamp_min(1e-3)
        values = self.values[self._rows, states]
        random = (self._draw() * values.shape[1]).long()
        chosen = torch.where(self._draw() < self.exploration, random, values.argmax(1))
        self.options = torch.where(ends | fresh, chosen, self.options)

    def act(self, states: Tensor) -> Tensor:
        """One action for each of `states [R]`, by the option in force; `[R]`."""
        chances = self._policy(states).cumsum(1)
        return (chances[:, :-1] <= self._draw()[:, None]).sum(1)

    def learn(self, states: Tensor, actions: Tensor, rewards: Tensor, arrived: Tensor, reached: Tensor) -> None:
        """Every update after one step of each run: all `[R]`; `reached` bool where the episode has ended."""
        here, rows = (self._rows, states, self.options), self._rows
        values = self.values[rows, arrived]
        state_values = option_state_values(values)
        ends = self.endings[rows, arrived].sigmoid()
        cost = self.deliberation_cost
        upon_arrival = arrival_values(values, ends, state_values, deliberation_cost=cost)[rows, self.options]
        targets = rewards + self.discount * upon_arrival.masked_fill(reached, 0.0)
        self.values[here] += self.value_rate * (targets - self.values[here])
        taken = (*here, actions)
        self.action_values[taken] += self.value_rate * (targets - self.action_values[taken])
        steps = self.policy_rate * (self.action_values[taken] - self.values[here])
        gradient = -self._policy(states)
        gradient[rows, actions] += 1
        self.preferences[here] += steps[:, None] * gradient
        chance = ends[rows, self.options]
        advantages = (values[rows, self.options] - state_values + cost).masked_fill(reached, 0.0)
        self.endings[rows, arrived, self.options] -= self.termination_rate * chance * (1 - chance) * advantages

    def _policy(self, states: Tensor) -> Tensor:
        return torch.softmax(self.preferences[self._rows, states, self.options] / self.temperature, 1)

    def _draw(self) -> Tensor:
        return torch.rand(len(self._rows), dtype=torch.float64, generator=self._generator)
