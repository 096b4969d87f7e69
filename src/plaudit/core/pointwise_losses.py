"""Losses for absolute judgements, and the centring of scores. Conventions as in `plaudit.core.preference_losses`."""

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, huber_loss, mse_loss

from plaudit.core.masked import masked_mean
from plaudit.core.reduction import Metrics, expect_shape, prepare_scores, reduce_prompts


def _pointwise(
    per_entry: Tensor, scores: Tensor, mask: Tensor, weights: Tensor | None, normaliser: float | Tensor | None
) -> tuple[Tensor, Metrics]:
    """Mean over a prompt's judged entries, `[P, K]` or `[P, K, A]`, then over prompts."""
    per_prompt = masked_mean(per_entry.flatten(1), mask.flatten(1), dim=1)
    loss, metrics = reduce_prompts(per_prompt, mask.flatten(1).any(1), weights, normaliser)
    return loss, metrics | {"num_entries": mask.sum(), "mean_reward": masked_mean(scores.detach(), mask)}


def _targets(scores: Tensor, targets: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, targets and mask of one shape, all safe at masked places; a `[P, K]` mask serves all attributes."""
    if mask.ndim == scores.ndim - 1:
        mask = mask.unsqueeze(-1).expand(scores.shape)
    expect_shape("targets", targets, tuple(scores.shape))
    scores = prepare_scores(scores, mask)
    return scores, targets.to(scores.dtype).masked_fill(~mask, 0.0), mask


def regression_loss(
    scores: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    huber_delta: float | None = None,
    weights: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Squared error of absolute scores or ratings, several attributes at once.

    Equation: `ℓ_x = (1/n_x) Σ_{k,a} (r_ka - t_ka)²`, with `n_x` the prompt's judged entries; with `huber_delta` δ the
    square beyond δ becomes `2δ|e| - δ²` (Huber 1964, doubled so that both agree near 0).
    Source: Wang et al., "HelpSteer2" (arXiv:2406.08673).

    Args:
        scores, targets: `[P, K]` or `[P, K, A]` floating point, in the units of the ratings.
        mask: of the same shape, or `[P, K]` for all attributes alike.
        huber_delta: None for the plain square.
        weights, normaliser: see the module.

    Returns:
        the loss in squared units of the ratings, and metrics with `mean_absolute_error`.

    Raises:
        ValueError: for shapes that do not fit.
    """
    scores, targets, mask = _targets(scores, targets, mask)
    if huber_delta is None:
        per_entry = mse_loss(scores, targets, reduction="none")
    else:
        per_entry = 2 * huber_loss(scores, targets, reduction="none", delta=huber_delta)
    loss, metrics = _pointwise(per_entry, scores, mask, weights, normaliser)
    return loss, metrics | {"mean_absolute_error": masked_mean((scores - targets).detach().abs(), mask)}


def classification_loss(
    scores: Tensor,
    targets: Tensor,
    mask: Tensor,
    *,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Binary cross-entropy of good-or-bad labels, several attributes at once.

    Equation: `ℓ_x = -(1/n_x) Σ_{k,a} [t log σ(r) + (1-t) log σ(-r)]`, `t ← t (1-ε) + (1-t) ε`.
    Source: logistic regression, Cox, "The regression analysis of binary sequences", J. R. Stat. Soc. B 20 (1958).

    Args:
        scores: `[P, K]` or `[P, K, A]` logits.
        targets: same shape, bool or probabilities in [0, 1].
        mask: of the same shape, or `[P, K]` for all attributes alike.
        label_smoothing: ε in [0, 0.5).
        weights, normaliser: see the module.

    Returns:
        the loss in nats per entry, and metrics; `accuracy` counts a score of exactly 0 half.

    Raises:
        ValueError: for shapes that do not fit or ε out of range.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    scores, targets, mask = _targets(scores, targets, mask)
    smoothed = targets * (1 - label_smoothing) + (1 - targets) * label_smoothing
    per_entry = binary_cross_entropy_with_logits(scores, smoothed, reduction="none")
    loss, metrics = _pointwise(per_entry, scores, mask, weights, normaliser)
    right = (scores.detach().sign() * (targets - 0.5).sign() + 1) / 2
    return loss, metrics | {"accuracy": masked_mean(right, mask & (targets != 0.5))}


def reward_centring_loss(
    scores: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Draws each prompt's mean score to 0 without drawing its completions together.

    Equation: `ℓ_x = (2 · mean_k r_k)²`; with two completions this is the published `(r_w + r_l)²`.
    Source: Eisenstein et al., "Helping or herding?" (arXiv:2312.09244); ours for K ≠ 2.

    Args:
        scores, mask: `[P, K]`; a single completion is enough.
        weights, normaliser: see the module.

    Returns:
        the loss in squared score units (to be multiplied by a small coefficient, 0.01 is usual), and metrics.

    Raises:
        ValueError: for shapes that do not fit.
    """
    scores = prepare_scores(scores, mask)
    per_prompt = (2 * masked_mean(scores, mask, dim=1)).square()
    loss, metrics = reduce_prompts(per_prompt, mask.any(1), weights, normaliser)
    return loss, metrics | {"mean_reward": masked_mean(scores.detach(), mask)}
