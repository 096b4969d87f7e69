"""From a table of scores and what people said to one number: which loss each record gets, and their sum."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor, nn

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.core.plackett_luce import MAX_EXACT_COMPLETIONS
from plaudit.core.pointwise_losses import classification_loss, regression_loss, reward_centring_loss
from plaudit.core.preference_losses import best_of_k_loss, pairwise_ranking_loss, plackett_luce_loss, votes_loss
from plaudit.core.ties import TIE_MODELS, initial_tie_parameter
from plaudit.core.transfer import to_device
from plaudit.data.records import (
    Best,
    Comparison,
    Judgement,
    Labels,
    Ranking,
    Ratings,
    Scores,
    Votes,
    preference_pairs,
    tied_pairs,
    tiers_of,
)
from plaudit.data.targets import PreferenceTargets

ABSOLUTE_LOSSES = frozenset({"regression", "classification"})
PAIR_SUMS = ("correct", "pairs", "margins", "rewards", "completions")
"""The sums that `pair_sums` makes of a micro-batch."""
NEVER_TIED = (Best, Votes, Labels)
"""Judgements in which nobody could call two completions equal."""
AUTOMATIC: dict[type[Judgement], str] = {
    Ranking: "pairwise",
    Scores: "pairwise",
    Best: "best_of_k",
    Votes: "votes",
    Labels: "classification",
    Ratings: "regression",
}


def loss_of(comparison: Comparison, config: RewardTrainingConfig) -> str:
    """The name of the loss that a record is trained with.

    `auto` goes by the judgement. A tie model holds for rankings and scores, where annotators could call two equal;
    picks, votes and labels never compared the completions they left together, so their pairs are plain ones. (Given
    that there is no tie, Davidson's model is Bradley-Terry with the same scores.)
    """
    judgement = comparison.judgement
    if config.loss == "auto":
        single = isinstance(judgement, Scores) and len(comparison.completions) == 1
        return "regression" if single else AUTOMATIC[type(judgement)]
    if config.loss in TIE_MODELS and isinstance(judgement, NEVER_TIED):
        return "pairwise"
    return config.loss


def why_unusable(comparison: Comparison, config: RewardTrainingConfig) -> str | None:
    """Why a record teaches its loss nothing, in words to count it under; None for a usable one."""
    loss, judgement = loss_of(comparison, config), comparison.judgement
    if comparison.weight == 0:
        return "weight 0"
    if loss in ABSOLUTE_LOSSES:
        named = config.model.attributes
        if isinstance(judgement, Ratings) and named and not set(named) & judgement.attributes.keys():
            return "no rating of the model's attributes"
        return None if _has_values(judgement, loss) else f"no absolute judgement for {loss}"
    if loss == "votes":
        return None if isinstance(judgement, Votes | Best) else "no votes"
    threshold = config.tie_threshold
    if loss == "best_of_k":
        tiers = tiers_of(judgement, len(comparison.completions), threshold)
        return None if len(tiers) > 1 and len(tiers[0]) == 1 else "no single best completion"
    if preference_pairs(comparison, threshold):
        return None
    if loss in TIE_MODELS:
        return None if tied_pairs(comparison, threshold) else "no judged pair"
    return "no untied pair"


def tie_rate(comparisons: Sequence[Comparison], threshold: float) -> float:
    """Share of judged pairs that people tied, kept within [0.01, 0.9]: where the tie parameter starts.

    Counted where a tie could be said, and where a tie model is used: not in picks, votes and labels (see `loss_of`).
    """
    judged = [each for each in comparisons if not isinstance(each.judgement, NEVER_TIED)]
    tied = sum(len(tied_pairs(each, threshold)) for each in judged)
    untied = sum(len(preference_pairs(each, threshold)) for each in judged)
    return min(0.9, max(0.01, tied / max(1, tied + untied)))


def explode_pairs(comparisons: Sequence[Comparison], threshold: float = 0.0) -> list[Comparison]:
    """Every untied pair as a comparison of its own, the record's weight shared equally among its pairs.

    The sum of weights, and so the loss over the whole data, is that of the rankings; only what stands together in a
    step (and how often a completion goes through the network) differs. A record without such a pair stays as it is.
    """
    singles: list[Comparison] = []
    for comparison in comparisons:
        pairs = preference_pairs(comparison, threshold)
        if not pairs:
            singles.append(comparison)
        for winner, loser in pairs:
            texts = (comparison.completions[winner], comparison.completions[loser])
            name = None if comparison.id is None else f"{comparison.id}#{winner}>{loser}"
            singles.append(
                replace(
                    comparison,
                    completions=texts,
                    judgement=Ranking(((0,), (1,))),
                    id=name,
                    weight=comparison.weight / len(pairs),
                )
            )
    return singles


class PreferenceObjective(nn.Module):
    """The training loss of a batch of records, each with its own kind of judgement; holds the learned tie parameter.

    Every record's loss is multiplied by its weight, summed, and divided by the weight sum of the whole optimizer
    step, so that micro-batches add up to what one batch would have given.
    """

    def __init__(self, config: RewardTrainingConfig, *, initial_tie_rate: float = 0.1) -> None:
        super().__init__()
        self.config = config
        self.tie_parameter: nn.Parameter | None = None
        if config.loss in TIE_MODELS:
            self.tie_parameter = nn.Parameter(torch.tensor(initial_tie_parameter(config.loss, initial_tie_rate)))

    def forward(
        self,
        scores: Tensor,
        total: Tensor,
        targets: PreferenceTargets,
        losses: Sequence[str],
        *,
        normaliser: float,
        smoothing: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one micro-batch.

        Args:
            scores: `[P, K]`, or `[P, K, A]` for a model with attributes; float32.
            total: `[P, K]`, the (weighted total of the) scores.
            targets: of the same `P` prompts.
            losses: the name of each prompt's loss.
            normaliser: sum of the weights of the whole step.
            smoothing: False leaves out label smoothing, margins and centring: the plain likelihood, for evaluation.

        Returns:
            The loss, a scalar, and sums that add up over micro-batches: `correct`, `pairs` (judged, untied),
            `margins`, `rewards`, `completions`; detached scalars.
        """
        loss = total.new_zeros(())
        for name in dict.fromkeys(losses):
            rows = to_device(torch.tensor([i for i, each in enumerate(losses) if each == name]), total.device)
            part = self._loss(name, scores[rows], total[rows], select(targets, rows), normaliser, smoothing)
            loss = loss + part
        comparative = to_device(torch.tensor([name not in ABSOLUTE_LOSSES for name in losses]), total.device)
        if smoothing and self.config.centring:
            mask = targets.judged & comparative[:, None]
            weights = targets.weights
            loss = (
                loss
                + self.config.centring * reward_centring_loss(total, mask, weights=weights, normaliser=normaliser)[0]
            )
        return loss, pair_sums(total.detach(), targets)

    def _loss(
        self,
        name: str,
        scores: Tensor,
        total: Tensor,
        targets: PreferenceTargets,
        normaliser: float,
        smoothing: bool,
    ) -> Tensor:
        weights, judged = targets.weights, targets.judged
        if name == "best_of_k":
            return best_of_k_loss(total, targets.best, judged, weights=weights, normaliser=normaliser)[0]
        if name == "votes":
            return votes_loss(total, targets.votes, judged, weights=weights, normaliser=normaliser)[0]
        if name == "plackett_luce":
            ties = "exact" if total.shape[1] <= MAX_EXACT_COMPLETIONS else "efron"
            tiers, top = targets.tiers, self.config.top
            return plackett_luce_loss(total, tiers, judged, top=top, ties=ties, weights=weights, normaliser=normaliser)[
                0
            ]
        if name in TIE_MODELS:
            return pairwise_ranking_loss(
                total,
                targets.tiers,
                judged,
                ties=name,
                tie_parameter=self.tie_parameter,
                weights=weights,
                normaliser=normaliser,
            )[0]
        if name == "pairwise":
            return pairwise_ranking_loss(
                total,
                targets.tiers,
                judged,
                margin=self._margin(targets) if smoothing else None,
                label_smoothing=self.config.label_smoothing if smoothing else 0.0,
                weights=weights,
                normaliser=normaliser,
            )[0]
        if name not in ABSOLUTE_LOSSES:
            raise ValueError(
                f"loss {name!r} has no branch here; known: pairwise, {', '.join(sorted(ABSOLUTE_LOSSES))}, …"
            )
        function = classification_loss if name == "classification" else regression_loss
        mask, loss = targets.score_mask, total.new_zeros(())
        if name == "regression" and scores.ndim == 3:
            # Each record by itself: what stands beside it in a micro-batch must not decide what it is trained on.
            rated = targets.rating_mask.any(-1).any(-1)
            mask = mask & ~rated[:, None]
            ratings = (scores, targets.ratings, targets.rating_mask)
            loss = regression_loss(*ratings, weights=weights, normaliser=normaliser)[0]
        return loss + function(total, targets.scores, mask, weights=weights, normaliser=normaliser)[0]

    def _margin(self, targets: PreferenceTargets) -> Tensor | float | None:
        kind, size = self.config.margin, self.config.margin_size
        if kind == "none":
            return None
        if kind == "constant":
            return size
        if kind == "record":
            return targets.margins
        return size * (targets.scores[:, :, None] - targets.scores[:, None, :])


def select(targets: PreferenceTargets, rows: Tensor) -> PreferenceTargets:
    """The targets of some prompts: `rows` `[R]` int64."""
    return PreferenceTargets(**{field.name: getattr(targets, field.name)[rows] for field in fields(targets)})


def pair_sums(total: Tensor, targets: PreferenceTargets) -> dict[str, Tensor]:
    """Sums over the judged, untied pairs of a batch, equal scores counting half; they add up over micro-batches.

    Args:
        total: `[P, K]`.
        targets: of the same prompts.

    Returns:
        Scalars: `correct`, `pairs`, `margins` (score of the better minus that of the worse), `rewards`, `completions`.
    """
    judged = targets.judged
    better = judged[:, :, None] & judged[:, None, :] & (targets.tiers[:, :, None] < targets.tiers[:, None, :])
    difference = (total[:, :, None] - total[:, None, :]).masked_fill(~better, 0.0)
    return {
        "correct": ((difference.sign() + 1) / 2).masked_fill(~better, 0.0).sum(),
        "pairs": better.sum().to(total.dtype),
        "margins": difference.sum(),
        "rewards": total.masked_fill(~targets.mask, 0.0).sum(),
        "completions": targets.mask.sum().to(total.dtype),
    }


def mean_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """`accuracy`, `margin` and `mean_reward` from added-up `pair_sums`; what has no pair is left out."""
    metrics = {"mean_reward": sums["rewards"] / max(1.0, sums["completions"])}
    if sums["pairs"]:
        metrics |= {"accuracy": sums["correct"] / sums["pairs"], "margin": sums["margins"] / sums["pairs"]}
    return metrics


def _has_values(judgement: Judgement, loss: str) -> bool:
    if loss == "classification":
        return isinstance(judgement, Labels) and any(value is not None for value in judgement.values)
    if isinstance(judgement, Ratings):
        return any(value is not None for values in judgement.attributes.values() for value in values)
    return isinstance(judgement, Scores | Labels) and any(value is not None for value in judgement.values)
