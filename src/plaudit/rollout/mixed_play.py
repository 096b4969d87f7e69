"""Play that sees more of a world than chance: every episode another random controller, with its own share of chance."""

import torch
from torch import Tensor

from plaudit.rollout.imagination import ObservationShape
from plaudit.rollout.trajectory import Evaluation, Sampled, Trajectory


class MixedPlay:
    """In each episode `a = argmax_a (W o)_a` with `W ~ N(0, 1)`, but a random action with a probability `ε ~ U(0, 1)`.

    Nothing is learned. Purely random play falls at once in many tasks and never sees what lasting looks like. Satisfies
    `StepPolicy` and `StatefulPolicy`; the memory of a row is its `ε` (-1 before it is drawn) and its `W`.
    """

    def __init__(self, prepare: ObservationShape, num_actions: int) -> None:
        self.prepare, self.num_actions = prepare, num_actions
        self.size = int(torch.Size(prepare.shape).numel())
        self._memory = self._fresh(0)

    def memory(self, num_rows: int) -> Tensor:
        """`[B, 1 + A F]`."""
        if len(self._memory) != num_rows:
            self._memory = self._fresh(num_rows)
        return self._memory

    def end_episodes(self, ended: Tensor) -> None:
        """The rows `[B]` whose episode has ended draw another controller."""
        self._memory = torch.where(ended.unsqueeze(1), self._fresh(len(ended)), self.memory(len(ended)))

    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """One action for each of `[B, ...]` observations."""
        rows = len(observations)
        memory = self.memory(rows)
        drawn = torch.cat(
            [
                torch.rand(rows, 1, generator=generator),
                torch.randn(rows, self.num_actions * self.size, generator=generator),
            ],
            1,
        )
        memory = torch.where(memory[:, :1] < 0, drawn, memory)
        weights = memory[:, 1:].reshape(rows, self.num_actions, self.size)
        best = (weights @ self.prepare(observations).reshape(rows, self.size, 1)).squeeze(-1).argmax(-1)
        chance = torch.rand(rows, generator=generator) < memory[:, 0]
        other = torch.randint(self.num_actions, (rows,), generator=generator)
        actions = torch.where(chance, other, best)
        likely = memory[:, 0] / self.num_actions + (1 - memory[:, 0]) * (actions == best)
        self._memory = memory
        return Sampled(actions, likely.log(), torch.zeros(rows))

    def values(self, observations: Tensor) -> Tensor:
        """0 for observations `[B, T, ...]`."""
        return torch.zeros(observations.shape[:2])

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """What was recorded: nothing here learns."""
        zeros = torch.zeros_like(trajectory.behaviour_logprobs)
        return Evaluation(trajectory.behaviour_logprobs, zeros, zeros)

    def _fresh(self, num_rows: int) -> Tensor:
        memory = torch.zeros(num_rows, 1 + self.num_actions * self.size)
        memory[:, 0] = -1
        return memory
