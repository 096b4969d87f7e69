"""From comparisons and scores to an evaluation with intervals, breakdowns and examples; several models, paired."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from plaudit.data.records import Comparison, prompt_text
from plaudit.evaluation import metrics
from plaudit.evaluation.breakdowns import pair_groups
from plaudit.evaluation.intervals import (
    Estimate,
    Statistic,
    bootstrap_draws,
    estimate,
    mean_statistic,
    paired_difference,
)
from plaudit.evaluation.judged import ClusterBy, JudgedSet, flat_scores, judge
from plaudit.evaluation.metrics import FloatArray, ReliabilityCurve
from plaudit.evaluation.reward_statistics import (
    METRICS,
    PairScores,
    group_statistics,
    pair_scores,
    reward_statistics,
)


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate.

    Attributes:
        cluster_by: what is redrawn as a whole: `auto`, `prompt`, `group` or `record` (see `judged.judge`).
        tie_threshold: human scores closer than this are ties.
        bins: of calibration.
        resamples: of the bootstrap; 0 for no intervals.
        confidence: of every interval.
        seed: of the bootstrap.
        examples: how many of the most confidently wrong pairs to show.
    """

    cluster_by: ClusterBy = "auto"
    tie_threshold: float = 0.0
    bins: int = 10
    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0
    examples: int = 12


@dataclass(frozen=True)
class BreakdownRow:
    """One part of the pairs: how many, and how the model does there."""

    label: str
    accuracy: Estimate
    log_loss: Estimate


@dataclass(frozen=True)
class WrongExample:
    """A pair that the model orders against people, with the probability that it gave to people's choice."""

    prompt: str
    preferred: str
    other: str
    preferred_reward: float
    other_reward: float
    probability: float
    id: str | None
    annotator: str | None
    subset: str | None


@dataclass(frozen=True)
class RewardEvaluation:
    """Everything that was measured about one model (or floor).

    Attributes:
        name: of the model.
        metrics: by the names of `METRICS`.
        breakdowns: `margin`, `K`, `annotator`, `subset`, `judgement` where the data has more than one value.
        best_of_k: accuracy of the top completion by K, and what guessing gets: `(K, accuracy, chance)`.
        counts: pairs used, pairs without a score, human ties and the like.
        human_ties: mean |reward difference| on pairs that people tied, and on those that they did not.
        calibration_noise: the calibration error that a perfectly calibrated model would show on this many pairs.
        reliability: the curve of the reliability diagram.
        chosen, rejected: `[m]` rewards of both sides of each used pair, for plots.
        length_change: `[m]` characters of the preferred minus of the other.
        examples: the most confidently wrong pairs, worst first, at most one per cluster.
        draws: `[R]` bootstrap draws by metric, paired across models that were evaluated together.
    """

    name: str
    metrics: dict[str, Estimate]
    breakdowns: dict[str, list[BreakdownRow]]
    best_of_k: list[tuple[int, Estimate, float]]
    counts: dict[str, int]
    human_ties: dict[str, float]
    calibration_noise: float
    reliability: ReliabilityCurve
    chosen: FloatArray
    rejected: FloatArray
    length_change: FloatArray
    examples: list[WrongExample]
    draws: dict[str, FloatArray]


@dataclass(frozen=True)
class PairedDifference:
    """`first - second` in one metric, on the same pairs and the same resampled clusters."""

    first: str
    second: str
    metric: str
    difference: Estimate


def evaluate_scores(
    comparisons: Sequence[Comparison],
    scores: Sequence[Sequence[float | None]],
    *,
    name: str = "model",
    options: EvaluationOptions | None = None,
) -> RewardEvaluation:
    """Evaluate one model from its scores.

    Args:
        comparisons: what people said.
        scores: per comparison one reward per completion, None where the model gave none.
        name: of the model.
        options: how; defaults of `EvaluationOptions`.

    Raises:
        ValueError: if scores do not fit the comparisons or are not finite, or no judged pair has scores.
    """
    return evaluate_models(comparisons, {name: scores}, options=options)[0]


def evaluate_models(
    comparisons: Sequence[Comparison],
    scores: Mapping[str, Sequence[Sequence[float | None]]],
    *,
    options: EvaluationOptions | None = None,
) -> list[RewardEvaluation]:
    """Evaluate several models (and floors) on the same pairs, so that they can be compared.

    A completion that one of them did not score is left out for all; how many pairs that costs is counted.

    Args:
        comparisons: what people said.
        scores: per model, as in `evaluate_scores`.
        options: how; defaults of `EvaluationOptions`.
    """
    chosen = options or EvaluationOptions()
    judged = judge(comparisons, cluster_by=chosen.cluster_by, tie_threshold=chosen.tie_threshold)
    flat: dict[str, FloatArray] = {}
    for name, values in scores.items():
        try:
            flat[name] = flat_scores(judged, values)
        except ValueError as error:
            raise ValueError(f"scores of '{name}': {error}") from error
    missing = np.any([np.isnan(values) for values in flat.values()], axis=0)
    return [_evaluate(judged, np.where(missing, np.nan, values), name, chosen) for name, values in flat.items()]


def compare(
    evaluations: Sequence[RewardEvaluation],
    *,
    metrics_compared: Sequence[str] = ("accuracy", "log_loss", "brier", "best_of_k_accuracy", "kendall_tau"),
    confidence: float = 0.95,
) -> list[PairedDifference]:
    """Paired differences of every two evaluations, the earlier minus the later, with intervals.

    Raises:
        ValueError: if they do not stem from one call of `evaluate_models` (other pairs, other resamples).
    """
    found = []
    for place, first in enumerate(evaluations):
        for second in evaluations[place + 1 :]:
            if first.counts != second.counts:
                raise ValueError(f"'{first.name}' and '{second.name}' were not evaluated on the same pairs")
            for metric in metrics_compared:
                one, two = first.metrics[metric], second.metrics[metric]
                if one.count == 0:
                    continue
                difference = paired_difference(
                    (one.value, first.draws[metric]), (two.value, second.draws[metric]), one.count, confidence
                )
                if math.isnan(one.low):
                    # One cluster cannot be redrawn into another: its difference would look certain.
                    difference = replace(difference, low=math.nan, high=math.nan)
                found.append(PairedDifference(first.name, second.name, metric, difference))
    return found


def _evaluate(judged: JudgedSet, flat: FloatArray, name: str, options: EvaluationOptions) -> RewardEvaluation:
    pairs = pair_scores(judged, flat)
    if pairs.difference.size == 0:
        raise ValueError(
            f"'{name}': no pair of completions was judged, untied and scored "
            f"({judged.counts()['pairs']} judged pairs, {judged.counts()['human_ties']} human ties)"
        )
    statistics = reward_statistics(judged, flat, bins=options.bins)
    groups = {
        kind: group_statistics(judged, pairs, {label: mask[pairs.keep] for label, mask in parts.items()})
        for kind, parts in pair_groups(judged).items()
    }
    by_k, chance = _best_of_k(judged, flat)
    everything = dict(statistics)
    for kind, parts in groups.items():
        for label, (accuracy, loss) in parts.items():
            everything[f"{kind}/{label}/accuracy"], everything[f"{kind}/{label}/log_loss"] = accuracy, loss
    everything |= {f"best_of_k/{size}": statistic for size, statistic in by_k.items()}
    draws = bootstrap_draws(everything, judged.num_clusters, resamples=options.resamples, seed=options.seed)
    found = {key: estimate(value, draws[key], options.confidence) for key, value in everything.items()}
    keep = pairs.keep
    tie_differences = np.abs(flat[judged.tied[:, 0]] - flat[judged.tied[:, 1]])
    tie_differences = tie_differences[~np.isnan(tie_differences)]
    return RewardEvaluation(
        name=name,
        metrics={metric: found[metric] for metric in METRICS},
        breakdowns={
            kind: [
                BreakdownRow(label, found[f"{kind}/{label}/accuracy"], found[f"{kind}/{label}/log_loss"])
                for label in parts
            ]
            for kind, parts in groups.items()
        },
        best_of_k=[(size, found[f"best_of_k/{size}"], chance[size]) for size in sorted(by_k)],
        counts=judged.counts() | {"pairs_used": int(keep.sum()), "pairs_without_score": int((~keep).sum())},
        human_ties={
            "pairs": float(tie_differences.size),
            "mean_absolute_difference": float(tie_differences.mean()) if tie_differences.size else float("nan"),
            "mean_absolute_difference_untied": float(np.abs(pairs.difference).mean()),
        },
        calibration_noise=metrics.calibration_noise(pairs.difference, options.bins, pairs.weight),
        reliability=metrics.reliability_curve(pairs.difference, options.bins, pairs.weight),
        chosen=flat[judged.winner[keep]],
        rejected=flat[judged.loser[keep]],
        length_change=(judged.lengths[judged.winner] - judged.lengths[judged.loser])[keep],
        examples=_wrong_examples(judged, flat, pairs, options.examples),
        draws={metric: draws[metric] for metric in METRICS},
    )


def _best_of_k(judged: JudgedSet, flat: FloatArray) -> tuple[dict[int, Statistic], dict[int, float]]:
    """Best-of-K accuracy by the number of judged and scored completions, and what guessing would get."""
    rows: dict[int, list[tuple[int, float, float]]] = {}
    for index, tiers in enumerate(judged.tiers):
        start = int(judged.offsets[index])
        values = {slot: flat[start + slot] for tier in tiers for slot in tier if not np.isnan(flat[start + slot])}
        scored = [[slot for slot in tier if slot in values] for tier in tiers]
        top = next((tier for tier in scored if tier), [])
        if len(top) in (0, len(values)):
            continue
        credit = metrics.top_credit(list(values.values()), [slot in top for slot in values])
        rows.setdefault(len(values), []).append((index, credit, len(top) / len(values)))
    statistics, chance = {}, {}
    for size, entries in rows.items():
        records = np.array([record for record, _, _ in entries], dtype=np.int64)
        weight = np.array([judged.comparisons[record].weight for record in records])
        credits = np.array([credit for _, credit, _ in entries])
        statistics[size] = mean_statistic(credits, judged.clusters[records], judged.num_clusters, weight)
        chance[size] = metrics.weighted_mean([guess for _, _, guess in entries], weight)
    return statistics, chance


def _wrong_examples(judged: JudgedSet, flat: FloatArray, pairs: PairScores, limit: int) -> list[WrongExample]:
    places = np.flatnonzero(pairs.keep)
    examples: list[WrongExample] = []
    seen: set[int] = set()
    for position in np.argsort(pairs.difference, kind="stable"):
        difference, cluster = float(pairs.difference[position]), int(pairs.clusters[position])
        if difference >= 0 or len(examples) == limit:
            break
        if cluster in seen:
            continue
        seen.add(cluster)
        pair = places[position]
        record = int(judged.record[pair])
        comparison, start = judged.comparisons[record], int(judged.offsets[record])
        winner, loser = int(judged.winner[pair]), int(judged.loser[pair])
        examples.append(
            WrongExample(
                prompt=prompt_text(comparison.prompt),
                preferred=comparison.completions[winner - start],
                other=comparison.completions[loser - start],
                preferred_reward=float(flat[winner]),
                other_reward=float(flat[loser]),
                probability=float(expit(difference)),
                id=comparison.id,
                annotator=comparison.annotator,
                subset=comparison.subset,
            )
        )
    return examples
