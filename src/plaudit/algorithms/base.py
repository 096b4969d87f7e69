"""What every algorithm offers, and the experience that it has prepared for its steps."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from plaudit.configs.base import Config
from plaudit.rollout.trajectory import Evaluation, StepPolicy, Trajectory


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A batch of experience with everything that its optimizer steps need; the targets stay as they are over epochs.

    Attributes:
        trajectory: `B` rows; `mask` is False on rows that say nothing (no counted step, a group with too few answers).
        advantages: `[B, T]`, 0 where nothing counts. With the view `answer` they stand at each row's first step.
        returns: `[B, T]`, what a critic learns to predict; with the view `answer`, at each row's first step.
        metrics: what is known before the first step.
        columns: `[B, ...]` each, by name, what else the steps of an algorithm read.
        evaluation: what the policy says of all rows before the first step, with gradients, where that is known: a batch
            that one step takes in one pass needs no second one. Not part of `state`.
    """

    trajectory: Trajectory
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]
    columns: dict[str, Tensor] = field(default_factory=dict)
    evaluation: Evaluation | None = None

    def to(self, device: torch.device | str) -> "Prepared":
        """The same on `device`."""
        moved = self.trajectory.to(device)
        columns = {name: tensor.to(device) for name, tensor in self.columns.items()}
        advantages, returns = self.advantages.to(device), self.returns.to(device)
        return replace(self, trajectory=moved, advantages=advantages, returns=returns, columns=columns)

    def state(self) -> dict[str, Any]:
        """Tensors and numbers alone, for a checkpoint in the middle of a batch."""
        return {
            "trajectory": self.trajectory.tensors(),
            "advantages": self.advantages,
            "returns": self.returns,
            "metrics": dict(self.metrics),
            "columns": dict(self.columns),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Prepared":
        """What `state` was taken from."""
        return cls(
            trajectory=Trajectory(**state["trajectory"]),
            advantages=state["advantages"],
            returns=state["returns"],
            metrics=dict(state["metrics"]),
            columns=dict(state.get("columns", {})),
        )


class Algorithm(Protocol):
    """Experience in, a better policy out. `update` is the other methods, one after the other.

    Attributes:
        needs_critic: whether the trajectory's `values` and the policy's have to be a critic's.
        needs_groups: whether each prompt needs two or more answers.
        needs_greedy: whether `prepare` wants the return of the greedy answer to each row's prompt.
    """

    needs_critic: bool
    needs_groups: bool
    needs_greedy: bool

    @property
    def config(self) -> Config:
        """What it was built from."""
        ...

    def prepare(self, trajectory: Trajectory, *, baselines: Tensor | None = None) -> Prepared:
        """Rewards with the penalty in them, advantages and returns; `baselines [B]` are greedy returns."""
        ...

    def minibatches(self, prepared: Prepared, generator: torch.Generator | None = None) -> list[Tensor]:
        """Row indices of every optimizer step, all epochs in order."""
        ...

    def step(self, prepared: Prepared, rows: Tensor) -> dict[str, float]:
        """One optimizer step on these rows."""
        ...

    def stop_early(self, metrics: dict[str, float]) -> bool:
        """Whether the metrics of a step say that no further one should be taken on this batch."""
        ...

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Adapt the coefficients after the last step on a batch; returns the metrics with what has changed."""
        ...

    def update(
        self, trajectory: Trajectory, *, baselines: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """All of these on one batch of experience; means of the metrics over its steps."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Coefficients, running baseline and counters: numbers alone. Policy and optimizer are saved by their owner."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...


class TaskSizes(NamedTuple):
    """What an agent has to know of an environment: `observation_size` (of vectors; discrete observations are one-hot
    vectors of that size) and `num_actions`."""

    observation_size: int
    num_actions: int


class Agent(Protocol):
    """A learner in environments with few actions: it acts, is handed what came of it, and improves.

    Every class that satisfies it is made by `Class(config, sizes: TaskSizes, *, total_steps: int, seed: int)`, where
    `total_steps` is how many environment steps the run will have (schedules run over them).

    Attributes:
        num_environments: `B`, how many environments it wants side by side.
        num_steps: `T`, steps of each environment between two updates.
    """

    @property
    def policy(self) -> StepPolicy:
        """Acts while learning, exploration included."""
        ...

    num_environments: int
    num_steps: int

    def greedy_policy(self) -> StepPolicy:
        """Acts without exploration, for evaluation; a memory of its own where it has one.

        It is an `nn.Module` whose state dict is all that acting needs: that is what a saved agent holds.
        """
        ...

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        """Learn from the next `T` steps `[B, T]` of every environment; returns metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, schedules, replay and random state: tensors, numbers and strings alone.

        Not a policy's memory of episodes under way: environments begin anew when a run goes on.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        ...
