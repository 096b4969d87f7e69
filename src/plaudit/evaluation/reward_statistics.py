"""Every metric of one reward model as a statistic over clusters, ready to be redrawn."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit

from plaudit.evaluation import metrics
from plaudit.evaluation.intervals import Statistic, cluster_sums, mean_statistic
from plaudit.evaluation.judged import JudgedSet
from plaudit.evaluation.metrics import BoolArray, FloatArray, IntArray

#: Metrics in the order of every table: name, what it says in a few words, whether more is better (None: neither).
METRICS: dict[str, tuple[str, bool | None]] = {
    "accuracy": ("pairs that the model orders as people did; equal scores count half", True),
    "prompt_accuracy": ("the same, each prompt weighing the same", True),
    "best_of_k_accuracy": ("the model's top completion is people's top completion", True),
    "log_loss": ("surprise at people's choices in nats; 0.693 is knowing nothing", False),
    "scaled_log_loss": ("log-loss after dividing all rewards by the temperature", False),
    "brier": ("squared error of the probabilities; 0.25 is knowing nothing", False),
    "calibration_error": ("how far probabilities are from frequencies, equal-mass bins", False),
    "temperature": ("the scale that fits best; 1 is calibrated, above 1 overconfident", None),
    "kendall_tau": ("agreement of whole rankings (tau-b), mean over prompts", True),
    "ndcg": ("quality of the model's ranking, mean over prompts", True),
    "accuracy_shorter_preferred": ("accuracy where people preferred the shorter completion", True),
    "accuracy_longer_preferred": ("accuracy where people preferred the longer completion", True),
    "length_correlation": ("reward against log-length within prompts", None),
    "length_partial_correlation": ("the same, given what people said", None),
}


@dataclass(frozen=True)
class PairScores:
    """The usable judged pairs of one model: those where both completions have a score.

    Attributes:
        keep: `[M]` bool, which of the set's pairs are used.
        difference: `[m]` reward of the preferred minus reward of the other.
        clusters: `[m]` cluster of each used pair.
        weight: `[m]` weight of each used pair.
    """

    keep: BoolArray
    difference: FloatArray
    clusters: IntArray
    weight: FloatArray


def pair_scores(judged: JudgedSet, scores: FloatArray) -> PairScores:
    """Reward differences of the judged pairs, from flat scores `[L]` with nan where a completion was not scored."""
    difference = scores[judged.winner] - scores[judged.loser]
    keep = ~np.isnan(difference)
    return PairScores(keep, difference[keep], judged.pair_clusters[keep], judged.weight[keep])


def reward_statistics(judged: JudgedSet, scores: FloatArray, *, bins: int = 10) -> dict[str, Statistic]:
    """All of `METRICS` for one model, in their order.

    Args:
        judged: the comparisons.
        scores: `[L]` flat scores; nan where a completion was not scored.
        bins: of the calibration error.
    """
    pairs = pair_scores(judged, scores)
    d, clusters, weight, total = pairs.difference, pairs.clusters, pairs.weight, judged.num_clusters
    credit = metrics.pair_credits(d)
    scale = metrics.temperature(d, weight)

    def mean(values: FloatArray, where: BoolArray | None = None) -> Statistic:
        chosen = np.ones(d.size, dtype=bool) if where is None else where
        return mean_statistic(values[chosen], clusters[chosen], total, weight[chosen])

    record = judged.record[pairs.keep]
    per_prompt = 1.0 / np.maximum(np.bincount(record, minlength=len(judged.comparisons)), 1)[record]
    longer = (judged.lengths[judged.winner] - judged.lengths[judged.loser])[pairs.keep]
    found = {
        "accuracy": mean(credit),
        "prompt_accuracy": replace(
            mean_statistic(credit, clusters, total, weight * per_prompt), count=int(np.unique(record).size)
        ),
        "log_loss": mean(metrics.pair_log_losses(d)),
        "scaled_log_loss": mean(_scaled_log_losses(d, scale)),
        "brier": mean(metrics.pair_brier_scores(d)),
        "calibration_error": _calibration_statistic(pairs, bins, total),
        "temperature": _temperature_statistic(pairs, scale, total),
        "accuracy_shorter_preferred": mean(credit, longer < 0),
        "accuracy_longer_preferred": mean(credit, longer > 0),
        **_ranking_statistics(judged, scores),
        **_length_statistics(judged, scores),
    }
    return {name: found[name] for name in METRICS}


def group_statistics(
    judged: JudgedSet, pairs: PairScores, labels: dict[str, BoolArray]
) -> dict[str, tuple[Statistic, Statistic]]:
    """Accuracy and log-loss of named groups of pairs.

    Args:
        judged: the comparisons.
        pairs: the model's usable pairs.
        labels: per group `[m]` bool over the usable pairs.
    """
    credit, loss = metrics.pair_credits(pairs.difference), metrics.pair_log_losses(pairs.difference)
    return {
        label: (
            mean_statistic(credit[mask], pairs.clusters[mask], judged.num_clusters, pairs.weight[mask]),
            mean_statistic(loss[mask], pairs.clusters[mask], judged.num_clusters, pairs.weight[mask]),
        )
        for label, mask in labels.items()
    }


def _scaled_log_losses(d: FloatArray, scale: float) -> FloatArray:
    if scale == 0.0:
        return np.where(d == 0.0, np.log(2.0), 0.0)
    return metrics.pair_log_losses(d / scale if np.isfinite(scale) else np.zeros_like(d))


def _calibration_statistic(pairs: PairScores, bins: int, num_clusters: int) -> Statistic:
    """`sum_b |sum label - sum prediction| / sum weight` with the bins of the whole sample, both orders of each pair."""
    found = metrics.calibration_bins(pairs.difference, bins)
    count = found.count
    sums = np.zeros((num_clusters, count + 1))
    orders = ((found.forward, 1.0 - expit(pairs.difference)), (found.backward, -expit(-pairs.difference)))
    for index, residual in orders:
        np.add.at(sums, (pairs.clusters, index), pairs.weight * residual)
        np.add.at(sums, (pairs.clusters, np.full_like(index, count)), pairs.weight)

    def combine(totals: FloatArray) -> FloatArray:
        mass = totals[..., count]
        return np.where(mass > 0, np.abs(totals[..., :count]).sum(axis=-1) / np.where(mass > 0, mass, 1.0), np.nan)

    return Statistic(sums, combine, int(pairs.difference.size))


def _temperature_statistic(pairs: PairScores, scale: float, num_clusters: int) -> Statistic:
    """The temperature, redrawn by one Fisher-scoring step in `log T` from the whole sample's (one-step bootstrap).

    With `s = 1 / T`, score `g = w d sigma(-s d)` and information `h = w d^2 sigma(s d) sigma(-s d)` summed over a
    resample, `log T* = log T - sum g / (s sum h)`. Where the scale is hardly known (its clustered relative standard
    error is above 1/4) the step is taken in `s`, whose likelihood is nearer to quadratic there, and `s* <= 0` is an
    infinite temperature. Without a finite, positive temperature there is no interval.
    """
    d, weight = pairs.difference, pairs.weight
    if not (np.isfinite(scale) and scale > 0):
        constant: Callable[[FloatArray], FloatArray] = lambda totals: np.full(totals.shape[:-1], scale)  # noqa: E731
        return Statistic(np.zeros((num_clusters, 1)), constant, int(d.size))
    s = 1.0 / scale
    gradient = weight * d * expit(-s * d)
    information = weight * d**2 * expit(s * d) * expit(-s * d)
    sums = cluster_sums(np.stack([gradient, information], axis=1), pairs.clusters, num_clusters)
    well_known = float(np.sqrt((sums[:, 0] ** 2).sum())) < 0.25 * s * float(sums[:, 1].sum())

    def combine(totals: FloatArray) -> FloatArray:
        with np.errstate(divide="ignore", invalid="ignore"):
            step = totals[..., 0] / (s * totals[..., 1])
            return scale * np.exp(-step) if well_known else np.where(step > -1.0, scale / (1.0 + step), np.inf)

    return Statistic(sums, combine, int(d.size))


def _scored_tiers(judged: JudgedSet, scores: FloatArray, index: int) -> tuple[FloatArray, IntArray, IntArray]:
    """Scores, tier numbers (0 best) and places of a record's completions that are both judged and scored."""
    start = int(judged.offsets[index])
    places = np.array([start + slot for tier in judged.tiers[index] for slot in tier], dtype=np.int64)
    tier = np.array([depth for depth, tier in enumerate(judged.tiers[index]) for _ in tier], dtype=np.int64)
    scored = ~np.isnan(scores[places]) if places.size else np.zeros(0, dtype=bool)
    places, tier = places[scored], tier[scored]
    _, dense = np.unique(tier, return_inverse=True)
    return scores[places], dense.astype(np.int64), places


def _ranking_statistics(judged: JudgedSet, scores: FloatArray) -> dict[str, Statistic]:
    """Best-of-K over prompts with an untied judgement; tau-b and NDCG where at least three completions are ranked.

    A completion's relevance is the number of tiers below it. A model that gives a whole prompt one score has tau 0.
    """
    rows: dict[str, list[tuple[int, float]]] = {"best_of_k_accuracy": [], "kendall_tau": [], "ndcg": []}
    for index in range(len(judged.comparisons)):
        values, tier, _ = _scored_tiers(judged, scores, index)
        if tier.size == 0 or tier.max() == 0:
            continue
        rows["best_of_k_accuracy"].append((index, metrics.top_credit(values, tier == 0)))
        if tier.size >= 3:
            tau = metrics.kendall_tau_b(-tier, values)
            rows["kendall_tau"].append((index, 0.0 if np.isnan(tau) else tau))
            rows["ndcg"].append((index, metrics.ndcg(tier.max() - tier, values)))
    weights = np.array([c.weight for c in judged.comparisons])
    found = {}
    for name, pairs in rows.items():
        records = np.array([record for record, _ in pairs], dtype=np.int64)
        credits = np.array([credit for _, credit in pairs], dtype=np.float64)
        found[name] = mean_statistic(credits, judged.clusters[records], judged.num_clusters, weights[records])
    return found


def _length_statistics(judged: JudgedSet, scores: FloatArray) -> dict[str, Statistic]:
    """Correlation of reward and `log(1 + characters)` within prompts, without and given people's order.

    Second moments are centred within each record, so that differences between prompts (harder questions have longer
    answers) play no part.
    """
    moments = np.zeros((len(judged.comparisons), 6))
    for index, comparison in enumerate(judged.comparisons):
        values, tier, places = _scored_tiers(judged, scores, index)
        if values.size < 2:
            continue
        x, y, z = values, np.log1p(judged.lengths[places]), -tier / max(1, int(tier.max()))
        x, y, z = x - x.mean(), y - y.mean(), z - z.mean()
        moments[index] = comparison.weight * np.array([x @ x, y @ y, z @ z, x @ y, x @ z, y @ z])
    count = int((moments[:, 1] > 0).sum())
    sums = cluster_sums(moments, judged.clusters, judged.num_clusters)
    plain = sums * np.array([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    return {
        "length_correlation": Statistic(plain, metrics.partial_correlation, count),
        "length_partial_correlation": Statistic(sums, metrics.partial_correlation, count),
    }
