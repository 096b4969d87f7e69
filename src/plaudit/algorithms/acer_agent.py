"""ACER in environments: segments, their replay, and the updates on both."""

import copy
from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.acer import acer_loss
from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.stepping import follow, guarded_step, scheduled_rate, set_learning_rate
from plaudit.algorithms.updating import combine_metrics
from plaudit.configs.acer import AcerConfig
from plaudit.models.control import ActorActionValueNetwork
from plaudit.rollout.action_values import ActionTables, ActionValuePolicy
from plaudit.rollout.segments import SegmentReplay
from plaudit.rollout.trajectory import StepPolicy, Trajectory


class AcerAgent:
    """Satisfies `plaudit.algorithms.base.Agent`.

    Attributes:
        config: every option.
        policy: what learns; `average` is the average policy, None without a trust region.
        replay: the recent segments.
        num_environments, num_steps: see `Agent`.
    """

    def __init__(self, config: AcerConfig, sizes: TaskSizes, *, total_steps: int, seed: int) -> None:
        """Draw the weights from `seed`, which also decides what is replayed and how often."""
        self.config = config
        self.num_environments, self.num_steps = config.num_environments, config.rollout_steps
        network = ActorActionValueNetwork(*sizes, hidden=config.hidden, seed=seed)
        self.policy = ActionValuePolicy(network)
        self.average = None if config.trust_region is None else copy.deepcopy(network).requires_grad_(False)
        self.replay = SegmentReplay(max(config.buffer_size // config.rollout_steps, config.num_environments))
        self.optimizer = torch.optim.RMSprop(
            network.parameters(), lr=config.learning_rate, alpha=config.squares_decay, eps=config.epsilon
        )
        self.generator = torch.Generator().manual_seed(seed)
        self.total_steps = total_steps
        self.steps_seen = 0

    def greedy_policy(self) -> StepPolicy:
        """The likeliest action everywhere."""
        return ActionValuePolicy(self.policy.network, greedy=True)

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        """One update on these `T` steps, then Poisson-many on replayed segments."""
        config = self.config
        rate = scheduled_rate(config.schedule, config.learning_rate, done=self.steps_seen, total=self.total_steps)
        set_learning_rate(self.optimizer, rate)
        trajectory = without_stale_columns(trajectory)
        self.steps_seen += trajectory.num_rows * trajectory.num_steps
        taken = [self._step(trajectory)]
        if config.replay_ratio:
            self.replay.add(trajectory)
        replays = 0
        if config.replay_ratio and self.steps_seen >= config.learning_starts:
            replays = int(torch.poisson(torch.tensor(config.replay_ratio), generator=self.generator))
        for _ in range(replays):
            taken.append(self._step(self.replay.sample(self.num_environments, generator=self.generator)))
        found = combine_metrics(taken)
        return found | {"replay/updates": float(replays), "replay/segments": float(len(self.replay))}

    def state_dict(self) -> dict[str, Any]:
        """Weights, average, optimizer, replay, steps and random state."""
        return {
            "policy": self.policy.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "replay": self.replay.state_dict(),
            "steps_seen": self.steps_seen,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.policy.load_state_dict(state["policy"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.replay.load_state_dict(state["replay"])
        self.steps_seen = int(state["steps_seen"])
        self.generator.set_state(state["generator"])

    def _step(self, trajectory: Trajectory) -> dict[str, float]:
        """One optimizer step, and the average policy's after it."""
        config, network = self.config, self.policy.network
        tables, next_values = self._judge(trajectory)
        loss, found = acer_loss(tables, trajectory, config, next_values=next_values)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = guarded_step(
            self.optimizer, float(loss.detach()), max_norm=config.max_gradient_norm, where=f"step {self.steps_seen}"
        )
        if self.average is not None:
            follow(self.average.actor.parameters(), network.actor.parameters(), share=1 - config.average_decay)
        names, values = list(found), torch.stack([value.detach().float() for value in found.values()]).tolist()
        return dict(zip(names, values, strict=True)) | {"gradient_norm": norm}

    def _judge(self, trajectory: Trajectory) -> tuple[ActionTables, Tensor]:
        """Tables of every step, and `V(s_{t+1})` `[B, T]`: of the next step, or of what followed the last one."""
        observations, following = trajectory.observations, trajectory.next_observations
        assert observations is not None
        assert following is not None
        logprobs, action_values = self.policy.tables(observations)
        with torch.no_grad():
            values = (logprobs.exp() * action_values).sum(-1)
            next_values = torch.cat([values[:, 1:], self.policy.values(following[:, -1]).unsqueeze(1)], 1)
            if trajectory.truncated.any():
                next_values[trajectory.truncated] = self.policy.values(following[trajectory.truncated])
            average = None
            if self.average is not None:
                average = torch.log_softmax(self.average.actor(self.policy.vectors(observations)), -1).flatten(0, 1)
        return ActionTables(logprobs.flatten(0, 1), action_values.flatten(0, 1), average), next_values


def without_stale_columns(trajectory: Trajectory) -> Trajectory:
    """What a replay keeps: without what only the policy that played knew of values and states of memory."""
    zeros = torch.zeros_like(trajectory.rewards)
    return trajectory.with_fields(values=zeros, next_values=zeros, state=None, policy_version=None)
