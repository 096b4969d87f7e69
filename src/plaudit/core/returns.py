"""Returns and advantages of trajectories `[B, T]`: one backward recursion, and the estimators that are settings of it.

There is no `done`. `continues` is 0 at a true end and 1 elsewhere. `truncated` marks an environment's time limit: the
step bootstraps from its `next_values` and cuts the trace, so nothing of the step behind it reaches it. `mask` is True
on the steps that the policy chose; the recursion passes through the others as if they were not there (what stands in
them, even NaN, never matters). The last counted step of a row bootstraps from its `next_values` unless it is an end.

With `t⁺` the next counted step after `t`, every estimator here is a setting of

    `X_t = w_t δ_t + γ_t k_t c_t X_{t⁺}`,   `δ_t = r_t + γ_t k_t v'_t - q_t`,   `G_t = q_t + X_t`

with `k` = `continues`, `v'` = `next_values`, and `c_t` = 0 where `truncated`. Nothing is detached: a caller who wants
fixed targets passes detached values, one who wants gradients through a learned model passes live ones.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from plaudit.core.reduction import expect_shape

Factor = float | Tensor


class VTrace(NamedTuple):
    """What `vtrace` returns, both `[B, T]`: `targets` for the values, `advantages` for the policy gradient."""

    targets: Tensor
    advantages: Tensor


def next_counted_index(mask: Tensor) -> Tensor:
    """Place of the next counted step: `t⁺ = min {u > t : mask_u}`.

    Args:
        mask: `[B, T]` bool.

    Returns:
        `[B, T]` int64; `T` where no counted step follows.
    """
    steps = mask.shape[1]
    places = torch.where(mask, torch.arange(steps, device=mask.device), steps)
    nearest = places.flip(1).cummin(1).values.flip(1)
    return torch.cat([nearest[:, 1:], nearest.new_full((mask.shape[0], 1), steps)], 1)


def shift_to_next(values: Tensor, mask: Tensor, last: Factor = 0.0) -> Tensor:
    """The value of the next counted step, which makes `next_values` out of `values`.

    Args:
        values: `[B, T]`.
        mask: `[B, T]` bool.
        last: a number or `[B]`, what follows the last counted step of each row: 0, or the value of the state behind it.

    Returns:
        `[B, T]` of the dtype of `values`.

    Raises:
        ValueError: if shapes differ or the mask is not boolean.
    """
    _check_mask(values, mask)
    tail = torch.as_tensor(last, dtype=values.dtype, device=values.device).expand(values.shape[0]).unsqueeze(1)
    return torch.cat([values, tail], 1).gather(1, next_counted_index(mask))


def off_policy_corrections(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    continues: Tensor,
    truncated: Tensor,
    mask: Tensor,
    *,
    discount: Factor,
    traces: Factor,
    error_weights: Factor = 1.0,
) -> Tensor:
    """The recursion: `X_t = w_t (r_t + γ_t k_t v'_t - q_t) + γ_t k_t c_t X_{t⁺}`, with `c_t = 0` where truncated.

    Source: the general off-policy operator of Munos et al., "Safe and efficient off-policy reinforcement learning"
    (arXiv:1606.02647), equation 3, in the form of rlax's `general_off_policy_returns_from_q_and_v`; the weight `w_t`
    and the passing through of masked steps are added here.

    Args:
        rewards: `[B, T]`, floating point.
        values: `[B, T]`, `q_t`, what the step is compared with: `V(s_t)`, or `Q(s_t, a_t)`.
        next_values: `[B, T]`, `v'_t`, the bootstrap: `V(s_{t+1})`, or `Σ_a π(a|s_{t+1}) Q(s_{t+1}, a)`. At a truncated
            step it belongs to the environment's final observation.
        continues: `[B, T]`, 0 at a true end, else 1 (or a probability of going on).
        truncated: `[B, T]` bool.
        mask: `[B, T]` bool.
        discount: `γ`, a number or `[B, T]`.
        traces: `c_t`, a number or `[B, T]`: how much of the correction behind `t` reaches `t`.
        error_weights: `w_t`, a number or `[B, T]`.

    Returns:
        `[B, T]`, `X`; 0 at masked steps.

    Raises:
        ValueError: for shapes that differ from `rewards [B, T]`, or a mask or `truncated` that is not boolean.
    """
    _check(rewards, mask, truncated, values=values, next_values=next_values, continues=continues)
    going_on = _factor("discount", discount, rewards, mask) * _clean(continues, mask, rewards.dtype)
    errors = _clean(rewards, mask) + _bootstrap(going_on, next_values, mask) - _clean(values, mask)
    errors = _factor("error_weights", error_weights, rewards, mask) * errors
    carried = (going_on * _factor("traces", traces, rewards, mask)).masked_fill(truncated, 0.0)
    correction = torch.zeros_like(errors[:, 0])
    found: list[Tensor] = []
    for step in reversed(range(rewards.shape[1])):
        here = errors[:, step] + carried[:, step] * correction
        correction = torch.where(mask[:, step], here, correction)
        found.append(correction)
    return torch.stack(found[::-1], 1).masked_fill(~mask, 0.0)


def discounted_returns(
    rewards: Tensor,
    next_values: Tensor,
    continues: Tensor,
    truncated: Tensor,
    mask: Tensor,
    *,
    discount: Factor,
) -> Tensor:
    """Returns to go: `G_t = r_t + γ k_t G_{t⁺}`, with `next_values` in place of `G_{t⁺}` where the data breaks off.

    The data breaks off at truncated steps and at the last counted step of a row that is not an end. Pass zeros as
    `next_values` for plain sums of rewards.

    Args and errors as in `off_policy_corrections`; all `[B, T]`.

    Returns:
        `[B, T]`; 0 at masked steps.
    """
    _check(rewards, mask, truncated, next_values=next_values)
    behind = next_values.masked_fill(~_breaks_off(truncated, mask), 0.0)
    nothing = torch.zeros_like(rewards)
    return off_policy_corrections(rewards, nothing, behind, continues, truncated, mask, discount=discount, traces=1.0)


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    continues: Tensor,
    truncated: Tensor,
    mask: Tensor,
    *,
    discount: Factor,
    gae_lambda: Factor,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: `A_t = δ_t + γ k_t λ A_{t⁺}`, the recursion with `w = 1`, `c = λ`.

    Source: Schulman et al., "High-dimensional continuous control using generalized advantage estimation"
    (arXiv:1506.02438), equation 16.

    Args:
        rewards, values, next_values, continues, truncated, mask: `[B, T]`, as in `off_policy_corrections`.
        discount: `γ`, a number or `[B, T]`.
        gae_lambda: `λ` in [0, 1], a number or `[B, T]`: 1 gives return minus value, 0 the one-step error.

    Returns:
        advantages `[B, T]` and returns `[B, T]` (advantage plus value, the λ-return); 0 at masked steps. Neither is
        whitened.

    Raises:
        ValueError: as `off_policy_corrections`.
    """
    advantages = off_policy_corrections(
        rewards, values, next_values, continues, truncated, mask, discount=discount, traces=gae_lambda
    )
    return advantages, advantages + _clean(values, mask)


def lambda_returns(
    rewards: Tensor,
    next_values: Tensor,
    continues: Tensor,
    truncated: Tensor,
    mask: Tensor,
    *,
    discount: Factor,
    return_lambda: Factor,
) -> Tensor:
    """λ-returns: `G_t = r_t + γ k_t [(1 - λ) v'_t + λ G_{t⁺}]`, with `v'_t` for `G_{t⁺}` where the data breaks off.

    They need no value of the step itself: what the recursion subtracts at `t⁺` is the `v'_t` of the step before.
    Where `next_values[t] = values[t⁺]` this equals the second result of `gae`.
    Source: Sutton, Barto, "Reinforcement learning", second edition, equation 12.2 in its recursive form.

    Args:
        rewards, next_values, continues, truncated, mask: `[B, T]`, as in `off_policy_corrections`.
        discount: `γ`, a number or `[B, T]`.
        return_lambda: `λ` in [0, 1], a number or `[B, T]`.

    Returns:
        `[B, T]`; 0 at masked steps.

    Raises:
        ValueError: as `off_policy_corrections`.
    """
    _check(rewards, mask, truncated, next_values=next_values, continues=continues)
    implied = _value_of_the_step_before(next_values.masked_fill(truncated | (continues == 0), 0.0), mask)
    corrections = off_policy_corrections(
        rewards, implied, next_values, continues, truncated, mask, discount=discount, traces=return_lambda
    )
    return (corrections + implied).masked_fill(~mask, 0.0)


def retrace(
    rewards: Tensor,
    action_values: Tensor,
    next_values: Tensor,
    continues: Tensor,
    truncated: Tensor,
    mask: Tensor,
    *,
    log_ratios: Tensor,
    discount: Factor,
    retrace_lambda: Factor = 1.0,
    clip: float = 1.0,
) -> Tensor:
    """Retrace targets of `Q(s_t, a_t)`: `G_t = r_t + γ k_t [v'_t + c_{t⁺} (G_{t⁺} - Q_{t⁺})]`, `c = λ min(clip, ρ)`.

    Source: Munos et al., arXiv:1606.02647, equations 3 and 4.

    Args:
        rewards, continues, truncated, mask: `[B, T]`, as in `off_policy_corrections`.
        action_values: `[B, T]`, `Q(s_t, a_t)`.
        next_values: `[B, T]`, `E_{a~π} Q(s_{t+1}, a)`.
        log_ratios: `[B, T]`, `log π(a_t|s_t) - log μ(a_t|s_t)`.
        discount: `γ`, a number or `[B, T]`.
        retrace_lambda: `λ`, a number or `[B, T]`.
        clip: the largest ratio; 1 in the paper.

    Returns:
        `[B, T]`; 0 at masked steps.

    Raises:
        ValueError: as `off_policy_corrections`.
    """
    traces = _factor("retrace_lambda", retrace_lambda, rewards, mask) * _clipped_ratios(log_ratios, rewards, mask, clip)
    corrections = off_policy_corrections(
        rewards,
        action_values,
        next_values,
        continues,
        truncated,
        mask,
        discount=discount,
        traces=shift_to_next(traces, mask),
    )
    return corrections + _clean(action_values, mask)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    continues: Tensor,
    truncated: Tensor,
    mask: Tensor,
    *,
    log_ratios: Tensor,
    discount: Factor,
    trace_lambda: Factor = 1.0,
    clip_error: float = 1.0,
    clip_trace: float = 1.0,
    clip_advantage: float = 1.0,
) -> VTrace:
    """V-trace: the recursion with `w_t = min(ρ̄, ρ_t)`, `c_t = λ min(c̄, ρ_t)`; `v_t = V_t + X_t`.

    The advantage is `min(ρ̄_A, ρ_t) (r_t + γ k_t v_{t⁺} - V_t)`, with `next_values` in place of `v_{t⁺}` where the data
    breaks off. Source: Espeholt et al., "IMPALA" (arXiv:1802.01561), equations 1 and 4, remark 2 for λ.

    Args:
        rewards, values, next_values, continues, truncated, mask: `[B, T]`, as in `off_policy_corrections`.
        log_ratios: `[B, T]`, `log π(a_t|s_t) - log μ(a_t|s_t)`.
        discount: `γ`, a number or `[B, T]`.
        trace_lambda: `λ`, a number or `[B, T]`.
        clip_error: `ρ̄`, which decides the fixed point: infinity gives `V^π`.
        clip_trace: `c̄`, which decides the speed.
        clip_advantage: the clip of the ratio in the advantage.

    Returns:
        targets and advantages, both `[B, T]`; 0 at masked steps. Multiply the advantages with `∇ log π`: the ratio is
        in them already.

    Raises:
        ValueError: as `off_policy_corrections`.
    """
    corrections = off_policy_corrections(
        rewards,
        values,
        next_values,
        continues,
        truncated,
        mask,
        discount=discount,
        traces=_factor("trace_lambda", trace_lambda, rewards, mask)
        * _clipped_ratios(log_ratios, rewards, mask, clip_trace),
        error_weights=_clipped_ratios(log_ratios, rewards, mask, clip_error),
    )
    targets = corrections + _clean(values, mask)
    behind = torch.where(_breaks_off(truncated, mask), next_values, shift_to_next(targets, mask))
    going_on = _factor("discount", discount, rewards, mask) * _clean(continues, mask, rewards.dtype)
    errors = _clean(rewards, mask) + _bootstrap(going_on, behind, mask) - _clean(values, mask)
    return VTrace(targets, _clipped_ratios(log_ratios, rewards, mask, clip_advantage) * errors)


def n_step_returns(
    rewards: Tensor,
    next_values: Tensor,
    continues: Tensor,
    truncated: Tensor,
    mask: Tensor,
    *,
    discount: Factor,
    num_steps: int,
) -> Tensor:
    """n-step returns: `G^(1)_t = r_t + γ k_t v'_t`, `G^(n)_t = r_t + γ k_t G^(n-1)_{t⁺}`; fewer steps at a break.

    Source: Sutton, Barto, "Reinforcement learning", second edition, equation 7.1.

    Args:
        rewards, next_values, continues, truncated, mask: `[B, T]`, as in `off_policy_corrections`.
        discount: `γ`, a number or `[B, T]`.
        num_steps: `n`, at least 1.

    Returns:
        `[B, T]`; 0 at masked steps.

    Raises:
        ValueError: as `off_policy_corrections`, or if `num_steps` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    _check(rewards, mask, truncated, next_values=next_values, continues=continues)
    going_on = _factor("discount", discount, rewards, mask) * _clean(continues, mask, rewards.dtype)
    breaks_off = _breaks_off(truncated, mask)
    found = _clean(rewards, mask) + _bootstrap(going_on, next_values, mask)
    for _ in range(min(num_steps, rewards.shape[1]) - 1):
        behind = torch.where(breaks_off, next_values, shift_to_next(found, mask))
        found = _clean(rewards, mask) + _bootstrap(going_on, behind, mask)
    return found


def _check_mask(values: Tensor, mask: Tensor) -> None:
    if values.ndim != 2 or values.shape[1] == 0 or not values.is_floating_point():
        raise ValueError(f"rewards must be floating point [B, T], T ≥ 1, got {values.dtype} {tuple(values.shape)}")
    expect_shape("mask", mask, tuple(values.shape))
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask must be boolean (True = the policy chose this step), got {mask.dtype}")


def _check(rewards: Tensor, mask: Tensor, truncated: Tensor, **tensors: Tensor) -> None:
    _check_mask(rewards, mask)
    for name, tensor in {**tensors, "truncated": truncated}.items():
        expect_shape(name, tensor, tuple(mask.shape))
    if truncated.dtype != torch.bool:
        raise ValueError(f"truncated must be boolean (True = cut by a time limit), got {truncated.dtype}")


def _breaks_off(truncated: Tensor, mask: Tensor) -> Tensor:
    """Where the data ends and `next_values` stand for what follows: time limits and the last counted step of a row."""
    return truncated | (next_counted_index(mask) == mask.shape[1])


def _clean(values: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`values` with 0 at masked places, so that nothing that stands there, NaN included, can spread."""
    return values.to(dtype or values.dtype).masked_fill(~mask, 0.0)


def _factor(name: str, factor: Factor, like: Tensor, mask: Tensor) -> Tensor:
    """A number or a `[B, T]` tensor as a clean `[B, T]` tensor; `[B]` and `[B, 1]` are refused."""
    if not isinstance(factor, Tensor):
        return torch.full_like(like, factor).masked_fill(~mask, 0.0)
    factor = factor.expand(like.shape) if factor.ndim == 0 else factor
    expect_shape(name, factor, tuple(like.shape))
    return _clean(factor, mask, like.dtype)


def _bootstrap(going_on: Tensor, next_values: Tensor, mask: Tensor) -> Tensor:
    """`γ k v'`, exactly 0 at an end whatever stands in `next_values` there."""
    return going_on * next_values.masked_fill(~mask | (going_on == 0), 0.0)


def _clipped_ratios(log_ratios: Tensor, like: Tensor, mask: Tensor, clip: float) -> Tensor:
    """`min(clip, exp(log_ratio))`, 0 at masked places."""
    expect_shape("log_ratios", log_ratios, tuple(like.shape))
    # Limited before the exponential as well: the gradient of an infinite ratio would be NaN, clipped or not.
    limit = math.log(clip) + 1 if clip > 0 else 0.0
    return log_ratios.masked_fill(~mask, 0.0).clamp(max=limit).exp().clamp(max=clip).masked_fill(~mask, 0.0)


def _value_of_the_step_before(next_values: Tensor, mask: Tensor) -> Tensor:
    """`v'` of the counted step before each counted step, `[B, T]`; 0 for the first of a row."""
    return shift_to_next(next_values.masked_fill(~mask, 0.0).flip(1), mask.flip(1)).flip(1)
