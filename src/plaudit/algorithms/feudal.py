"""Feudal networks: a manager that sets directions in a latent space, a worker that is paid for following them.

Vezhnevets et al., "FeUdal networks for hierarchical reinforcement learning" (arXiv:1703.01161):

- manager (equation 7): `∇g_t = A^M_t ∇_θ d_cos(s_{t+c} - s_t, g_t(θ))`, `A^M = R - V^M` of the rewards alone;
- intrinsic reward (8): `r^I_t = (1/c) Σ_{i=1}^c d_cos(s_t - s_{t-i}, g_{t-i})`;
- worker (section 3.3): actor-critic on `r + α r^I`, `A^D = R^D - V^D`, with a discount of its own.

The worker's gradient stops at the goals; the percept is shared and learns from both levels. Departures: λ-returns for
n-step returns; a goal whose horizon reaches beyond the episode or the data is judged by the last state there is;
advantages of each level are whitened over the batch, unless told otherwise; both losses are added up and take one step
of Adam (for RMSProp), with one limit on the norm; gradients through time end where the batch begins, after
`rollout_steps` (the paper's 400).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from plaudit.algorithms.base import TaskSizes
from plaudit.algorithms.stepping import guarded_step, scheduled_rate, set_learning_rate
from plaudit.configs.feudal import FeudalConfig
from plaudit.core.hierarchy_losses import goal_direction_loss, horizon_transitions, intrinsic_rewards
from plaudit.core.masked import masked_mean, masked_whiten
from plaudit.core.policy_losses import policy_gradient_loss
from plaudit.core.reduction import Metrics
from plaudit.core.returns import lambda_returns
from plaudit.core.value_losses import squared_value_loss
from plaudit.models.feudal import FeudalNetwork
from plaudit.rollout.control import observation_vectors
from plaudit.rollout.recurrent import RecurrentPolicy
from plaudit.rollout.trajectory import Trajectory, evaluation_of


class Feudal:
    """Satisfies `plaudit.algorithms.base.Agent`.

    Attributes:
        config: its options.
        policy: manager and worker, acting.
        num_environments, num_steps: `B` and `T` of a trajectory.
        num_updates: how many there were.
    """

    def __init__(self, config: FeudalConfig, sizes: TaskSizes, *, total_steps: int, seed: int = 0) -> None:
        self.config = config
        self.num_environments, self.num_steps = config.num_environments, config.rollout_steps
        self.network = FeudalNetwork(
            sizes.observation_size,
            sizes.num_actions,
            percept_size=config.percept_size,
            manager_size=config.manager_size,
            goal_size=config.goal_size,
            horizon=config.horizon,
            dilation=config.dilation,
            seed=seed,
        )
        self.policy = RecurrentPolicy(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=config.learning_rate, eps=1e-5)
        self.total_updates = max(total_steps // (self.num_environments * self.num_steps), 1)
        self.num_updates = 0

    def greedy_policy(self) -> RecurrentPolicy:
        """Acts by the worker's likeliest action, with a memory of its own."""
        return RecurrentPolicy(self.network, greedy=True)

    def update(self, trajectory: Trajectory) -> dict[str, float]:
        """One gradient step on `[B, T]` steps.

        Raises:
            NonFiniteError: if the loss or the gradient is not finite; the weights have not been moved.
            ValueError: if the trajectory lacks observations, next observations or the memory before its first step.
        """
        config = self.config
        rate = scheduled_rate(config.schedule, config.learning_rate, done=self.num_updates, total=self.total_updates)
        set_learning_rate(self.optimizer, rate)
        manager, worker, metrics = feudal_losses(self.policy, self.network, trajectory, config)
        loss = manager + worker
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        where = f"update {self.num_updates}"
        norm = guarded_step(self.optimizer, float(loss.detach()), max_norm=config.max_gradient_norm, where=where)
        self.num_updates += 1
        found = {name: float(value) for name, value in metrics.items()}
        return {"loss": float(loss.detach())} | found | {"gradient_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer and counter; memories go with the episodes, which cannot be saved."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, in new episodes."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.num_updates = int(state["num_updates"])
        self.policy.end_episodes(torch.ones(len(self.policy.memory(self.num_environments)), dtype=torch.bool))


class FeudalLosses(NamedTuple):
    """Scalars to be added up: the manager's loss, the worker's; and what to log."""

    manager: Tensor
    worker: Tensor
    metrics: Metrics


def feudal_losses(
    policy: RecurrentPolicy, network: FeudalNetwork, trajectory: Trajectory, config: FeudalConfig
) -> FeudalLosses:
    """Both levels' losses on `[B, T]` steps.

    Args:
        policy: acts by `network`.
        network: manager and worker.
        trajectory: with observations, next observations and `state`, the memory `[B, M]` before the first step.
        config: discounts and weights.

    Raises:
        ValueError: if one of those is missing.
    """
    outputs, following = policy.unroll(trajectory)
    assert trajectory.next_observations is not None
    with torch.no_grad():
        arrivals = network.latent_states(observation_vectors(trajectory.next_observations, network.observation_size))
    mask, ends = trajectory.mask, (trajectory.continues == 0) | trajectory.truncated
    breaks = (trajectory.continues, trajectory.truncated, mask)
    returns = lambda_returns(
        trajectory.rewards,
        following.manager_values,
        *breaks,
        discount=config.manager_discount,
        return_lambda=config.gae_lambda,
    )
    transitions = horizon_transitions(outputs.states.detach(), arrivals, ends, horizon=config.horizon)
    advantages = returns - outputs.manager_values.detach()
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    direction_loss, direction_metrics = goal_direction_loss(
        transitions, outputs.goals, advantages, mask, reduction="per_token"
    )
    manager_value_loss, manager_metrics = squared_value_loss(outputs.manager_values, returns, mask)
    manager = config.manager_coefficient * direction_loss + config.value_coefficient * manager_value_loss

    intrinsic = _intrinsic(network, trajectory, outputs, arrivals, ends)
    worker_returns = lambda_returns(
        trajectory.rewards + config.intrinsic_weight * intrinsic,
        following.values,
        *breaks,
        discount=config.discount,
        return_lambda=config.gae_lambda,
    )
    evaluation = evaluation_of(torch.log_softmax(outputs.logits, -1), trajectory.actions, outputs.values)
    advantages = worker_returns - evaluation.values.detach()
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    policy_loss, _ = policy_gradient_loss(evaluation.logprobs, advantages, mask, reduction="per_token")
    value_loss, value_metrics = squared_value_loss(evaluation.values, worker_returns, mask)
    entropy = masked_mean(evaluation.entropy, mask)
    worker = policy_loss + config.value_coefficient * value_loss - config.entropy_coefficient * entropy
    metrics = {
        "policy/loss": policy_loss.detach(),
        "policy/entropy": entropy.detach(),
        "value/loss": value_loss.detach(),
        "value/explained_variance": value_metrics["explained_variance"],
        "manager/loss": direction_loss.detach(),
        "manager/value_loss": manager_value_loss.detach(),
        "manager/explained_variance": manager_metrics["explained_variance"],
        "manager/goal_cosine": direction_metrics["goal_cosine"],
        "manager/goal_spread": _spread(outputs.goals.detach(), mask),
        "worker/intrinsic_reward": masked_mean(intrinsic, mask),
    }
    return FeudalLosses(manager, worker, metrics)


def _intrinsic(network: FeudalNetwork, trajectory: Trajectory, outputs: Any, arrivals: Tensor, ends: Tensor) -> Tensor:
    """`r^I [B, T]`, goals from before the first step included, as far as they belong to the same episode."""
    assert trajectory.state is not None
    earlier, before = network.horizon - 1, network.unpack(trajectory.state)
    ids = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1]], 1).long().cumsum(1)
    places = torch.arange(-earlier, 0)
    old = torch.where(places + before.age.unsqueeze(1) >= 0, 0, -1)
    recent = slice(network.horizon - earlier, None)
    return intrinsic_rewards(
        arrivals,
        torch.cat([before.states[:, recent], outputs.states.detach()], 1),
        torch.cat([before.goals[:, recent], outputs.goals.detach()], 1),
        torch.cat([old, ids], 1),
        horizon=network.horizon,
    )


def _spread(goals: Tensor, mask: Tensor) -> Tensor:
    """`1 - |mean goal|`: 0 where the manager always points the same way, 1 for all directions alike."""
    mean = (goals * mask.unsqueeze(-1)).sum((0, 1)) / mask.sum().clamp_min(1)
    return 1 - mean.square().sum().sqrt()
