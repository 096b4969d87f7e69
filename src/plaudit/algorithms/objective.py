"""The loss of an optimizer step as a pure function of what the policy says now and what was prepared."""

from typing import NamedTuple

import torch
from torch import Tensor

from plaudit.algorithms.targets import actions_mask
from plaudit.configs.algorithm import AlgorithmSettings
from plaudit.core.dpo import group_dpo_loss
from plaudit.core.kl import KL_ESTIMATORS
from plaudit.core.masked import masked_mean
from plaudit.core.policy_losses import (
    actor_critic_loss,
    answer_logprobs,
    clipped_surrogate_loss,
    entropy_bonus,
    kl_penalised_surrogate_loss,
    policy_gradient_loss,
    ratio_metrics,
    truncated_importance_weights,
)
from plaudit.core.reduction import Metrics, expect_shape, reduce_steps, step_weights
from plaudit.core.value_losses import clipped_value_loss, squared_value_loss
from plaudit.rollout.trajectory import Evaluation, Trajectory

_NEVER = float("inf")


class Rows(NamedTuple):
    """Rows of a prepared batch, all `[b, T]` or `[b, 1]` where an action is a whole answer.

    The weights belong to the whole optimizer step, so that the losses of its micro-batches add up.

    Attributes:
        trajectory: the rows.
        advantages: of each action, `[b, T]` or `[b, 1]`.
        returns: `[b, T]`.
        action_weights: like `advantages`.
        step_weights: `[b, T]`, for entropies.
        value_weights: `[b, T]`, for errors of values.
    """

    trajectory: Trajectory
    advantages: Tensor
    returns: Tensor
    action_weights: Tensor
    step_weights: Tensor
    value_weights: Tensor

    def select(self, rows: Tensor) -> "Rows":
        """Some of the rows, with the weights that they have in the whole."""
        return Rows(self.trajectory.select(rows), *(tensor[rows] for tensor in self[1:]))


class Coefficients(NamedTuple):
    """What changes from update to update: `β` to the reference, that of `KL(π_old‖π_θ)`, and how wide the clip is."""

    kl: float
    old_kl: float
    clip_scale: float


def weigh_rows(trajectory: Trajectory, advantages: Tensor, returns: Tensor, settings: AlgorithmSettings) -> Rows:
    """The rows of one optimizer step with the weight of each step in its loss."""
    mask, dtype = trajectory.mask, trajectory.rewards.dtype
    value_weights = step_weights(actions_mask(mask, settings.view), "per_token", dtype=dtype)
    options = {"group_ids": trajectory.group_ids, "dtype": dtype}
    if settings.view == "token":
        weights = step_weights(mask, settings.reduction, **options)  # type: ignore[arg-type]
        return Rows(trajectory, advantages, returns, weights, weights, value_weights)
    answers = mask.any(1, keepdim=True)
    weights = step_weights(answers, settings.reduction, **options)  # type: ignore[arg-type]
    spread = weights.expand(mask.shape).masked_fill(~mask, 0.0)
    return Rows(trajectory, advantages.sum(1, keepdim=True), returns, weights, spread, value_weights)


def step_loss(
    evaluation: Evaluation, rows: Rows, settings: AlgorithmSettings, coefficients: Coefficients
) -> tuple[Tensor, Metrics]:
    """`-(L_RL - β_old KL(π_old‖π_θ) - β KL_ref - c₁ L_V + c₂ H)`, every term reduced by the weights of the rows.

    Args:
        evaluation: what the policy says of the rows now, `[b, T]`.
        rows: from `weigh_rows`, or some of them.
        settings: which surrogate, view and divergence.
        coefficients: as they are in this update.

    Returns:
        the scalar loss, and metrics by the names under which they are logged.

    Raises:
        ValueError: if the evaluation is not `[b, T]`.
    """
    mask = rows.trajectory.mask
    for name, tensor in evaluation._asdict().items():
        expect_shape(name, tensor, tuple(mask.shape))
    actions = _Actions.of(evaluation.logprobs, rows.trajectory, settings)
    preference: Metrics = {}
    importance = None
    if settings.importance_cap is not None:
        log_ratios = actions.old - actions.behaviour
        importance = truncated_importance_weights(log_ratios, actions.mask, maximum=settings.importance_cap)
    if settings.surrogate == "preference":
        policy_loss, found, preference = _preference(actions, rows, coefficients)
    else:
        policy_loss, found = _surrogate(actions, rows, settings, coefficients, importance)
    metrics = {"policy/loss": policy_loss.detach()}
    metrics |= {f"policy/{name}": found[name] for name in _LOGGED}
    metrics |= {f"preference/{name}": value for name, value in preference.items()}
    metrics["policy/entropy"] = masked_mean(evaluation.entropy.detach(), mask)
    if settings.importance_cap is not None:
        metrics |= _importance_metrics(actions, settings.importance_cap)
    bonus = settings.entropy_coefficient
    divergence = value_loss = None
    # With pairs the coefficient is inside their loss.
    in_loss = settings.kl_placement == "loss" and settings.surrogate != "preference"
    kl_coefficient = coefficients.kl if in_loss else 0.0
    if kl_coefficient:
        per_action = KL_ESTIMATORS[settings.kl_estimator](actions.logprobs, actions.reference)
        # It is estimated from the same samples as the rest, so it is weighed as they are.
        per_action = per_action if importance is None else per_action * importance
        divergence = reduce_steps(per_action, actions.mask, rows.action_weights)
        metrics["policy/kl_loss"] = divergence.detach()
    if settings.baseline == "value":
        value_loss, found = value_error(evaluation.values, rows, settings)
        metrics |= found
    loss = actor_critic_loss(
        policy_loss,
        kl=divergence,
        kl_coefficient=kl_coefficient,
        value_loss=value_loss,
        value_coefficient=settings.value_coefficient,
        entropy=entropy_bonus(evaluation.entropy, mask, reduction=rows.step_weights) if bonus else None,
        entropy_coefficient=bonus,
    )
    return loss, metrics


_LOGGED = ("approximate_kl", "clip_fraction", "ratio_mean", "ratio_min", "ratio_max")


class _Actions(NamedTuple):
    """Log-probabilities of actions, `[b, T]` or `[b, 1]`: for the surrogate (perhaps per token), and as they are."""

    surrogate: Tensor
    old_surrogate: Tensor
    logprobs: Tensor
    old: Tensor
    reference: Tensor
    behaviour: Tensor
    mask: Tensor

    @classmethod
    def of(cls, logprobs: Tensor, trajectory: Trajectory, settings: AlgorithmSettings) -> "_Actions":
        mask = trajectory.mask
        tables = (logprobs, trajectory.old_logprobs, trajectory.reference_logprobs, trajectory.behaviour_logprobs)
        if settings.view == "token":
            new, old, reference, behaviour = (table.masked_fill(~mask, 0.0) for table in tables)
            return cls(new, old, new, old, reference, behaviour, mask)
        new, old, reference, behaviour = (answer_logprobs(table, mask)[0] for table in tables)
        rows = mask.any(1, keepdim=True)
        if not settings.normalise_lengths:
            return cls(new, old, new, old, reference, behaviour, rows)
        lengths = mask.sum(1, keepdim=True).clamp_min(1)
        return cls(new / lengths, old / lengths, new, old, reference, behaviour, rows)


def _importance_metrics(actions: _Actions, cap: float) -> Metrics:
    """Of `π_old/μ`: its mean, about 1 where μ covers the policy, and the share of actions above the cap."""
    ratios = (actions.old - actions.behaviour).exp()
    capped = (ratios > cap).to(ratios.dtype)
    return {
        "policy/importance_mean": masked_mean(ratios, actions.mask),
        "policy/importance_capped": masked_mean(capped, actions.mask),
    }


def _surrogate(
    actions: _Actions,
    rows: Rows,
    settings: AlgorithmSettings,
    coefficients: Coefficients,
    importance: Tensor | None,
) -> tuple[Tensor, Metrics]:
    if settings.surrogate == "policy_gradient":
        loss, _ = policy_gradient_loss(
            actions.surrogate,
            rows.advantages,
            actions.mask,
            reduction=rows.action_weights,
            importance_weights=importance,
        )
        metrics = ratio_metrics(actions.surrogate, actions.old_surrogate, actions.mask)
        return loss, metrics | {"clip_fraction": torch.zeros_like(loss.detach())}
    scale = coefficients.clip_scale
    clipped = settings.surrogate != "kl"
    low, high = (settings.clip_low * scale, settings.clip_high * scale) if clipped else (_NEVER, _NEVER)
    tables = (actions.surrogate, actions.old_surrogate, rows.advantages, actions.mask)
    if settings.surrogate == "clip":
        return clipped_surrogate_loss(
            *tables,
            reduction=rows.action_weights,
            clip_low=low,
            clip_high=high,
            dual_clip=settings.dual_clip,
            importance_weights=importance,
        )
    return kl_penalised_surrogate_loss(
        *tables,
        kl_coefficient=coefficients.old_kl,
        reduction=rows.action_weights,
        clip_low=low,
        clip_high=high,
        dual_clip=settings.dual_clip,
        importance_weights=importance,
    )


def _preference(actions: _Actions, rows: Rows, coefficients: Coefficients) -> tuple[Tensor, Metrics, Metrics]:
    """The loss of all pairs of a prompt's answers; ratios as every algorithm logs them; what is known of the pairs.

    `rows` hold whole groups: see `whole_groups` of `plaudit.algorithms.minibatches.micro_batches`.
    """
    group_ids = rows.trajectory.group_ids
    if group_ids is None:
        raise ValueError("dpo compares the answers to a prompt: trajectory.group_ids is None")
    tables = (actions.logprobs, actions.reference, rows.advantages, rows.action_weights)
    logprobs, reference, rewards, weights = (table.squeeze(1) for table in tables)
    loss, preference = group_dpo_loss(logprobs, reference, rewards, group_ids, weights, coefficient=coefficients.kl)
    ratios = ratio_metrics(actions.logprobs, actions.old, actions.mask)
    return loss, ratios | {"clip_fraction": torch.zeros_like(loss.detach())}, preference


def value_error(values: Tensor, rows: Rows, settings: AlgorithmSettings) -> tuple[Tensor, Metrics]:
    """`L_V`, the squared error of the learned value, perhaps clipped, by the weights of the rows; without c₁.

    Args:
        values: `[b, T]`, what the critic says now.
        rows: from `weigh_rows`, or some of them.
        settings: view and clip.

    Returns:
        the scalar loss, and `value/loss`, `value/explained_variance`, `value/mean`, `value/mean_return`.
    """
    mask = actions_mask(rows.trajectory.mask, settings.view)
    if settings.value_clip is None:
        loss, found = squared_value_loss(values, rows.returns, mask, reduction=rows.value_weights)
    else:
        loss, found = clipped_value_loss(
            values, rows.trajectory.values, rows.returns, mask, clip=settings.value_clip, reduction=rows.value_weights
        )
    return loss, {
        "value/loss": loss.detach(),
        "value/explained_variance": found["explained_variance"],
        "value/mean": found["mean_value"],
        "value/mean_return": found["mean_return"],
    }
