"""The one representation of experience, for language tokens and control tasks alike, and what a policy has to offer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from plaudit.core.kl import categorical_entropy
from plaudit.core.reduction import expect_shape

_PER_STEP = (
    "actions",
    "behaviour_logprobs",
    "old_logprobs",
    "reference_logprobs",
    "rewards",
    "values",
    "next_values",
    "continues",
    "truncated",
    "mask",
)
_PER_STEP_AND_MORE = ("observations", "next_observations", "behaviour_logits", "behaviour_actions", "options", "goals")
_PER_ROW = ("group_ids", "state", "policy_version")


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """`B` rows of `T` steps. There is no `done`, and γ and λ are arguments of functions, not part of the data.

    A row may hold one answer, a part of an episode or several episodes one after the other. A text's token limit is an
    *end* (`continues` 0), not a truncation. What stands in a masked step never matters.

    Attributes:
        actions: `[B, T]` int64 (tokens, discrete actions).
        behaviour_logprobs: `[B, T]`, recorded while sampling: `log μ(a_t|s_t)`.
        old_logprobs: `[B, T]`, of the policy before the update, by the training forward.
        reference_logprobs: `[B, T]`, of the frozen starting point; equal to `old_logprobs` where there is none.
        rewards: `[B, T]`, floating point.
        values: `[B, T]`, `V(s_t)` when the data was collected; 0 without a critic.
        next_values: `[B, T]`, `V(s_{t+1})`; at a truncated step, of the environment's final observation.
        continues: `[B, T]` floating point, 0 at a true end, else 1.
        truncated: `[B, T]` bool, a time limit: bootstraps from `next_values` and cuts the trace.
        mask: `[B, T]` bool, True exactly on the steps that the policy chose.
        observations: `[B, T, ...]` or None, what the policy saw.
        next_observations: `[B, T, ...]` or None, what followed; the final observation at an end or a truncation.
        behaviour_logits: `[B, T, A]` or None, only for few actions (or for the `k` of `behaviour_actions`).
        behaviour_actions: `[B, T, k]` int64 or None, the actions that `behaviour_logits` belong to; None for all.
        group_ids: `[B]` int64 or None, rows of one prompt share an id.
        options: `[B, T]` int64 or None, the option in force.
        goals: `[B, T, ...]` or None, a manager's goals.
        state: `[B, ...]` or None, the recurrent state before the first step.
        policy_version: `[B]` int64 or None, how many updates the behaviour policy had seen.
    """

    actions: Tensor
    behaviour_logprobs: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor
    rewards: Tensor
    values: Tensor
    next_values: Tensor
    continues: Tensor
    truncated: Tensor
    mask: Tensor
    observations: Tensor | None = None
    next_observations: Tensor | None = None
    behaviour_logits: Tensor | None = None
    behaviour_actions: Tensor | None = None
    group_ids: Tensor | None = None
    options: Tensor | None = None
    goals: Tensor | None = None
    state: Tensor | None = None
    policy_version: Tensor | None = None

    def __post_init__(self) -> None:
        if self.actions.ndim != 2:
            raise ValueError(f"actions must be [B, T], got {tuple(self.actions.shape)}")
        shape = tuple(self.actions.shape)
        for name in _PER_STEP:
            expect_shape(name, getattr(self, name), shape)
        for name in (*_PER_STEP_AND_MORE, *_PER_ROW):
            tensor = getattr(self, name)
            leading = shape if name in _PER_STEP_AND_MORE else shape[:1]
            if tensor is not None and tuple(tensor.shape[: len(leading)]) != leading:
                raise ValueError(f"{name} must begin with shape {leading}, got {tuple(tensor.shape)}")
        for name in ("truncated", "mask"):
            if getattr(self, name).dtype != torch.bool:
                raise ValueError(f"{name} must be boolean, got {getattr(self, name).dtype}")
        for name in ("rewards", "continues"):
            if not getattr(self, name).is_floating_point():
                raise ValueError(f"{name} must be floating point, got {getattr(self, name).dtype}")

    @property
    def num_rows(self) -> int:
        """`B`."""
        return self.actions.shape[0]

    @property
    def num_steps(self) -> int:
        """`T`, masked steps included."""
        return self.actions.shape[1]

    @staticmethod
    def per_row_names() -> tuple[str, ...]:
        """The fields that have one entry for each row, and none for each step."""
        return _PER_ROW

    def to(self, device: torch.device | str) -> "Trajectory":
        """The same trajectory on `device`."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def select(self, rows: Tensor) -> "Trajectory":
        """The rows with these indices `[n]` int64 (or where `[B]` bool is True), in that order."""
        return replace(self, **{name: tensor[rows] for name, tensor in self.tensors().items()})

    def with_fields(self, **tensors: Tensor | None) -> "Trajectory":
        """A copy with some fields replaced, such as `old_logprobs [B, T]` after the training forward."""
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)

    def tensors(self) -> dict[str, Any]:
        """Field name to tensor, without the fields that are None."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def new_trajectory(
    *,
    actions: Tensor,
    behaviour_logprobs: Tensor,
    rewards: Tensor,
    continues: Tensor,
    mask: Tensor,
    truncated: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    values: Tensor | None = None,
    next_values: Tensor | None = None,
    **others: Tensor | None,
) -> Trajectory:
    """A trajectory in which what was not given has its neutral value.

    Args:
        actions, behaviour_logprobs, rewards, continues, mask: `[B, T]`, as in `Trajectory`.
        truncated: None for "never".
        old_logprobs: None for `behaviour_logprobs`.
        reference_logprobs: None for `old_logprobs`: no reference, so that a penalty towards it is 0.
        values, next_values: None for 0: no critic.
        **others: the optional fields of `Trajectory`.

    Returns:
        the trajectory.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    old = behaviour_logprobs if old_logprobs is None else old_logprobs
    zeros = torch.zeros_like(rewards)
    return Trajectory(
        actions=actions,
        behaviour_logprobs=behaviour_logprobs,
        old_logprobs=old,
        reference_logprobs=old if reference_logprobs is None else reference_logprobs,
        rewards=rewards,
        values=zeros if values is None else values,
        next_values=zeros if next_values is None else next_values,
        continues=continues,
        truncated=torch.zeros_like(mask) if truncated is None else truncated,
        mask=mask,
        **others,
    )


def concatenate(trajectories: Sequence[Trajectory]) -> Trajectory:
    """One trajectory with the rows of all; shorter ones are filled up with masked steps.

    Raises:
        ValueError: for an empty sequence, or if an optional field is there in some and missing in others.
    """
    if not trajectories:
        raise ValueError("there is no trajectory to concatenate")
    names = [frozenset(item.tensors()) for item in trajectories]
    differing = frozenset[str]().union(*names) - names[0].intersection(*names)
    if differing:
        raise ValueError(f"some trajectories have {', '.join(sorted(differing))} and others do not")
    longest = max(item.num_steps for item in trajectories)
    parts: dict[str, list[Tensor]] = {name: [] for name in trajectories[0].tensors()}
    for item in trajectories:
        for name, tensor in item.tensors().items():
            missing = 0 if name in _PER_ROW else longest - item.num_steps
            filler = tensor.new_zeros((tensor.shape[0], missing, *tensor.shape[2:])) if missing else None
            parts[name].append(tensor if filler is None else torch.cat([tensor, filler], 1))
    return Trajectory(**{name: torch.cat(tensors) for name, tensors in parts.items()})


class Sampled(NamedTuple):
    """What a policy does at one step.

    Attributes:
        actions: `[B]` int64.
        logprobs: `[B]`, of these actions.
        values: `[B]`, 0 without a critic.
        columns: `[B, ...]` each, more of the step by the names of `Trajectory`'s optional fields (`behaviour_logits`,
            `options`, `goals`); a collector writes them into the trajectory.
    """

    actions: Tensor
    logprobs: Tensor
    values: Tensor
    columns: Mapping[str, Tensor] | None = None


class Evaluation(NamedTuple):
    """A policy's view of a trajectory, all `[B, T]`: `logprobs` of its actions, `entropy`, `values`."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


def observations_of(trajectory: Trajectory) -> Tensor:
    """The observations that a policy acts on.

    Raises:
        ValueError: if the trajectory has none.
    """
    if trajectory.observations is None:
        raise ValueError("a policy reads trajectory.observations, which is None")
    return trajectory.observations


def evaluation_of(logprobs: Tensor, actions: Tensor, values: Tensor) -> Evaluation:
    """What a policy that knows the log-probabilities of all actions says of those that were taken.

    Args:
        logprobs: `[B, T, A]`, normalised.
        actions: `[B, T]` int64.
        values: `[B, T]`.
    """
    chosen = logprobs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    return Evaluation(chosen, categorical_entropy(logprobs), values)


class Policy(Protocol):
    """What an update needs of a policy, whether it writes text or moves a cart."""

    def evaluate(self, trajectory: Trajectory) -> Evaluation:
        """Log-probabilities, entropies and values `[B, T]` of what the trajectory holds, with gradients."""
        ...


class StepPolicy(Policy, Protocol):
    """What acting in an environment step by step needs beside that."""

    def sample(self, observations: Tensor, *, generator: torch.Generator | None = None) -> Sampled:
        """Draw one action for each of `[B, ...]` observations, without gradients."""
        ...

    def values(self, observations: Tensor) -> Tensor:
        """`V(s)` of observations `[..., *shape]`, `[...]`; 0 without a critic."""
        ...


@runtime_checkable
class StatefulPolicy(Protocol):
    """What a policy with a memory (options in force, recurrent states) offers beside `StepPolicy`.

    The memory belongs to the environments that the policy acts in, one row each; before the first step of a row, and
    after its episode has ended, it is that of a fresh episode.
    """

    def memory(self, num_rows: int) -> Tensor:
        """`[B, ...]`, what `sample` will go on from; recorded as `Trajectory.state`. A fresh one for new rows."""
        ...

    def end_episodes(self, ended: Tensor) -> None:
        """Forget the rows `[B]` bool whose episode has ended."""
        ...
