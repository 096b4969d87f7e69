"""Q-learning on text with a value for every token of the vocabulary: the hard backup and the soft one."""

from typing import Any

import torch
from torch import Tensor

from plaudit.algorithms.followed_heads import FollowedHeads
from plaudit.configs.q_learning import HeadQConfig
from plaudit.core.q_learning import bootstrapped_targets, greedy_values, soft_values
from plaudit.core.reduction import step_weights
from plaudit.core.value_losses import huber_td_loss
from plaudit.models.q_heads import QHeads
from plaudit.rollout.trajectory import Trajectory


class HeadQ:
    """Fits `Q(s, ·) = W_q h(s)` on states that stay as they are, by steps of Adam.

        y_t = r_t + γ c_t V⁻(s_{t+1}),   ℓ = mean_t huber(Q(s_t, a_t) - y_t),   c_t = 0 at the end of an answer
        hard:  V⁻(s) = max_a Q⁻(s, a)                              (Mnih et al. 2015)
        soft:  V⁻(s) = β log Σ_a π_ref(a|s) exp(Q⁻(s, a) / β)      (arXiv:1702.08165, equations 5 and 6)
    Whatever wrote the answers, with full coverage the hard values are those of the best answer, `V(x) = max_y r(x, y)`,
    as if there were no penalty, and `π ∝ π_ref exp(Q/β)` of the soft ones is the optimum of the penalised reward:
    `plaudit.models.q_heads.with_action_values` makes it a language model. The greedy policy of the hard ones is its
    limit for a large scale. On text as in Guo et al. (arXiv:2106.07704).

    Departures: a reference in the place of the uniform policy; heads that are one matrix on frozen states. `SoftQ` has
    the soft optimum without anything of the vocabulary's size; this is for answers that were recorded, and for
    comparing the two backups. The value head of `QHeads` is not used.

    Attributes:
        config: every option.
        learned: `θ`, `θ⁻` and their optimizer.
    """

    def __init__(self, config: HeadQConfig, heads: QHeads, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Learn these heads; Adam with the configured rate where no optimizer is given."""
        self.config = config
        self.learned = FollowedHeads(heads, optimizer, learning_rate=config.learning_rate)

    def update(
        self,
        states: Tensor,
        next_states: Tensor,
        trajectory: Trajectory,
        *,
        next_reference_logprobs: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> dict[str, float]:
        """One optimizer step on answers, whoever wrote them.

        Args:
            states, next_states: `[B, T, H]`, before and after each step; what stands after an end does not matter.
            trajectory: `[B, T]`; its actions, rewards, `continues` and mask are read.
            next_reference_logprobs: `[B, T, A]`, `log π_ref` in the next states; needed for the soft backup alone.
            weights: `[B, T]` of each step in the loss; None for the mean over steps.

        Raises:
            NonFiniteError: if the loss is not finite; the weights have not been moved.
            ValueError: if the soft backup is given no reference, or the hard one is.
        """
        config, mask = self.config, trajectory.mask
        if (next_reference_logprobs is None) == (config.backup == "soft"):
            raise ValueError(f"backup: {config.backup}: the soft backup, and it alone, needs next_reference_logprobs")
        with torch.no_grad():
            judged = self.learned.target.action_values(next_states)
            if next_reference_logprobs is None:
                following = greedy_values(judged)
            else:
                following = soft_values(judged, next_reference_logprobs, coefficient=config.kl_coefficient)
        loss, metrics = huber_td_loss(
            self.learned.heads.chosen(states, trajectory.actions),
            bootstrapped_targets(trajectory.rewards, following, config.discount * trajectory.continues),
            mask,
            threshold=config.huber_threshold,
            reduction=step_weights(mask, "per_token", dtype=states.dtype) if weights is None else weights,
        )
        self.learned.step(loss, share=config.polyak, where="Q-learning with a head")
        found = {f"value/{name}": float(metrics[name]) for name in ("absolute_error", "mean_value")}
        return {"value/loss": float(loss.detach())} | found

    def state_dict(self) -> dict[str, Any]:
        """Both heads and the optimizer."""
        return self.learned.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.learned.load_state_dict(state)
