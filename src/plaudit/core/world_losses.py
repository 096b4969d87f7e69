"""Losses of world models: mixture densities of what comes next, and the bound of a variational autoencoder."""

import math

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from plaudit.core.reduction import Metrics, expect_shape, reduce_steps


def mixture_log_density(targets: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """`log p(y) = log Σ_m π_m Π_d N(y_d; μ_md, σ_md²)`: a mixture of Gaussians with diagonal covariances.

    Args:
        targets: `y`, `[..., D]`.
        log_weights: logits of `π`, `[..., M]`; normalised here.
        means: `μ`, `[..., M, D]`.
        log_scales: `log σ`, `[..., M, D]`.

    Returns:
        `[...]`, in nats.

    Raises:
        ValueError: for shapes that do not fit.

    Source: Bishop, "Mixture density networks" (1994), equations 22 and 23; Ha and Schmidhuber, "World models"
    (arXiv:1803.10122), section 2.3. Departure from the latter: one choice of component for all dimensions together,
    where their code gives each dimension a mixture of its own; jointly bimodal states need that.
    """
    shape = (*targets.shape[:-1], log_weights.shape[-1], targets.shape[-1])
    expect_shape("log_weights", log_weights, shape[:-1])
    expect_shape("means", means, shape)
    expect_shape("log_scales", log_scales, shape)
    distance = (targets.unsqueeze(-2) - means) * (-log_scales).exp()
    each = -0.5 * distance.square() - log_scales - 0.5 * math.log(2 * math.pi)
    return torch.logsumexp(torch.log_softmax(log_weights, -1) + each.sum(-1), -1)


def mixture_density_loss(
    targets: Tensor, log_weights: Tensor, means: Tensor, log_scales: Tensor, mask: Tensor
) -> tuple[Tensor, Metrics]:
    """`-mean_t log p(y_t)`, per step, under `mixture_log_density`.

    Args:
        targets: `[B, T, D]`.
        log_weights: `[B, T, M]`.
        means, log_scales: `[B, T, M, D]`.
        mask: `[B, T]` bool.

    Returns:
        the scalar loss, and the metric `mixture_entropy`, of the mean weights' choice in nats.

    Raises:
        ValueError: for shapes that do not fit.
    """
    density = mixture_log_density(targets, log_weights, means, log_scales)
    chances = torch.log_softmax(log_weights.detach(), -1)
    entropy = -(chances.exp() * chances).sum(-1)
    return reduce_steps(-density, mask, "per_token"), {"mixture_entropy": reduce_steps(entropy, mask, "per_token")}


def sample_mixture(
    log_weights: Tensor, means: Tensor, log_scales: Tensor, uniform: Tensor, normal: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Draw from the mixture with weights `π^(1/τ)` (normalised) and scales `σ √τ`.

    Args:
        log_weights: `[..., M]`.
        means, log_scales: `[..., M, D]`.
        uniform: `[...]` in [0, 1), chooses the component by the inverse of the cumulated weights.
        normal: `[..., D]`, standard normal.
        temperature: `τ`, positive, or 0 for the mean of the likeliest component.

    Returns:
        `[..., D]`.

    Raises:
        ValueError: for shapes that do not fit, or a negative temperature.

    Source: Ha and Schmidhuber (arXiv:1803.10122), section 4.2, and their code.
    """
    if temperature < 0:
        raise ValueError(f"a temperature must not be negative, got {temperature}")
    expect_shape("means", means, (*log_weights.shape, normal.shape[-1]))
    expect_shape("uniform", uniform, tuple(log_weights.shape[:-1]))
    if temperature == 0:
        chosen = log_weights.argmax(-1)
    else:
        cumulated = (log_weights / temperature).softmax(-1).cumsum(-1)
        # Rounding may leave the last sum below 1: never past the last component.
        chosen = (uniform.unsqueeze(-1) >= cumulated).sum(-1).clamp_max(log_weights.shape[-1] - 1)
    place = chosen[..., None, None].expand(*chosen.shape, 1, means.shape[-1])
    mean, scale = means.gather(-2, place).squeeze(-2), log_scales.gather(-2, place).squeeze(-2).exp()
    return mean + math.sqrt(temperature) * scale * normal


def gaussian_kl(means: Tensor, log_variances: Tensor) -> Tensor:
    """`KL(N(μ, σ²)‖N(0, 1)) = ½ Σ_d (μ_d² + σ_d² - 1 - log σ_d²)`, `[..., D]` to `[...]`, in nats.

    Raises:
        ValueError: for shapes that differ.

    Source: Kingma and Welling (arXiv:1312.6114), appendix B.
    """
    expect_shape("log_variances", log_variances, tuple(means.shape))
    return 0.5 * (means.square() + log_variances.exp() - 1 - log_variances).sum(-1)


def autoencoder_loss(
    reconstructions: Tensor,
    targets: Tensor,
    means: Tensor,
    log_variances: Tensor,
    *,
    scale: float = 1.0,
    free_nats: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """The negative evidence bound, `mean_n [Σ_i (x_i - x̂_i)² / 2 s² + max(KL_n, free)]`, without its constant.

    `Σ (x - x̂)² / 2s²` is `-log N(x; x̂, s²)` up to `d log s √(2π)`; with `free_nats` the code may hold that much for
    nothing, so that it is not emptied at first.

    Args:
        reconstructions: `x̂`, `[N, ...]`, decoded from one sample of the code.
        targets: `x`, `[N, ...]`.
        means, log_variances: of the code, `[N, D]`.
        scale: `s`, the deviation of the noise on observations, positive.
        free_nats: not below 0.

    Returns:
        the scalar loss, and the metrics `reconstruction` (nats) and `code_kl` (nats) per observation.

    Raises:
        ValueError: for shapes that do not fit, a scale that is not positive, negative free nats.

    Source: Kingma and Welling (arXiv:1312.6114), equation 7; Ha and Schmidhuber (arXiv:1803.10122), appendix A.1, whose
    code has `s² = ½` and half a nat free per dimension.
    """
    if scale <= 0 or free_nats < 0:
        raise ValueError(f"scale must be positive and free_nats not negative, got {scale} and {free_nats}")
    expect_shape("reconstructions", reconstructions, tuple(targets.shape))
    expect_shape("means", means, (targets.shape[0], means.shape[-1]))
    errors = (reconstructions - targets).square().flatten(1).sum(1) / (2 * scale**2)
    divergence = gaussian_kl(means, log_variances)
    loss = (errors + divergence.clamp_min(free_nats)).mean()
    return loss, {"reconstruction": errors.detach().mean(), "code_kl": divergence.detach().mean()}


def reward_continuation_loss(
    rewards: Tensor, continuation_logits: Tensor, true_rewards: Tensor, continues: Tensor, mask: Tensor
) -> tuple[Tensor, Metrics]:
    """`mean_t [½ (r̂_t - r_t)² - c_t log σ(ĉ_t) - (1 - c_t) log σ(-ĉ_t)]`: what a step pays and whether more follows.

    Args:
        rewards, continuation_logits: predicted, `[B, T]`.
        true_rewards, continues: what was seen, `[B, T]`; `continues` is 0 at an end and 1 elsewhere, a time limit too.
        mask: `[B, T]` bool.

    Returns:
        the scalar loss, and the metrics `reward_error` (root of the mean square) and `continuation_loss`.

    Raises:
        ValueError: for shapes that do not fit.
    """
    for name, tensor in (("rewards", rewards), ("continues", continues), ("true_rewards", true_rewards)):
        expect_shape(name, tensor, tuple(continuation_logits.shape))
    squares = (rewards - true_rewards).square()
    ends = binary_cross_entropy_with_logits(continuation_logits, continues.to(rewards.dtype), reduction="none")
    loss = reduce_steps(0.5 * squares + ends, mask, "per_token")
    return loss, {
        "reward_error": reduce_steps(squares.detach(), mask, "per_token").sqrt(),
        "continuation_loss": reduce_steps(ends.detach(), mask, "per_token"),
    }
