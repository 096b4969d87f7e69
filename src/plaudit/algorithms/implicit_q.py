"""Implicit (language) Q-learning: action values from recorded answers, without asking for one that was not recorded."""

from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.followed_heads import FollowedHeads
from plaudit.configs.q_learning import ImplicitQConfig
from plaudit.core.logprobs import token_logprobs
from plaudit.core.q_learning import bootstrapped_targets, expectile_loss
from plaudit.core.reduction import reduce_steps, step_weights
from plaudit.core.value_losses import squared_value_loss
from plaudit.models.q_heads import QHeads
from plaudit.rollout.trajectory import Trajectory


class ImplicitQ:
    """Fits `Q` and `V` on states that stay as they are, by steps of Adam.

        ℓ_V = mean_t |τ - 1[u < 0]| u²,  u = Q⁻(s_t, a_t) - V(s_t)          (arXiv:2110.06169, equation 5)
        ℓ_Q = mean_t (r_t + γ V(s_{t+1}) - Q(s_t, a_t))²                    (the same, equation 6)
        ℓ_C = -mean_t log softmax(Q(s_t, ·))_{a_t},  times its coefficient  (arXiv:2206.11871, section 4.2)
    With `τ = ½` and full coverage `V` and `Q` are those of the recorded behaviour, with `τ → 1` the hard optimum. The
    policy is `π ∝ π_b exp(κ (Q - V))`: `plaudit.models.q_heads.with_action_values` makes it a language model.

    Departures from ILQL: one Q instead of the smaller of two, heads that are one matrix on frozen states.

    Attributes:
        config: every option.
        learned: `θ`, `θ⁻` and their optimizer.
    """

    def __init__(self, config: ImplicitQConfig, heads: QHeads, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Learn these heads; Adam with the configured rate where no optimizer is given."""
        self.config = config
        self.learned = FollowedHeads(heads, optimizer, learning_rate=config.learning_rate)

    def update(
        self, states: Tensor, next_states: Tensor, trajectory: Trajectory, *, weights: Tensor | None = None
    ) -> dict[str, float]:
        """One optimizer step on recorded answers.

        Args:
            states, next_states: `[B, T, H]`, before and after each step; what stands after an end does not matter.
            trajectory: `[B, T]`; its actions, rewards, `continues` and mask are read.
            weights: `[B, T]` of each step in the losses; None for the mean over steps.

        Raises:
            NonFiniteError: if the loss is not finite; the weights have not been moved.
        """
        config, mask, actions = self.config, trajectory.mask, trajectory.actions
        reduction = step_weights(mask, "per_token", dtype=states.dtype) if weights is None else weights
        with torch.no_grad():
            following = self.learned.heads.values(next_states)
            judged = self.learned.target.chosen(states, actions)
        targets = bootstrapped_targets(trajectory.rewards, following, config.discount * trajectory.continues)
        chosen = self.learned.heads.chosen(states, actions)
        q_loss, _ = squared_value_loss(chosen, targets, mask, reduction=reduction)
        v_loss, metrics = expectile_loss(
            self.learned.heads.values(states), judged, mask, expectile=config.expectile, reduction=reduction
        )
        loss = q_loss + v_loss
        if config.conservative_coefficient:
            flat = states.flatten(0, -2)
            surprise = -token_logprobs(flat, self.learned.heads.weight, actions.flatten()).view(actions.shape)
            loss = loss + config.conservative_coefficient * reduce_steps(surprise, mask, reduction)
        self.learned.step(loss, share=config.polyak, where="implicit Q-learning")
        found = {"value/loss": float(v_loss.detach()), "value/q_loss": float(q_loss.detach())}
        return found | {f"value/{name}": float(value) for name, value in metrics.items()}

    def state_dict(self) -> dict[str, Any]:
        """Both heads and the optimizer."""
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.learned.load_state_dict(state)
