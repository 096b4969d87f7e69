"""Losses of critics over trajectories `[B, T]`. They take values, never models; targets are constants."""

import torch
from torch import Tensor

from plaudit.core.masked import masked_mean, masked_variance
from plaudit.core.reduction import Metrics, Reduction, expect_shape, reduce_steps


def squared_value_loss(
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    reduction: Reduction = "per_token",
    group_ids: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """`ℓ_t = (V(s_t) - R_t)²`, without the factor ½ that some write.

    Args:
        values: `[B, T]`, of the critic that learns.
        returns: `[B, T]`, targets; gradients into them are cut.
        mask: `[B, T]` bool.
        reduction, group_ids, normaliser: see `plaudit.core.reduction.reduce_steps`.

    Returns:
        the scalar loss, and the metrics `explained_variance`, `mean_value`, `mean_return`.

    Raises:
        ValueError: for shapes that do not fit (`[B]` against `[B, 1]` too).
    """
    values, returns = _clean(values, returns, mask)
    errors = (values - returns).square()
    loss = reduce_steps(errors, mask, reduction, group_ids=group_ids, normaliser=normaliser)
    return loss, _metrics(values, returns, mask)


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float,
    reduction: Reduction = "per_token",
    group_ids: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """`ℓ_t = max((V - R)², (V_clip - R)²)`, `V_clip = V_old + clip(V - V_old, -ε, ε)`.

    Source: OpenAI baselines, `ppo2`; Engstrom et al., "Implementation matters" (arXiv:2005.12729), section 3. The scale
    of `ε` is that of the returns.

    Args:
        values, old_values, returns: `[B, T]`; gradients go into `values` alone.
        mask: `[B, T]` bool.
        clip: `ε`, positive.
        reduction, group_ids, normaliser: see `plaudit.core.reduction.reduce_steps`.

    Returns:
        the scalar loss, and the metrics of `squared_value_loss` with `value_clip_fraction`.

    Raises:
        ValueError: for shapes that do not fit, or a clip that is not positive.
    """
    if clip <= 0:
        raise ValueError(f"the clip of a value loss must be positive, got {clip}")
    values, returns = _clean(values, returns, mask)
    expect_shape("old_values", old_values, tuple(values.shape))
    old = old_values.detach().masked_fill(~mask, 0.0)
    plain = (values - returns).square()
    errors = plain.maximum((old + (values - old).clamp(-clip, clip) - returns).square())
    loss = reduce_steps(errors, mask, reduction, group_ids=group_ids, normaliser=normaliser)
    clipped = ((values - old).abs() > clip).to(values.dtype)
    return loss, _metrics(values, returns, mask) | {"value_clip_fraction": masked_mean(clipped.detach(), mask)}


def huber_td_loss(
    values: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    threshold: float = 1.0,
    reduction: Reduction = "per_token",
    group_ids: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """`ℓ_t = ½ δ²` where `|δ| ≤ κ`, else `κ (|δ| - ½ κ)`; `δ_t = V_t - target_t`, the temporal-difference error.

    A squared error whose gradient is bounded by `κ`: one surprising reward cannot throw the values far.
    Source: Huber (1964); Mnih et al., "Human-level control through deep reinforcement learning" (2015), methods.

    Args:
        values: `[B, T]`, `V(s_t)` or `Q(s_t, a_t)` of the network that learns.
        targets: `[B, T]`; gradients into them are cut.
        mask: `[B, T]` bool.
        threshold: `κ`, positive, in units of the return.
        reduction, group_ids, normaliser: see `plaudit.core.reduction.reduce_steps`.

    Returns:
        the scalar loss, and the metrics of `squared_value_loss` with `absolute_error`, the mean of `|δ|`.

    Raises:
        ValueError: for shapes that do not fit, or a threshold that is not positive.
    """
    if not threshold > 0:
        raise ValueError(f"the threshold of a Huber loss must be positive, got {threshold}")
    values, targets = _clean(values, targets, mask)
    sizes = (values - targets).abs()
    errors = torch.where(sizes <= threshold, 0.5 * sizes.square(), threshold * (sizes - 0.5 * threshold))
    loss = reduce_steps(errors, mask, reduction, group_ids=group_ids, normaliser=normaliser)
    return loss, _metrics(values, targets, mask) | {"absolute_error": masked_mean(sizes.detach(), mask)}


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """`1 - Var(R - V) / Var(R)`: 1 for a perfect critic, 0 for a constant one, negative for a harmful one.

    Args:
        values, returns: `[B, T]`.
        mask: `[B, T]` bool.

    Returns:
        a scalar without gradient; NaN where the returns do not vary.
    """
    values, returns = _clean(values.detach(), returns, mask)
    variance = masked_variance(returns, mask, unbiased=False)
    unexplained = masked_variance(returns - values, mask, unbiased=False)
    return (1 - unexplained / variance).masked_fill(variance == 0, float("nan"))


def _clean(values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Values and detached returns, both `[B, T]`, with 0 at masked steps."""
    expect_shape("returns", returns, tuple(values.shape))
    expect_shape("mask", mask, tuple(values.shape))
    return values.masked_fill(~mask, 0.0), returns.detach().masked_fill(~mask, 0.0)


def _metrics(values: Tensor, returns: Tensor, mask: Tensor) -> Metrics:
    return {
        "explained_variance": explained_variance(values, returns, mask),
        "mean_value": masked_mean(values.detach(), mask),
        "mean_return": masked_mean(returns, mask),
    }
