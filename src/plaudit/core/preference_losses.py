"""Losses that turn what people said about K completions into gradients for their scores.

Every function takes a padded `[P, K]` table of scores with a mask (True = this completion exists and was judged) and
returns `(loss, metrics)`. What the losses share:

- A prompt's own loss `ℓ_x` is an average over its judged pairs (or entries), so prompts with many completions do not
  outweigh others; the reduction over prompts is `Σ_x w_x ℓ_x / normaliser` (*per prompt*).
- `weights` `[P]` are the records' weights `w_x`, 1 by default. `normaliser` is `Σ_x w_x` over the usable prompts of
  this call by default; a training loop that splits a step into micro-batches passes the weight sum of the whole step,
  and the parts add up.
- A prompt without a usable judgement adds 0 to the loss, to the normaliser and to the counts. The functions
  `usable_…_prompts` say which ones are usable, before any score is known.
- Scores at masked places, even NaN, change nothing. Half precision is computed in float32. No host synchronisation.
- Metrics are detached scalars: `num_prompts`, `weight_sum`, `mean_reward` and, where it makes sense, `accuracy`,
  `margin`, `num_pairs`.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plaudit.core.masked import masked_log_softmax, masked_mean
from plaudit.core.plackett_luce import plackett_luce_log_likelihood
from plaudit.core.pointwise_losses import classification_loss, regression_loss, reward_centring_loss
from plaudit.core.reduction import Metrics, expect_shape, prepare_scores, reduce_prompts
from plaudit.core.ties import TIE_MODELS

__all__ = [
    "best_of_k_loss",
    "classification_loss",
    "judged_pairs",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "regression_loss",
    "reward_centring_loss",
    "usable_best_prompts",
    "usable_ranking_prompts",
    "usable_votes_prompts",
    "votes_loss",
]


def _pair_metrics(scores: Tensor, better: Tensor, mask: Tensor) -> Metrics:
    """Accuracy (equal scores count half) and mean margin over untied judged pairs; mean score of judged completions."""
    scores = scores.detach()
    difference = scores[:, :, None] - scores[:, None, :]
    return {
        "accuracy": masked_mean((difference.sign() + 1) / 2, better),
        "margin": masked_mean(difference, better),
        "num_pairs": better.sum(),
        "mean_reward": masked_mean(scores, mask),
    }


def judged_pairs(tiers: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs of completions people ordered, and which they tied.

    Args:
        tiers: `[P, K]` int64, 0 best; ignored where masked.
        mask: `[P, K]` bool.

    Returns:
        `better` `[P, K, K]` bool, True where i was placed above j; `tied` `[P, K, K]` bool, True for `i < j` in one
        tier.

    Raises:
        ValueError: if the shapes differ.
    """
    expect_shape("tiers", tiers, tuple(mask.shape))
    both = mask[:, :, None] & mask[:, None, :]
    better = both & (tiers[:, :, None] < tiers[:, None, :])
    tied = torch.triu(both & (tiers[:, :, None] == tiers[:, None, :]), diagonal=1)
    return better, tied


def usable_ranking_prompts(tiers: Tensor, mask: Tensor, *, ties: str = "ignore") -> Tensor:
    """`[P]` bool: prompts that `pairwise_ranking_loss` (and, with `ignore`, `plackett_luce_loss`) can learn from.

    Args:
        tiers, mask: `[P, K]`, as in `judged_pairs`.
        ties: with `ignore` a prompt needs an untied pair; with a tie-aware loss any judged pair will do.
    """
    better, tied = judged_pairs(tiers, mask)
    return (better if ties == "ignore" else better | tied).flatten(1).any(1)


def usable_best_prompts(best: Tensor, mask: Tensor) -> Tensor:
    """`[P]` bool: prompts whose pick `best` `[P]` exists in `mask` `[P, K]` and had at least one rival."""
    expect_shape("best", best, tuple(mask.shape[:1]))
    picked = mask.gather(1, best.clamp(0, mask.shape[1] - 1)[:, None]).squeeze(1)
    return (best >= 0) & (best < mask.shape[1]) & picked & (mask.sum(1) >= 2)


def usable_votes_prompts(votes: Tensor, mask: Tensor) -> Tensor:
    """`[P]` bool: prompts with at least two completions in `mask` `[P, K]` and a vote on one (`votes` `[P, K]`)."""
    expect_shape("votes", votes, tuple(mask.shape))
    return (votes.masked_fill(~mask, 0.0).sum(1) > 0) & (mask.sum(1) >= 2)


def best_of_k_loss(
    scores: Tensor,
    best: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Softmax cross-entropy of the completion that was picked out of the K.

    Equation: `ℓ_x = -log P(y_b|x)`, `P(y_i|x) = exp r_i / Σ_j exp r_j`; gradient `-(∇r_b - Σ_i P_i ∇r_i)`.
    Source: Ziegler et al., "Fine-tuning language models from human preferences" (arXiv:1909.08593), equation 1.

    Args:
        scores: `[P, K]` floating point.
        best: `[P]` int64, the pick; -1 where there is none.
        mask: `[P, K]` bool, the completions that the annotator chose from.
        weights: `[P]` or None.
        normaliser: see the module.

    Returns:
        the loss in nats per prompt, and metrics; `accuracy` gives shared maxima shared credit.

    Raises:
        ValueError: for shapes that do not fit.
    """
    scores = prepare_scores(scores, mask)
    usable = usable_best_prompts(best, mask)
    index = best.clamp(0, scores.shape[1] - 1)[:, None]
    loss, metrics = reduce_prompts(
        -masked_log_softmax(scores, mask).gather(1, index).squeeze(1), usable, weights, normaliser
    )
    detached = scores.detach().masked_fill(~mask, float("-inf"))
    top = (detached == detached.amax(1, keepdim=True)) & mask
    credit = top.gather(1, index).squeeze(1) / top.sum(1).clamp_min(1)
    metrics |= {"accuracy": masked_mean(credit, usable), "mean_reward": masked_mean(scores.detach(), mask)}
    return loss, metrics


def votes_loss(
    scores: Tensor,
    votes: Tensor,
    mask: Tensor,
    *,
    weights: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Cross-entropy against the annotators' distribution over the K completions.

    Equation: `ℓ_x = -Σ_i q_i log P(y_i|x)`, `q_i = votes_i / Σ_j votes_j`; gradient `-Σ_i (q_i - P_i) ∇r_i`. A prompt
    counts once however many voted; to let votes count, pass their number as the weight.

    Args:
        scores: `[P, K]` floating point.
        votes: `[P, K]`, not negative; ignored where masked.
        mask, weights, normaliser: as in `best_of_k_loss`.

    Returns:
        the loss in nats per prompt (its floor is the entropy of the votes), and metrics.

    Raises:
        ValueError: for shapes that do not fit.
    """
    scores = prepare_scores(scores, mask)
    usable = usable_votes_prompts(votes, mask)
    votes = votes.to(scores.dtype).masked_fill(~mask, 0.0)
    total = votes.sum(1, keepdim=True)
    share = votes / torch.where(total > 0, total, torch.ones_like(total))
    loss, metrics = reduce_prompts(-(share * masked_log_softmax(scores, mask)).sum(1), usable, weights, normaliser)
    return loss, metrics | {"mean_reward": masked_mean(scores.detach(), mask)}


def _margin_table(margin: float | Tensor | None, scores: Tensor, better: Tensor) -> Tensor:
    """The margin of every ordered pair, `[P, K, K]`, 0 where no pair was judged."""
    if margin is None:
        return torch.zeros_like(better, dtype=scores.dtype)
    table = torch.as_tensor(margin, dtype=scores.dtype, device=scores.device)
    if table.ndim == 1:
        expect_shape("margin", table, (scores.shape[0],))
        table = table[:, None, None]
    elif table.ndim != 0:
        expect_shape("margin", table, tuple(better.shape))
    return table.expand(better.shape).masked_fill(~better, 0.0)


def pairwise_ranking_loss(
    scores: Tensor,
    tiers: Tensor | None,
    mask: Tensor,
    *,
    margin: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    pair_probabilities: Tensor | None = None,
    ties: str = "ignore",
    tie_parameter: Tensor | float | None = None,
    weights: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """All pairs of a ranking at once, averaged within the prompt.

    Equation: `ℓ_x = -(1/n_x) Σ_{w≻l} [(1-ε) log σ(r_w - r_l - m) + ε log σ(-(r_w - r_l - m))]`, with `n_x` the
    prompt's judged, untied pairs; gradient for ε = m = 0: `-(1/n_x) Σ_{w≻l} σ(r_l - r_w) (∇r_w - ∇r_l)`. With
    `pair_probabilities` q the sum runs over all pairs `i < j` and each has the cross-entropy of q_ij. Tie-aware
    losses replace `log σ` by the model's log-probability of what was said (win, tie or loss) and `n_x` counts tied
    pairs too.
    Sources: Ouyang et al., "Training language models to follow instructions with human feedback" (arXiv:2203.02155),
    equation 1; margins: Touvron et al., "Llama 2" (arXiv:2307.09288), equation 2; label smoothing: Wang et al.,
    "Secrets of RLHF II" (arXiv:2401.06080); ties: see `plaudit.core.ties`.

    Args:
        scores: `[P, K]` floating point.
        tiers: `[P, K]` int64, 0 best, equal = tied; ignored where masked; not read (may be None) with
        `pair_probabilities`.
        mask: `[P, K]` bool, the completions that were judged.
        margin: how much better, in score units: a number, `[P]`, or `[P, K, K]` read at [winner, loser].
        label_smoothing: ε in [0, 0.5), the probability that a label is wrong.
        pair_probabilities: `[P, K, K]`, probability that i is preferred to j; read for `i < j` only; NaN = not judged.
        ties: `ignore` (tied pairs say nothing), `davidson` or `rao_kupper`.
        tie_parameter: a scalar, learned if it requires gradients; see `initial_tie_parameter`. Needed for the last two.
        weights, normaliser: see the module.

    Returns:
        the loss in nats per pair, and metrics over untied judged pairs (with soft labels: those above or below 1/2).

    Raises:
        ValueError: for shapes that do not fit, an unknown `ties`, or options that contradict each other.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if ties != "ignore":
        if margin is not None or label_smoothing or pair_probabilities is not None:
            raise ValueError(
                f"ties={ties!r} models wins, ties and losses; it takes no margin, smoothing or soft labels"
            )
        return _tie_aware_loss(scores, tiers, mask, ties, tie_parameter, weights, normaliser)
    scores = prepare_scores(scores, mask)
    difference = scores[:, :, None] - scores[:, None, :]
    if pair_probabilities is not None:
        if margin is not None:
            raise ValueError("a margin belongs to a winner; it has no meaning with pair_probabilities")
        pairs, better, target = _soft_labels(pair_probabilities, scores, mask)
    elif tiers is None:
        raise ValueError("tiers are needed unless pair_probabilities are given")
    else:
        better, _ = judged_pairs(tiers, mask)
        pairs, target = better, better.to(scores.dtype)
        difference = difference - _margin_table(margin, scores, better)
    target = target * (1 - label_smoothing) + (1 - target) * label_smoothing
    per_pair = -target * logsigmoid(difference) - (1 - target) * logsigmoid(-difference)
    num_pairs = pairs.flatten(1).sum(1)
    per_prompt = per_pair.masked_fill(~pairs, 0.0).flatten(1).sum(1) / num_pairs.clamp_min(1)
    loss, metrics = reduce_prompts(per_prompt, num_pairs > 0, weights, normaliser)
    return loss, metrics | _pair_metrics(scores, better, mask)


def _soft_labels(probabilities: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs `i < j` that have a probability, which way each one leans, and the probabilities; all `[P, K, K]`."""
    expect_shape("pair_probabilities", probabilities, (*mask.shape, mask.shape[1]))
    known = ~probabilities.isnan() & mask[:, :, None] & mask[:, None, :]
    pairs = torch.triu(known, diagonal=1)
    target = probabilities.to(scores.dtype).masked_fill(~pairs, 0.5)
    return pairs, pairs & (target > 0.5) | (pairs & (target < 0.5)).transpose(1, 2), target


def _tie_aware_loss(
    scores: Tensor,
    tiers: Tensor | None,
    mask: Tensor,
    ties: str,
    tie_parameter: Tensor | float | None,
    weights: Tensor | None,
    normaliser: float | Tensor | None,
) -> tuple[Tensor, Metrics]:
    """`pairwise_ranking_loss` under a model of ties; its arguments, shapes and result."""
    if ties not in TIE_MODELS:
        raise ValueError(f"ties must be 'ignore' or one of {sorted(TIE_MODELS)}, got {ties!r}")
    if tie_parameter is None or tiers is None:
        raise ValueError(f"ties={ties!r} needs tiers and a tie_parameter (see initial_tie_parameter)")
    scores = prepare_scores(scores, mask)
    better, tied = judged_pairs(tiers, mask)
    logprobs = TIE_MODELS[ties](scores[:, :, None] - scores[:, None, :], tie_parameter)
    log_likelihood = logprobs[..., 0].masked_fill(~better, 0.0) + logprobs[..., 1].masked_fill(~tied, 0.0)
    num_pairs = (better | tied).flatten(1).sum(1)
    loss, metrics = reduce_prompts(
        -log_likelihood.flatten(1).sum(1) / num_pairs.clamp_min(1), num_pairs > 0, weights, normaliser
    )
    metrics |= {"num_tied_pairs": tied.sum()}
    return loss, metrics | _pair_metrics(scores, better, mask)


def plackett_luce_loss(
    scores: Tensor,
    tiers: Tensor,
    mask: Tensor,
    *,
    top: int | None = None,
    ties: str = "exact",
    weights: Tensor | None = None,
    normaliser: float | Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Negative log-likelihood of whole rankings, `ℓ_x = -log P(tiers | x)`; see `plackett_luce_log_likelihood`.

    Not divided by the number of places: a ranking of nine says more than a pair, and weighs more.

    Args:
        scores: `[P, K]` floating point.
        tiers: `[P, K]` int64, 0 best; a top-m ranking puts all others in one last tier.
        mask: `[P, K]` bool, the completions that were judged.
        top: count only tiers that begin before this place.
        ties: `exact` (K ≤ 12) or `efron`.
        weights, normaliser: see the module.

    Returns:
        the loss in nats per prompt, and metrics over untied judged pairs.

    Raises:
        ValueError: as `plackett_luce_log_likelihood`.
    """
    scores = prepare_scores(scores, mask)
    usable = usable_ranking_prompts(tiers, mask)
    log_likelihood = plackett_luce_log_likelihood(scores, tiers, mask, top=top, ties=ties)
    loss, metrics = reduce_prompts(-log_likelihood, usable, weights, normaliser)
    return loss, metrics | _pair_metrics(scores, judged_pairs(tiers, mask)[0], mask)
