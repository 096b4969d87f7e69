"""Actor-critic with experience replay: importance weights that are truncated and made up for, and its trust region.

An estimate of the policy gradient at one state is written as a weight `w(a)` for each action,

    `g = Σ_a w(a) ∇ log π(a|s)`,

which is what sampled and summed terms have in common. Weights are constants: the gradient goes into `log π` alone.

**Penalties.** With a coefficient `β` the reward of a step holds `-β log π(a|s) / π_ref(a|s)`, of the policy as it is
now and not as it was when the step was sampled. `Q(s, a)` is what follows the choice of `a` without the penalty of that
choice itself; the utility `U(s, a) = Q(s, a) - β log π(a|s)/π_ref(a|s)` has it, and `V(s) = Σ_a π(a|s) U(s, a)`. The
penalty of a step is in no correction of Retrace (`U' - U` is `G - Q`), so `plaudit.core.returns.retrace` with these `V`
as `next_values` gives the targets of `Q` as it stands. `β = 0` is the paper's case.

Source: Wang et al., "Sample efficient actor-critic with experience replay" (arXiv:1611.01224).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from plaudit.core.masked import masked_mean
from plaudit.core.reduction import Metrics, Reduction, expect_shape, reduce_steps

_SMALLEST = -30.0  # log-probabilities below it count as it where 1/π is needed, so that nothing overflows

Statistics = Literal["probabilities", "logits"]
"""What describes the policy at a state where a step is projected: the paper's probabilities, or logits."""


class Utilities(NamedTuple):
    """`utilities [..., A]`, what each action is worth with its own penalty, and `values [...]`, their mean under π."""

    utilities: Tensor
    values: Tensor


def action_utilities(
    logprobs: Tensor,
    action_values: Tensor,
    reference_logprobs: Tensor | None = None,
    *,
    coefficient: float = 0.0,
) -> Utilities:
    """`U(s, a) = Q(s, a) - β log π(a|s)/π_ref(a|s)` and `V(s) = Σ_a π(a|s) U(s, a)`, an exact sum over all actions.

    Args:
        logprobs: `[..., A]`, of the policy as it is now; -inf for actions that are not allowed.
        action_values: `[..., A]`, `Q`.
        reference_logprobs: `[..., A]`; None where there is no penalty.
        coefficient: `β`.

    Returns:
        the utilities (0 for actions that are not allowed) and the values. Nothing is detached.

    Raises:
        ValueError: if shapes differ, or there is a penalty and no reference.
    """
    expect_shape("action_values", action_values, tuple(logprobs.shape))
    allowed = logprobs > float("-inf")
    utilities = action_values.masked_fill(~allowed, 0.0)
    if coefficient != 0:
        if reference_logprobs is None:
            raise ValueError(f"a penalty with coefficient {coefficient} needs reference_logprobs")
        expect_shape("reference_logprobs", reference_logprobs, tuple(logprobs.shape))
        ratio = logprobs.masked_fill(~allowed, 0.0) - reference_logprobs.masked_fill(~allowed, 0.0)
        utilities = utilities - coefficient * ratio
    return Utilities(utilities, (logprobs.exp() * utilities).sum(-1))


def corrected_score_weights(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    actions: Tensor,
    sampled_advantages: Tensor,
    advantages: Tensor,
    *,
    truncation: float,
) -> Tensor:
    """`w(a) = 1[a = a_t] min(c, ρ(a)) Â + [1 - c/ρ(a)]₊ π(a) A(a)`, `ρ = π/μ`: equations 7 and 9 of the paper.

    For `a_t ~ μ` and `Â = A(a_t)` the expectation is `π(a) A(a)` for **every** c, since
    `μ min(c, π/μ) + [π - c μ]₊ = π`: the sampled term has weights of at most c, and the sum makes up for what was cut.

    Args:
        logprobs: `[..., A]`, `log π`.
        behaviour_logprobs: `[..., A]`, `log μ`; **+inf where it was not kept** (a list of the likeliest tokens instead
            of the whole vocabulary): such an action gets no correction.
        actions: `[...]` int64, `a_t`; its behaviour log-probability has to be finite.
        sampled_advantages: `[...]`, `Â = Q^ret(s_t, a_t) - V(s_t)` (less the action's penalty).
        advantages: `[..., A]`, `A(a) = U(s_t, a) - V(s_t)` by the critic.
        truncation: `c ≥ 0`; infinity for importance sampling without a bound, 0 for the critic alone.

    Returns:
        `[..., A]`, without gradient.

    Raises:
        ValueError: for shapes that differ or a negative truncation.
    """
    shape = tuple(logprobs.shape)
    expect_shape("behaviour_logprobs", behaviour_logprobs, shape)
    expect_shape("advantages", advantages, shape)
    expect_shape("actions", actions, shape[:-1])
    expect_shape("sampled_advantages", sampled_advantages, shape[:-1])
    if not truncation >= 0:
        raise ValueError(f"truncation must not be negative, got {truncation}")
    own, behaviour = logprobs.detach(), behaviour_logprobs.detach()
    place = actions.unsqueeze(-1)
    ratios = (own.gather(-1, place) - behaviour.gather(-1, place)).exp().clamp(max=truncation)
    corrections = torch.zeros_like(own)
    if truncation < float("inf"):
        # π - c μ, so that π = 0 and μ = 0 need no special case; an unknown μ is larger than everything.
        missing = own.exp() - truncation * behaviour.exp()
        unknown = behaviour == float("inf")
        corrections = missing.masked_fill(unknown, 0.0).clamp(min=0.0) * advantages.detach()
    return corrections.scatter_add(-1, place, ratios * sampled_advantages.detach().unsqueeze(-1))


def trust_region_step(gradient: Tensor, divergence_gradient: Tensor, *, limit: float) -> Tensor:
    """`z = g - max(0, (k·g - δ) / ‖k‖²) k`: the nearest step to `g` with `k·z ≤ δ` (equations 11 and 12).

    Args:
        gradient: `[..., A]`, `g`, of the objective by the statistics of the policy at a state.
        divergence_gradient: `[..., A]`, `k = ∇ KL(π_average‖π)` by the same.
        limit: `δ ≥ 0`; infinity leaves `g` as it is.

    Returns:
        `[..., A]`; `g` where `k` is 0.

    Raises:
        ValueError: if shapes differ or the limit is negative.
    """
    expect_shape("divergence_gradient", divergence_gradient, tuple(gradient.shape))
    if not limit >= 0:
        raise ValueError(f"the limit of a trust region must not be negative, got {limit}")
    if limit == float("inf"):
        return gradient
    excess = ((divergence_gradient * gradient).sum(-1, keepdim=True) - limit).clamp(min=0.0)
    size = divergence_gradient.square().sum(-1, keepdim=True)
    return gradient - (excess / size.masked_fill(size == 0, 1.0)).masked_fill(size == 0, 0.0) * divergence_gradient


def trust_region_policy_loss(
    logprobs: Tensor,
    score_weights: Tensor,
    mask: Tensor,
    *,
    average_logprobs: Tensor | None = None,
    limit: float = float("inf"),
    statistics: Statistics = "probabilities",
    entropy_coefficient: float = 0.0,
    reduction: Reduction = "per_token",
) -> tuple[Tensor, Metrics]:
    """A loss whose gradient at each state is minus the projected step: `ℓ_t = -z_t · φ(s_t)`, `z_t` a constant.

    | statistics φ | `g` | `k = ∇_φ KL(π_average‖π)` |
    |---|---|---|
    | `probabilities` π (the paper) | `w / π` | `-π_average / π` |
    | `logits` | `w - π Σ_a w` | `π - π_average` |

    Without a limit both are `-Σ_a w(a) log π(a)`. With one, `logits` have bounded `k` whatever the vocabulary, and
    that is a departure. The entropy bonus is part of `g`, as in OpenAI's baselines; the paper leaves open where it is.

    Args:
        logprobs: `[B, T, A]`, `log π` with gradient.
        score_weights: `[B, T, A]`, from `corrected_score_weights`.
        mask: `[B, T]` bool.
        average_logprobs: `[B, T, A]`, of the average policy; needed with a limit.
        limit: `δ`.
        statistics: `φ`.
        entropy_coefficient: adds `c₂ ∇H(π)` to `g`.
        reduction: see `plaudit.core.reduction.reduce_steps`.

    Returns:
        the scalar loss, and the metrics `num_steps`, `entropy`; with a limit `average_kl` (`KL(π_average‖π)`) and
        `projected_fraction` (the share of steps that it changed).

    Raises:
        ValueError: for shapes that differ, a limit without an average policy, or a negative limit.
    """
    expect_shape("score_weights", score_weights, tuple(logprobs.shape))
    expect_shape("mask", mask, tuple(logprobs.shape[:-1]))
    allowed = (logprobs > float("-inf")) & mask.unsqueeze(-1)
    clean = logprobs.masked_fill(~allowed, 0.0)
    own = clean.detach()
    probabilities = own.exp().masked_fill(~allowed, 0.0)
    entropy = -(probabilities * own).sum(-1)
    weights = score_weights.detach().masked_fill(~allowed, 0.0)
    if entropy_coefficient:
        weights = weights - entropy_coefficient * probabilities * (own + entropy.unsqueeze(-1))
    metrics: Metrics = {"num_steps": mask.sum(), "entropy": masked_mean(entropy, mask)}
    if limit == float("inf"):
        return reduce_steps(-(weights * clean).sum(-1), mask, reduction), metrics
    if average_logprobs is None:
        raise ValueError(f"a trust region with limit {limit} needs average_logprobs")
    expect_shape("average_logprobs", average_logprobs, tuple(logprobs.shape))
    average = average_logprobs.detach().masked_fill(~allowed, 0.0)
    average_probabilities = average.exp().masked_fill(~allowed, 0.0)
    if statistics == "probabilities":
        bounded = own.clamp(min=_SMALLEST)
        gradient = weights * (-bounded).exp()
        divergence_gradient = -(average - bounded).exp().masked_fill(~allowed, 0.0)
        described = clean.exp().masked_fill(~allowed, 0.0)
    else:
        gradient = weights - probabilities * weights.sum(-1, keepdim=True)
        divergence_gradient = probabilities - average_probabilities
        described = clean  # z sums to 0, so log-probabilities have the gradient of logits
    step = trust_region_step(gradient, divergence_gradient, limit=limit)
    changed = ((divergence_gradient * gradient).sum(-1) > limit).to(own.dtype)
    metrics["average_kl"] = masked_mean((average_probabilities * (average - own)).sum(-1), mask)
    metrics["projected_fraction"] = masked_mean(changed, mask)
    return reduce_steps(-(step * described).sum(-1), mask, reduction), metrics
