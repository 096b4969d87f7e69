"""Tabular Dyna as an agent: the tables of `plaudit.algorithms.dyna`, acting and learning through trajectories."""

from typing import Any

import torch
from torch import Tensor, nn

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.dyna import DynaTables
from plaudit.configs.dyna import DynaConfig
from plaudit.rollout.trajectory import Evaluation, Sampled, StepPolicy, Trajectory, evaluation_of, observations_of


class TablePolicy(nn.Module):
    """The ε-greedy policy of a table of action values; satisfies `StepPolicy`. Observations are states `[B]` int64.

    Attributes:
        table: `Q`, `[S, A]` float64.
        exploration: `ε`, 0 for the greedy policy; equally good actions share.
    """

    table: Tensor

    def __init__(self, table: Tensor, *, exploration: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.exploration = exploration

    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """One action for each state `[B]` int64.

        Raises:
            ValueError: for observations that are not whole numbers.
        """
        logprobs = self._logprobs(observations)
        actions = torch.multinomial(logprobs.exp(), 1, generator=generator)
        return Sampled(actions.squeeze(1), logprobs.gather(1, actions).squeeze(1), self.values(observations))

    def values(self, observations: Tensor) -> Tensor:
        """`max_a Q(s, a)` of states of any shape `[...]`."""
        return self._rows(observations).max(-1).values

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities, entropies and values `[B, T]`; there are no gradients.

        Raises:
            ValueError: if the trajectory has no observations.
        """
        states = observations_of(trajectory)
        return evaluation_of(self._logprobs(states), trajectory.actions, self.values(states))

    def _rows(self, observations: Tensor) -> Tensor:
        if observations.is_floating_point():
            raise ValueError(
                f"tabular Dyna needs discrete observations, got {observations.dtype} of shape "
                f"{tuple(observations.shape)}; world_model is for the others"
            )
        return self._look_up(observations)

    def _look_up(self, states: Tensor) -> Tensor:
        return self.table[states]

    def _logprobs(self, observations: Tensor) -> Tensor:
        rows = self._rows(observations)
        best = (rows == rows.max(-1, keepdim=True).values).double()
        chances = (1 - self.exploration) * best / best.sum(-1, keepdim=True) + self.exploration / rows.shape[-1]
        return chances.log()


class _LivePolicy(TablePolicy):
    """The policy of tables that go on learning, which are lists and not tensors."""

    def __init__(self, tables: DynaTables, *, exploration: float) -> None:
        super().__init__(torch.zeros(0, 0), exploration=exploration)
        self._tables = tables

    def _look_up(self, states: Tensor) -> Tensor:
        rows = [self._tables.values[state] for state in states.flatten().tolist()]
        return torch.tensor(rows, dtype=torch.float64).reshape(*states.shape, -1)


class Dyna:
    """Tabular Dyna as a learner in an environment; satisfies `plaudit.algorithms.base.Agent`.

    One environment, one step at a time: the book's loop. `DynaTables` is the same without trajectories.
    """

    num_environments = 1
    num_steps = 1

    def __init__(self, config: DynaConfig, sizes: TaskSizes, *, total_steps: int, seed: int) -> None:
        """Tables for `sizes.observation_size` states; nothing depends on `total_steps`."""
        self.tables = DynaTables(config, sizes.observation_size, sizes.num_actions, seed=seed)
        self.policy: StepPolicy = _LivePolicy(self.tables, exploration=config.exploration)

    def greedy_policy(self) -> TablePolicy:
        """Without exploration, as the values stand now."""
        return TablePolicy(torch.tensor(self.tables.values, dtype=torch.float64))

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        """Learn from real steps `[B, T]`, and from imagined ones after each."""
        assert trajectory.observations is not None
        assert trajectory.next_observations is not None
        errors = []
        for row, step in trajectory.mask.nonzero().tolist():
            errors.append(
                self.tables.learn(
                    int(trajectory.observations[row, step]),
                    int(trajectory.actions[row, step]),
                    float(trajectory.rewards[row, step]),
                    int(trajectory.next_observations[row, step]),
                    float(trajectory.continues[row, step]),
                )
            )
        known = sum(map(len, self.tables.model.values()))
        error = sum(map(abs, errors)) / max(len(errors), 1)
        return {"value/td_error": error, "model/steps_known": float(known)}

    def state_dict(self) -> dict[str, Any]:
        """The tables."""
        return self.tables.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.tables.load_state_dict(state)
