"""Feudal networks on text: the policy-gradient family as the worker, and a manager that sets a goal every c tokens.

With `s_t` the manager's view of the state that predicts token t, goals `g_k` set at the tokens `k c` of an answer
(`plaudit.models.goals`) and `n` tokens in the answer:

- worker: whatever the configuration's options say, on `r + α r^I`, `r^I_t = (1/c) d_cos(s_{t+1} - s_{kc}, g_k)`:
  equation 8 of Vezhnevets et al. (arXiv:1703.01161) with a goal every c tokens in the place of every token;
- manager (equation 7): `-A^M_k d_cos(s_{e} - s_{kc}, g_k)`, `e = min((k + 1) c, n - 1)`, `A^M_k = R_k - V^M(s_{kc})`,
  `R_k` the return of the rewards alone, with the penalty towards the reference where that is charged in the reward.

The state behind an answer's last token is never computed, so that token pays no intrinsic reward, and the last goal is
judged by the state before it; a goal set at the last token is judged by nothing. The manager takes its step after the
worker's, with the same optimizer; both have a limit of their own on the norm of the gradient. What a step of the
manager does to the worker's words is not bounded by the worker's clip.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from plaudit.algorithms.base import Prepared
from plaudit.algorithms.minibatches import micro_batches
from plaudit.algorithms.stepping import guarded_step
from plaudit.algorithms.targets import penalised_rewards
from plaudit.algorithms.updating import PolicyGradient, take_steps
from plaudit.configs.feudal import FeudalTextConfig
from plaudit.core.hierarchy_losses import goal_direction_loss, intrinsic_rewards
from plaudit.core.masked import masked_mean
from plaudit.core.reduction import Metrics
from plaudit.core.returns import discounted_returns
from plaudit.core.value_losses import squared_value_loss
from plaudit.models.goals import GoalHeads
from plaudit.rollout.trajectory import Policy, Trajectory


class StatesPolicy(Policy, Protocol):
    """A language model as a policy, which shows the states that predict its tokens."""

    def states(self, trajectory: Trajectory) -> Tensor:
        """`[B, T, H]` without gradient, 0 at masked steps."""

    @property
    def goals(self) -> GoalHeads:
        """Its manager.

        Raises:
            ValueError: if it has none.
        """


class FeudalText:
    """Satisfies `plaudit.algorithms.base.Algorithm`.

    Attributes:
        config: its options, the worker's among them.
        policy: a language model with a manager.
        worker: learns the language model, the embedding of goals, and a critic where its baseline is one.
    """

    def __init__(
        self,
        config: FeudalTextConfig,
        policy: StatesPolicy,
        optimizer: torch.optim.Optimizer,
        *,
        max_gradient_norm: float | None = None,
        total_updates: int | None = None,
    ) -> None:
        """See `plaudit.algorithms.build.build_algorithm`."""
        self.config, self.policy, self.optimizer = config, policy, optimizer
        self.worker = PolicyGradient(
            config, policy, optimizer, max_gradient_norm=max_gradient_norm, total_updates=total_updates
        )
        self.needs_critic, self.needs_groups = self.worker.needs_critic, self.worker.needs_groups
        self.needs_greedy = self.worker.needs_greedy
        if policy.goals.horizon != config.horizon:
            raise ValueError(f"the manager sets a goal every {policy.goals.horizon} tokens, not {config.horizon}")

    def prepare(self, trajectory: Trajectory, *, baselines: Tensor | None = None) -> Prepared:
        """The worker's targets with intrinsic rewards in them, and the manager's states and returns as columns.

        Raises:
            ValueError, NonFiniteError: see `PolicyGradient.prepare`.
        """
        heads, mask = self.policy.goals, trajectory.mask
        own = torch.arange(0, trajectory.num_steps, heads.horizon, device=mask.device)
        states, arrivals, intrinsic = self._levels(trajectory, own)
        in_reward = self.worker.kl_coefficient if self.worker.settings.kl_placement == "reward" else 0.0
        rewards = penalised_rewards(trajectory, coefficient=in_reward, estimator=self.worker.settings.kl_estimator)
        returns = manager_returns(rewards, mask, horizon=heads.horizon, discount=self.config.manager_discount)
        paid = trajectory.with_fields(rewards=trajectory.rewards + self.config.intrinsic_weight * intrinsic)
        prepared = self.worker.prepare(paid, baselines=baselines)
        prepared.columns.update(manager_states=states, manager_arrivals=arrivals, manager_returns=returns)
        prepared.metrics["worker/intrinsic_reward"] = float(masked_mean(intrinsic, mask))
        return prepared

    def minibatches(self, prepared: Prepared, generator: torch.Generator | None = None) -> list[Tensor]:
        """Row indices of every optimizer step, see `PolicyGradient.minibatches`."""
        return self.worker.minibatches(prepared, generator)

    def step(self, prepared: Prepared, rows: Tensor) -> dict[str, float]:
        """One step of the worker and one of the manager on these rows `[n]` int64.

        Raises:
            NonFiniteError: if a loss or a gradient is not finite; the weights of that level have not been moved.
        """
        found = self.worker.step(prepared, rows)
        rows = rows.to(prepared.advantages.device)
        columns = {name: tensor[rows] for name, tensor in prepared.columns.items()}
        heads = self.policy.goals
        loss, metrics = manager_loss(heads, columns, prepared.trajectory.mask[rows], config=self.config)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        # Only the manager has gradients now, and an optimizer leaves alone what has none.
        where = f"update {self.worker.num_updates}, manager"
        guarded_step(self.optimizer, float(loss.detach()), max_norm=self.worker.max_gradient_norm, where=where)
        return found | {f"manager/{name}": float(value) for name, value in metrics.items()}

    def stop_early(self, metrics: dict[str, float]) -> bool:
        """Whether the worker wants no further step on this batch."""
        return self.worker.stop_early(metrics)

    def finish(self, metrics: dict[str, float]) -> dict[str, float]:
        """Adapt the worker's coefficients."""
        return self.worker.finish(metrics)

    def update(
        self, trajectory: Trajectory, *, baselines: Tensor | None = None, generator: torch.Generator | None = None
    ) -> dict[str, float]:
        """Every step on one batch of experience; see `PolicyGradient.update`."""
        return take_steps(self, self.prepare(trajectory, baselines=baselines), generator)

    def state_dict(self) -> dict[str, Any]:
        """The worker's numbers; the manager's weights are the policy's."""
        return self.worker.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.worker.load_state_dict(state)

    @torch.no_grad()
    def _levels(self, trajectory: Trajectory, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States in which goals are set and those where they led, `[B, K, H]`, and `r^I [B, T]`, in micro-batches.

        Args:
            trajectory: `B` answers.
            own: `[K]` int64, the steps at which the manager sets goals.
        """
        heads, found = self.policy.goals, list[tuple[Tensor, ...]]()
        parts = micro_batches(self.policy, trajectory)
        for part in parts:
            states, mask = self.policy.states(trajectory.select(part)), trajectory.mask[part]
            last = mask.sum(1, keepdim=True) - 1
            left = states[:, own]
            ended = (own + heads.horizon).minimum(last).unsqueeze(2).expand_as(left)
            goals = heads.unroll(left).goals
            found.append((left, states.gather(1, ended), _intrinsic(heads.latent(states), goals, mask, heads.horizon)))
        order = torch.cat(parts).argsort()
        left, arrivals, intrinsic = (torch.cat(tables)[order] for tables in zip(*found, strict=True))
        return left, arrivals, intrinsic.to(trajectory.rewards.dtype)


def _intrinsic(latent: Tensor, goals: Tensor, mask: Tensor, horizon: int) -> Tensor:
    """`r^I [B, T]` of latent states `[B, T, D]` and goals `[B, K, D]`, 0 at the last token of each answer.

    `intrinsic_rewards` over the goals of every step, those that were not set being 0, is the sum with one term.
    """
    every = torch.zeros_like(latent)
    every[:, ::horizon] = goals
    front = latent.new_zeros(len(latent), horizon - 1, latent.shape[2])
    episodes = torch.zeros(mask.shape, dtype=torch.int64, device=mask.device)
    nothing = episodes.new_full((len(mask), horizon - 1), -1)
    found = intrinsic_rewards(
        torch.cat([latent[:, 1:], latent[:, -1:]], 1),
        torch.cat([front, latent], 1),
        torch.cat([front, every], 1),
        torch.cat([nothing, episodes], 1),
        horizon=horizon,
    )
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)
    return found.masked_fill(~following, 0.0)


def manager_returns(rewards: Tensor, mask: Tensor, *, horizon: int, discount: float) -> Tensor:
    """`R_k = Σ_{j ≥ k} γ^{j-k} Σ_{t = jc}^{(j+1)c-1} r_t`, what is earned from a goal on; `[B, K]`, `K = ⌈T / c⌉`.

    Args:
        rewards: `[B, T]`, 0 at masked steps.
        mask: `[B, T]` bool, the first steps of each row.
        horizon: `c`.
        discount: `γ` of a step of the manager.
    """
    spare = -rewards.shape[1] % horizon
    by_goal = torch.nn.functional.pad(rewards, (0, spare)).reshape(len(rewards), -1, horizon).sum(2)
    set_ones = mask[:, ::horizon]
    going_on = torch.cat([set_ones[:, 1:], torch.zeros_like(set_ones[:, :1])], 1).to(rewards.dtype)
    nothing = torch.zeros_like(by_goal)
    return discounted_returns(by_goal, nothing, going_on, torch.zeros_like(set_ones), set_ones, discount=discount)


def manager_loss(
    heads: GoalHeads, columns: dict[str, Tensor], mask: Tensor, *, config: FeudalTextConfig
) -> tuple[Tensor, Metrics]:
    """Transition policy gradient and squared error of the manager's value, on `[B, K]` goals.

    Args:
        heads: the manager, whose loss reaches nothing else.
        columns: `manager_states` and `manager_arrivals` `[B, K, H]`, `manager_returns` `[B, K]`.
        mask: `[B, T]` bool, the tokens.
        config: horizon and weights.

    Returns:
        the scalar loss, and `loss`, `goal_cosine`, `value_loss`, `explained_variance`.
    """
    set_ones = mask[:, :: config.horizon]
    places = torch.arange(set_ones.shape[1], device=mask.device) * config.horizon
    judged = set_ones & (places + 1 < mask.sum(1, keepdim=True))
    found, returns = heads.unroll(columns["manager_states"]), columns["manager_returns"].float()
    with torch.no_grad():
        transitions = heads.latent(columns["manager_arrivals"]) - found.states
    direction, met = goal_direction_loss(
        transitions, found.goals, returns - found.values.detach(), judged, reduction="per_token"
    )
    error, value_metrics = squared_value_loss(found.values, returns, set_ones)
    return direction + config.manager_value_coefficient * error, {
        "loss": direction.detach(),
        "goal_cosine": met["goal_cosine"],
        "value_loss": error.detach(),
        "explained_variance": value_metrics["explained_variance"],
    }
