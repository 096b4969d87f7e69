"""Losses of policies over trajectories `[B, T]`: policy gradient, clipped and KL-penalised surrogates, the PPO sum.

Losses take log-probabilities, never models. Advantages and old log-probabilities are constants: gradients into them are
cut here. Whatever stands at masked steps, NaN included, never matters. A loss is minimised: minus the objective.

**The whole answer as one action** is the same mathematics with T = 1: `answer_logprobs` sums (or averages) the tokens
of each row to `[B, 1]`, and every loss here takes that, with advantages `[B, 1]`.
"""

import math

import torch
from torch import Tensor

from plaudit.core.kl import KL_ESTIMATORS
from plaudit.core.masked import masked_mean
from plaudit.core.reduction import Metrics, Reduction, expect_shape, reduce_steps


def answer_logprobs(logprobs: Tensor, mask: Tensor, *, mean: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probability of each whole answer, `log π(y|x) = Σ_t log π(y_t|x, y_<t)`, and which answers count.

    Args:
        logprobs: `[B, T]`.
        mask: `[B, T]` bool.
        mean: divide by the number of counted tokens, the length-normalised ratio of GSPO (Zheng et al.,
            arXiv:2507.18071, equation 7).

    Returns:
        `[B, 1]` log-probabilities and the `[B, 1]` mask of rows with a counted token.

    Raises:
        ValueError: if shapes differ.
    """
    expect_shape("mask", mask, tuple(logprobs.shape))
    counts = mask.sum(1, keepdim=True)
    total = logprobs.masked_fill(~mask, 0.0).sum(1, keepdim=True)
    return total / counts.clamp_min(1) if mean else total, counts > 0


def truncated_importance_weights(log_ratios: Tensor, mask: Tensor, *, maximum: float, minimum: float = 0.0) -> Tensor:
    """`w = clip(exp(log_ratio), minimum, maximum)`, detached: a correction for samples of another policy.

    Source: Ionides, "Truncated importance sampling" (2008). Biased wherever it truncates, of bounded variance.

    Args:
        log_ratios: `[B, T]`, log-probability under the policy that is meant minus that of the sampler.
        mask: `[B, T]` bool.
        maximum: the largest weight; infinity for none.
        minimum: the smallest weight.

    Returns:
        `[B, T]`, without gradient; 0 at masked steps.

    Raises:
        ValueError: if shapes differ, or `minimum` is above `maximum`.
    """
    expect_shape("mask", mask, tuple(log_ratios.shape))
    if not 0 <= minimum <= maximum:
        raise ValueError(f"weights need 0 ≤ minimum ≤ maximum, got {minimum} and {maximum}")
    ratios = log_ratios.detach().masked_fill(~mask, 0.0).exp()
    return ratios.clamp(minimum, maximum).masked_fill(~mask, 0.0)


def ratio_metrics(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Metrics:
    """How far a policy has moved from the old one, by `ρ_t = π_θ / π_old`, without gradient.

    Args:
        logprobs, old_logprobs: `[B, T]`.
        mask: `[B, T]` bool.

    Returns:
        `num_steps`, `approximate_kl` (k3 of `KL(π_old‖π_θ)`), `ratio_mean`, `ratio_min`, `ratio_max`; ratios are 1
        where nothing counts.

    Raises:
        ValueError: if shapes differ.
    """
    log_ratios = _log_ratios(logprobs.detach(), old_logprobs, mask)
    ratios = log_ratios.exp()
    empty = ~mask.any()
    return {
        "num_steps": mask.sum(),
        "approximate_kl": masked_mean(torch.expm1(log_ratios) - log_ratios, mask),
        "ratio_mean": masked_mean(ratios, mask).masked_fill(empty, 1.0),
        "ratio_min": ratios.masked_fill(~mask, float("inf")).min().masked_fill(empty, 1.0),
        "ratio_max": ratios.masked_fill(~mask, float("-inf")).max().masked_fill(empty, 1.0),
    }


def policy_gradient_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reduction: Reduction,
    importance_weights: Tensor | None = None,
    group_ids: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """`ℓ_t = -w_t A_t log π(a_t|s_t)`, whose gradient is minus the policy gradient.

    With `reduction="sequence_sum"` and unbiased advantages the expected gradient is exactly `-∇J`.
    Source: Williams, "Simple statistical gradient-following algorithms" (1992); Sutton et al. (1999), theorem 1.

    Args:
        logprobs: `[B, T]`, of the policy that learns.
        advantages: `[B, T]`; gradients into them are cut.
        mask: `[B, T]` bool.
        reduction, group_ids, normaliser: see `plaudit.core.reduction.reduce_steps`.
        importance_weights: `[B, T]` or None, multiplied in as constants.

    Returns:
        the scalar loss, and the metric `num_steps`.

    Raises:
        ValueError: for shapes that do not fit.
    """
    advantages = _constant("advantages", advantages, logprobs, mask)
    if importance_weights is not None:
        advantages = advantages * _constant("importance_weights", importance_weights, logprobs, mask)
    per_step = -advantages * logprobs.masked_fill(~mask, 0.0)
    loss = reduce_steps(per_step, mask, reduction, group_ids=group_ids, normaliser=normaliser)
    return loss, {"num_steps": mask.sum()}


def clipped_surrogate_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reduction: Reduction,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
    group_ids: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """`ℓ_t = -w_t min(ρ_t A_t, clip(ρ_t, 1 - ε_low, 1 + ε_high) A_t)`, `ρ_t = π_θ / π_old`.

    With `dual_clip` c, `max(·, c A_t)` bounds the objective where `A_t < 0`.
    Source: Schulman et al., "Proximal policy optimization algorithms" (arXiv:1707.06347), equation 7; asymmetric clip:
    Yu et al., "DAPO" (arXiv:2503.14476); dual clip: Ye et al. (arXiv:1912.09729), equation 8.

    Args:
        logprobs: `[B, T]`, of the policy that learns.
        old_logprobs: `[B, T]`, recomputed by the training forward before the first update.
        advantages: `[B, T]`.
        mask: `[B, T]` bool.
        clip_low: `ε_low` in [0, 1], or infinity with `clip_high` infinity for no clip at all.
        clip_high: `ε_high`; None for `clip_low`.
        dual_clip: `c` above 1, or None.
        reduction, group_ids, normaliser: see `plaudit.core.reduction.reduce_steps`.
        importance_weights: `[B, T]` or None, multiplied in as constants, such as those for `π_old / μ`.

    Returns:
        the scalar loss, and the metrics `num_steps`, `clip_fraction` (where the clip changes the objective),
        `approximate_kl` (k3 of `KL(π_old‖π_θ)`), `ratio_mean`, `ratio_min`, `ratio_max`.

    Raises:
        ValueError: for shapes that do not fit, a negative clip or a `dual_clip` of at most 1.
    """
    high = clip_low if clip_high is None else clip_high
    if clip_low < 0 or high < 0:
        raise ValueError(f"clips must not be negative, got {clip_low} and {high}")
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    advantages = _constant("advantages", advantages, logprobs, mask)
    log_ratios = _log_ratios(logprobs, old_logprobs, mask)
    ratios = _bounded_ratios(log_ratios, advantages, high, dual_clip)
    plain = ratios * advantages
    objective = torch.minimum(plain, ratios.clamp(1 - clip_low, 1 + high) * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    metrics = ratio_metrics(logprobs, old_logprobs, mask)
    metrics["clip_fraction"] = masked_mean((objective != plain).detach().to(plain.dtype), mask)
    if importance_weights is not None:
        objective = objective * _constant("importance_weights", importance_weights, logprobs, mask)
    return reduce_steps(-objective, mask, reduction, group_ids=group_ids, normaliser=normaliser), metrics


def kl_penalised_surrogate_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    kl_coefficient: float,
    reduction: Reduction,
    kl_estimator: str = "k3",
    clip_low: float = float("inf"),
    clip_high: float | None = None,
    dual_clip: float | None = None,
    importance_weights: Tensor | None = None,
    group_ids: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """`ℓ_t = w_t (-ρ_t A_t + β KL(π_old‖π_θ)_t)`, without a clip unless one is given; with one it is "both".

    The divergence is estimated per token on the samples of `π_old`: k1 and k3 have the right gradient, k2 has not.
    Samples of another policy μ are weighed by `w = π_old / μ` in both terms, without which its mean would be another.
    Source: Schulman et al., arXiv:1707.06347, equation 8; `plaudit.core.kl.adaptive_kl_coefficient` adapts β.

    Args:
        logprobs, old_logprobs, advantages: `[B, T]`.
        mask: `[B, T]` bool.
        kl_coefficient: scalar `β`, not negative.
        kl_estimator: `k1`, `k2` or `k3`.
        clip_low, clip_high, dual_clip, importance_weights: as in `clipped_surrogate_loss`.
        reduction, group_ids, normaliser: see `plaudit.core.reduction.reduce_steps`.

    Returns:
        the scalar loss, and the metrics of `clipped_surrogate_loss` with `kl_penalty` (the reduced divergence,
        without β).

    Raises:
        ValueError: as `clipped_surrogate_loss`, for a negative `β` or an unknown estimator.
    """
    if kl_coefficient < 0:
        raise ValueError(f"kl_coefficient must not be negative, got {kl_coefficient}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator must be one of {', '.join(KL_ESTIMATORS)}, got {kl_estimator!r}")
    loss, metrics = clipped_surrogate_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        reduction=reduction,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        importance_weights=importance_weights,
        group_ids=group_ids,
        normaliser=normaliser,
    )
    log_ratios = _log_ratios(logprobs, old_logprobs, mask)
    per_step = KL_ESTIMATORS[kl_estimator](torch.zeros_like(log_ratios), log_ratios)
    if importance_weights is not None:
        per_step = per_step * _constant("importance_weights", importance_weights, logprobs, mask)
    penalty = reduce_steps(per_step, mask, reduction, group_ids=group_ids, normaliser=normaliser)
    return loss + kl_coefficient * penalty, metrics | {"kl_penalty": penalty.detach()}


def entropy_bonus(
    entropies: Tensor,
    mask: Tensor,
    *,
    reduction: Reduction,
    group_ids: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> Tensor:
    """The reduced entropy of the policy's distribution at each step, to be added to the objective.

    Args:
        entropies: `[B, T]` in nats.
        mask: `[B, T]` bool.
        reduction, group_ids, normaliser: see `plaudit.core.reduction.reduce_steps`.

    Returns:
        a scalar.
    """
    return reduce_steps(entropies, mask, reduction, group_ids=group_ids, normaliser=normaliser)


def actor_critic_loss(
    policy_loss: Tensor,
    *,
    kl: Tensor | None = None,
    kl_coefficient: float = 0.0,
    value_loss: Tensor | None = None,
    value_coefficient: float = 0.0,
    entropy: Tensor | None = None,
    entropy_coefficient: float = 0.0,
) -> Tensor:
    """Minus `L = L_RL - β KL - c₁ L_V + c₂ entropy`, where `policy_loss` is minus `L_RL`.

    A part whose coefficient is 0 is not computed into the graph, so a non-finite part with coefficient 0 is harmless.

    Args:
        policy_loss: scalar, minus the surrogate or policy-gradient objective.
        kl: scalar divergence (`KL(π_old‖π_θ)`, or one to the reference), or None.
        kl_coefficient: scalar `β`.
        value_loss: scalar, or None.
        value_coefficient: scalar `c₁`.
        entropy: scalar, or None.
        entropy_coefficient: scalar `c₂`.

    Returns:
        the scalar to minimise.

    Raises:
        ValueError: if a coefficient is not 0 and its part is missing, or a part is no scalar.
    """
    total = policy_loss
    parts = (
        ("kl", kl, kl_coefficient, 1.0),
        ("value_loss", value_loss, value_coefficient, 1.0),
        ("entropy", entropy, entropy_coefficient, -1.0),
    )
    expect_shape("policy_loss", policy_loss, ())
    for name, part, coefficient, sign in parts:
        if coefficient == 0:
            continue
        if part is None:
            raise ValueError(f"the coefficient of {name} is {coefficient}, but {name} was not given")
        expect_shape(name, part, ())
        total = total + sign * coefficient * part
    return total


def _constant(name: str, tensor: Tensor, logprobs: Tensor, mask: Tensor) -> Tensor:
    """A checked, detached `[B, T]` tensor with 0 at masked steps."""
    expect_shape("mask", mask, tuple(logprobs.shape))
    if logprobs.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"logprobs {tuple(logprobs.shape)} must be [B, T], the mask boolean, got {mask.dtype}")
    expect_shape(name, tensor, tuple(logprobs.shape))
    return tensor.detach().masked_fill(~mask, 0.0)


def _bounded_ratios(log_ratios: Tensor, advantages: Tensor, clip_high: float, dual_clip: float | None) -> Tensor:
    """`exp(log_ratio)`, cut off where the clip decides anyway: an infinite ratio has the gradient 0 · ∞ = NaN."""
    gain = math.log1p(clip_high) + 1
    loss = math.inf if dual_clip is None else math.log(dual_clip) + 1
    limit = torch.where(advantages < 0, loss, gain).to(log_ratios.dtype)
    return torch.minimum(log_ratios, limit).exp()


def _log_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """`log π_θ - log π_old`, 0 at masked steps; the gradient goes into `logprobs` alone."""
    expect_shape("old_logprobs", old_logprobs, tuple(logprobs.shape))
    return logprobs.masked_fill(~mask, 0.0) - old_logprobs.detach().masked_fill(~mask, 0.0)
