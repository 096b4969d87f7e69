"""From rewards to advantages: the penalty inside the reward, and every baseline, for both views of an action.

With the view `token` each counted step is an action, `G_t = r_t + γ G_{t+1}`. With the view `answer` a whole row is
one action, written at its first counted step, `G = Σ_t γ^t r_t`. Every baseline without a critic is
`A_t = G_t - b`, where b does not depend on the actions of its own row (`prompt_mean` apart), so no expected gradient
changes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from plaudit.configs.algorithm import GROUP_BASELINES, AlgorithmSettings, View
from plaudit.core.advantages import (
    GroupAdvantages,
    RunningMean,
    group_mean_advantages,
    group_standardised_advantages,
    leave_one_out_advantages,
)
from plaudit.core.kl import KL_ESTIMATORS
from plaudit.core.reduction import expect_shape
from plaudit.core.returns import discounted_returns, gae, n_step_returns
from plaudit.rollout.trajectory import Trajectory

_GROUP_ADVANTAGES = {
    "prompt_mean": group_mean_advantages,
    "leave_one_out": leave_one_out_advantages,
    "prompt_standardised": group_standardised_advantages,
}


class Targets(NamedTuple):
    """`advantages [B, T]` and `returns [B, T]`, 0 where no action begins; `usable [B]` bool, rows that say something.

    `running_mean` is the baseline after this batch.
    """

    advantages: Tensor
    returns: Tensor
    usable: Tensor
    running_mean: RunningMean


def penalised_rewards(trajectory: Trajectory, *, coefficient: float, estimator: str) -> Tensor:
    """`r̃_t = r_t - β k(log π_old(a_t|s_t), log π_ref(a_t|s_t))`, `[B, T]`, 0 at masked steps.

    With k1 the sum along an answer is `r - β log π_old(y)/π_ref(y)`, whose expectation is the objective. The value of
    k3 is as unbiased, but as a constant it fines what is rarer than in the reference, which makes it rarer still; so
    does k2.
    """
    rewards = trajectory.rewards.masked_fill(~trajectory.mask, 0.0)
    if coefficient == 0:
        return rewards
    divergence = KL_ESTIMATORS[estimator](trajectory.old_logprobs, trajectory.reference_logprobs)
    return rewards - coefficient * divergence.masked_fill(~trajectory.mask, 0.0)


def actions_mask(mask: Tensor, view: View) -> Tensor:
    """`[B, T]` bool, where an action begins: every counted step, or the first of each row."""
    return mask if view == "token" else mask & (mask.cumsum(1) == 1)


def estimate_targets(
    trajectory: Trajectory,
    rewards: Tensor,
    settings: AlgorithmSettings,
    *,
    running_mean: RunningMean,
    baselines: Tensor | None = None,
) -> Targets:
    """Advantages and returns of every action.

    Args:
        trajectory: `B` rows.
        rewards: `[B, T]`, with the penalty where it is placed there.
        settings: which baseline, view, γ, λ or n.
        running_mean: what the baseline `running_mean` was before this batch.
        baselines: `[B]`, the return of the greedy answer to each row's prompt, for the baseline `greedy`.

    Returns:
        the targets; not whitened.

    Raises:
        ValueError: if `baselines` is missing or not wanted, groups are not given, or rows are no whole answers where
            whole answers are compared.
    """
    mask = trajectory.mask
    actions = actions_mask(mask, settings.view)
    usable = mask.any(1)
    if (baselines is not None) != (settings.baseline == "greedy"):
        said = "were given" if baselines is not None else "are missing"
        raise ValueError(f"greedy baselines {said}, but the baseline is {settings.baseline}")
    if settings.baseline == "value" and settings.view == "token":
        advantages, returns = _critic_targets(trajectory, rewards, settings)
        return Targets(advantages, returns, usable, running_mean)
    if settings.view == "answer" or settings.baseline in (*GROUP_BASELINES, "greedy"):
        _require_answers(trajectory)
    nothing = torch.zeros_like(rewards)
    returns = discounted_returns(
        rewards, nothing, trajectory.continues, trajectory.truncated, mask, discount=settings.discount
    ).masked_fill(~actions, 0.0)
    answers = returns.masked_fill(~actions_mask(mask, "answer"), 0.0).sum(1)
    compared = nothing
    if settings.baseline in GROUP_BASELINES:
        found = _relative(trajectory, answers, usable, settings.baseline)
        usable = found.usable
        if settings.baseline == "prompt_standardised":
            advantages = found.advantages.unsqueeze(1).expand(mask.shape).masked_fill(~actions, 0.0)
            return Targets(advantages, returns, usable, running_mean)
        compared = (answers - found.advantages).masked_fill(~usable, 0.0).unsqueeze(1)
    elif settings.baseline == "value":
        compared = trajectory.values
    elif settings.baseline == "running_mean":
        compared = torch.full_like(rewards, running_mean.mean)
        running_mean = running_mean.updated(returns.flatten(), actions.flatten(), decay=settings.baseline_decay)
    elif baselines is not None:
        expect_shape("baselines", baselines, (trajectory.num_rows,))
        compared = baselines.to(rewards).unsqueeze(1)
    counted = actions & usable.unsqueeze(1)
    return Targets((returns - compared).masked_fill(~counted, 0.0), returns, usable, running_mean)


def _critic_targets(trajectory: Trajectory, rewards: Tensor, settings: AlgorithmSettings) -> tuple[Tensor, Tensor]:
    """Advantages and returns `[B, T]` by λ, or by n steps: `A = G⁽ⁿ⁾ - V`; returns perhaps by a λ of their own.

    While `V` is far from the mean return b, λ < 1 gives the step that is n before the end `λⁿ b` of it for nothing, so
    advantages say more of a token's place than of its worth; a critic that is taught by λ = 1 gets there sooner.
    Source: Yuan et al., "What's behind PPO's collapse in long-CoT?" (arXiv:2503.01491), sections 3 and 4.
    """
    ends = (trajectory.continues, trajectory.truncated, trajectory.mask)
    tables = (rewards, trajectory.values, trajectory.next_values, *ends)
    if settings.num_steps is None:
        advantages, returns = gae(*tables, discount=settings.discount, gae_lambda=settings.gae_lambda)
    else:
        returns = n_step_returns(
            rewards, trajectory.next_values, *ends, discount=settings.discount, num_steps=settings.num_steps
        )
        advantages = (returns - trajectory.values).masked_fill(~trajectory.mask, 0.0)
    if settings.critic_lambda is not None:
        _, returns = gae(*tables, discount=settings.discount, gae_lambda=settings.critic_lambda)
    return advantages, returns


def _relative(trajectory: Trajectory, answers: Tensor, usable: Tensor, baseline: str) -> GroupAdvantages:
    if trajectory.group_ids is None:
        raise ValueError(f"the baseline {baseline} compares the answers to a prompt: trajectory.group_ids is None")
    return _GROUP_ADVANTAGES[baseline](answers, trajectory.group_ids, usable)


def _require_answers(trajectory: Trajectory) -> None:
    """Every row is one answer: it ends at its last counted step and nowhere before."""
    mask = trajectory.mask
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    ends = mask & ((trajectory.continues == 0) | trajectory.truncated)
    wrong = (ends != last).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"row {wrong[0]} is not one whole answer (it ends before its last step, or not at all); use view: token "
            "with the baseline none, running_mean or value"
        )
