"""The numbers by which policies are compared, each a `Statistic` of sums over clusters of prompts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import expit
from scipy.stats import beta as beta_distribution

from plaudit.evaluation.intervals import Estimate, Statistic, bootstrap_draws, cluster_sums, estimate, ratio_of_sums
from plaudit.evaluation.metrics import FloatArray, IntArray
from plaudit.evaluation.policy_answers import Answers
from plaudit.evaluation.policy_diversity import distinct_n, same_answers, self_bleu
from plaudit.rewards.text import length, words

METRICS: dict[str, tuple[str, bool | None]] = {
    "reward": ("mean reward, each prompt weighing the same", True),
    "win_rate": ("how often its answer has the higher reward than one of the starting model; ties count half", True),
    "win_rate_same_length": ("the same for answers of equal length, by logistic regression", True),
    "ties": ("pairs of answers with exactly the same reward", None),
    "invalid": ("answers that this reward has nothing to say about; they are left out", False),
    "kl": ("divergence from the starting model per answer, nats; mean of Σ k1", None),
    "kl_k3": ("the same by Σ k3, which is never negative", None),
    "kl_per_token": ("Σ k1 over all tokens, nats per token", None),
    "kl_k3_per_token": ("Σ k3 over all tokens, nats per token", None),
    "entropy": ("mean entropy of the next token, nats", None),
    "tokens": ("tokens of an answer, its end included", None),
    "words": ("words of an answer; characters in scripts without spaces", None),
    "unfinished": ("answers that reached the token limit without an end of text", False),
    "empty": ("answers without a single word", False),
    "distinct_1": ("different words over words, within the answers to one prompt", True),
    "distinct_2": ("the same for pairs of neighbours", True),
    "distinct_3": ("the same for three neighbours", True),
    "self_bleu": ("BLEU-4 of an answer against the others to its prompt: 1 says they are all the same", False),
    "same_answer": ("pairs of answers to one prompt that are the same text", False),
}
"""Meaning of every number by the first part of its name, and whether more of it is better (None: it depends)."""

SHARES = frozenset(
    {"win_rate", "win_rate_same_length", "ties", "invalid", "unfinished", "empty", "same_answer"}
)  # fmt: skip
"""Those that are shares, read best in percent."""


@dataclass(frozen=True)
class Clusters:
    """Which prompts are redrawn together: `index` `[P]` in `0..count-1`."""

    index: IntArray
    count: int


def clusters_of(groups: Sequence[str | None]) -> Clusters:
    """One cluster per group; a prompt without one is a cluster of its own."""
    keys = [("group", group) if group is not None else ("prompt", place) for place, group in enumerate(groups)]
    places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    return Clusters(np.array([places[key] for key in keys], dtype=np.int64), len(places))


def prompt_mean(table: FloatArray, clusters: Clusters) -> Statistic:
    """The mean over prompts of the mean over their answers; nan entries of `[P, K]` (or `[P]`) are left out."""
    rows = table[:, None] if table.ndim == 1 else table
    known = ~np.isnan(rows)
    usable = known.any(1)
    sums = np.where(known, rows, 0.0).sum(1)[usable] / known.sum(1)[usable]
    pairs = np.stack([sums, np.ones_like(sums)], axis=1)
    grouped = cluster_sums(pairs, clusters.index[usable], clusters.count)
    return Statistic(grouped, ratio_of_sums, int(known.sum()))


def token_mean(sums: FloatArray, tokens: FloatArray, clusters: Clusters) -> Statistic:
    """`Σ sums / Σ tokens` over all answers, from tables `[P, K]`: each token weighs the same."""
    known = ~(np.isnan(sums) | np.isnan(tokens))
    pairs = np.stack([np.where(known, sums, 0.0).sum(1), np.where(known, tokens, 0.0).sum(1)], axis=1)
    return Statistic(cluster_sums(pairs, clusters.index, clusters.count), ratio_of_sums, int(known.sum()))


def win_tables(own: FloatArray, start: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Every answer against every answer of the starting model to the same prompt.

    Args:
        own: `[P, K]` rewards, nan where there is none.
        start: `[P, N]` rewards of the starting model.

    Returns:
        credits `[P, K, N]`: 1 for the higher reward, ½ for the same, 0 for the lower, nan where one is missing; and
        whether they tie, likewise.
    """
    difference = own[:, :, None] - start[:, None, :]
    missing = np.isnan(difference)
    credits = np.where(missing, np.nan, (difference > 0) + 0.5 * (difference == 0))
    return credits, np.where(missing, np.nan, (difference == 0).astype(np.float64))


def same_length_win_rate(
    credits: FloatArray, own_lengths: FloatArray, start_lengths: FloatArray, clusters: Clusters
) -> Statistic:
    """The win rate that is left for answers of equal length.

    `P(win) = σ(a + b tanh(Δ/s))`, `Δ` the difference of the lengths, `s` its standard deviation, by maximum likelihood
    with ties as half a win; the result is `σ(a)`. On resampled clusters the fit is redone by one Newton step from the
    whole sample's. Undefined (nan) where one side always wins, or length alone tells who does.

    Source: Dubois et al. 2024, "Length-controlled AlpacaEval", arXiv:2404.04475, without its terms for
    single prompts.

    Args:
        credits: `[P, K, N]` as `win_tables` gives them.
        own_lengths: `[P, K]`.
        start_lengths: `[P, N]`.
        clusters: of the prompts.
    """
    prompts, own, start = np.nonzero(~np.isnan(credits))
    y = credits[prompts, own, start]
    difference = own_lengths[prompts, own] - start_lengths[prompts, start]
    spread = float(difference.std()) if y.size else 0.0
    x = np.stack([np.ones_like(y), np.tanh(difference / (spread or 1.0))], axis=1)
    # Each prompt weighs the same, however many pairs it has.
    weight = 1.0 / np.bincount(prompts, minlength=len(credits))[prompts] if y.size else y
    fitted = _logistic(x, y, weight)
    if fitted is None:
        return Statistic(np.zeros((clusters.count, 5)), lambda sums: np.full(sums.shape[:-1], np.nan), 0)
    probability = expit(x @ fitted)
    gradient = (weight * (y - probability))[:, None] * x
    curvature = weight * probability * (1 - probability)
    terms = np.stack([curvature * x[:, i] * x[:, j] for i, j in ((0, 0), (0, 1), (1, 1))], axis=1)
    sums = cluster_sums(np.concatenate([gradient, terms], axis=1), clusters.index[prompts], clusters.count)
    return Statistic(sums, lambda total: expit(fitted[0] + _newton_step(total)[..., 0]), int(y.size))


def _logistic(x: FloatArray, y: FloatArray, weight: FloatArray, steps: int = 40) -> FloatArray | None:
    """`[2]` maximum likelihood coefficients; None where there is no finite maximum."""
    theta = np.zeros(2)
    for _ in range(steps):
        probability = expit(x @ theta)
        curvature = weight * probability * (1 - probability)
        hessian = (x * curvature[:, None]).T @ x
        if x.size == 0 or np.linalg.det(hessian) <= 1e-10 * max(float(np.trace(hessian)), 1e-300) ** 2:
            # All answers of one length: only the intercept can be told.
            share = float((weight * y).sum() / weight.sum()) if x.size else 0.0
            constant = x.size > 0 and float(np.ptp(x[:, 1])) == 0 and float(x[0, 1]) == 0
            return np.array([math.log(share / (1 - share)), 0.0]) if constant and 0 < share < 1 else None
        step = np.linalg.solve(hessian, x.T @ (weight * (y - probability)))
        theta = theta + step
        if np.abs(theta).max() > 25:
            return None
        if np.abs(step).max() < 1e-10:
            return theta
    return None


def _newton_step(total: FloatArray) -> FloatArray:
    """`H⁻¹ g` from sums `[..., 5]` of `g_0, g_1, H_00, H_01, H_11`; without the slope where it cannot be told."""
    g0, g1, h00, h01, h11 = np.moveaxis(total, -1, 0)
    determinant = h00 * h11 - h01 * h01
    singular = determinant <= 1e-10 * np.square(h00 + h11)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.stack([(h11 * g0 - h01 * g1) / determinant, (h00 * g1 - h01 * g0) / determinant], axis=-1)
        alone = np.stack([g0 / h00, np.zeros_like(g0)], axis=-1)
    return np.where(singular[..., None], alone, whole)


def answer_statistics(answers: Answers, clusters: Clusters, diversity_samples: int) -> dict[str, Statistic]:
    """Everything that needs no reward: divergence, entropy, lengths, ends, diversity.

    Args:
        answers: of one model.
        clusters: of the prompts.
        diversity_samples: how many answers to a prompt diversity is measured on, the same for all models.
    """
    known = answers.measures
    found: dict[str, Statistic] = {}
    for name in ("kl", "kl_k3", "tokens"):
        if name in known:
            found[name] = prompt_mean(known[name], clusters)
    for name, measure in (("kl_per_token", "kl"), ("kl_k3_per_token", "kl_k3"), ("entropy", "entropy")):
        if measure in known:
            found[name] = token_mean(known[measure], known["tokens"], clusters)
    counted = answers.table(lambda text: float(length(text, "words")))
    found["words"] = prompt_mean(counted, clusters)
    found["empty"] = prompt_mean(np.where(np.isnan(counted), np.nan, (counted == 0).astype(np.float64)), clusters)
    found["unfinished"] = prompt_mean(answers.unfinished(), clusters)
    chosen = [row[:diversity_samples] for row in answers.completions]
    cut = [[words(text) for text in row] for row in chosen]
    measured: dict[str, Callable[[int], float]] = {
        "distinct_1": lambda row: distinct_n(cut[row], 1),
        "distinct_2": lambda row: distinct_n(cut[row], 2),
        "distinct_3": lambda row: distinct_n(cut[row], 3),
        "self_bleu": lambda row: self_bleu(cut[row]),
        "same_answer": lambda row: same_answers(chosen[row]),
    }
    for name, function in measured.items():
        found[name] = prompt_mean(np.array([function(row) for row in range(len(cut))]), clusters)
    return {name: statistic for name, statistic in found.items() if statistic.count}


def reward_statistics(
    rewards: FloatArray, answers: Answers, start: FloatArray | None, clusters: Clusters
) -> dict[str, Statistic]:
    """Mean reward, share without one, and against the starting model win rate and ties.

    Args:
        rewards: `[P, K]`, nan where invalid (or where there is no answer).
        answers: the answers.
        start: `[P, N]` rewards of the starting model; None for the starting model itself.
        clusters: of the prompts.
    """
    exists = answers.table(lambda _: 1.0)
    invalid = np.where(np.isnan(exists), np.nan, np.isnan(rewards).astype(np.float64))
    found = {"reward": prompt_mean(rewards, clusters), "invalid": prompt_mean(invalid, clusters)}
    if start is not None:
        credits, tied = (table.reshape(len(rewards), -1) for table in win_tables(rewards, start))
        found |= {"win_rate": prompt_mean(credits, clusters), "ties": prompt_mean(tied, clusters)}
    return found


def difference(own: Statistic, start: Statistic) -> Statistic:
    """`own − start` of two ratios on the clusters that have both: paired."""
    both = (own.sums[:, -1] > 0) & (start.sums[:, -1] > 0)
    sums = np.where(both[:, None], np.concatenate([own.sums, start.sums], axis=1), 0.0)
    width = own.sums.shape[1]
    count = min(own.count, start.count) if both.any() else 0
    return Statistic(sums, lambda total: own.combine(total[..., :width]) - start.combine(total[..., width:]), count)


def estimates(
    statistics: Mapping[str, Statistic], clusters: Clusters, *, resamples: int, confidence: float, seed: int
) -> tuple[dict[str, Estimate], dict[str, FloatArray]]:
    """Every statistic with its interval, and its draws `[R]`; all on the same resampled clusters.

    A share that is 0 (or 1) in every cluster would get an interval of no width: it gets the exact one of as many
    independent clusters instead (Clopper and Pearson 1934), `0` to `1 − (½ − ½ confidence)^(1/C)`.
    """
    draws = bootstrap_draws(dict(statistics), clusters.count, resamples=resamples, seed=seed)
    found = {name: estimate(statistic, draws[name], confidence) for name, statistic in statistics.items()}
    for name, statistic in statistics.items():
        if resamples and name.partition("/")[0] in SHARES and statistic.sums.shape[1] == 2:
            found[name] = _at_the_edge(found[name], statistic, confidence)
    return found, draws


def _at_the_edge(found: Estimate, statistic: Statistic, confidence: float) -> Estimate:
    """The interval of a share that is 0 or 1 without exception; any other as it is."""
    clusters = int((statistic.sums[:, 1] > 0).sum())
    if not clusters or found.value not in (0.0, 1.0):
        return found
    reach = float(beta_distribution.ppf(0.5 + 0.5 * confidence, 1, clusters))
    return replace(found, low=0.0, high=reach) if found.value == 0.0 else replace(found, low=1.0 - reach, high=1.0)
