"""What a reward model's scores are worth: pure functions over numbers, no records, models or files.

Throughout, a *difference* is `d = r(x, y_preferred) - r(x, y_other)` of one judged pair, so that the model's
probability that people prefer the first is `p = sigma(d)` (Bradley and Terry, 1952). Every function that takes
differences looks at **both orders** of each pair, `(p, 1)` and `(1 - p, 0)`: the label is then 1 half of the time,
and swapping the completions of a pair changes nothing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import expit

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def _differences(differences: npt.ArrayLike) -> FloatArray:
    array = np.asarray(differences, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"differences must be a list of numbers [M], got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(
            f"difference {int(np.flatnonzero(~np.isfinite(array))[0])} is not finite: {array.tolist()[:5]}"
        )
    return array


def _weights(weights: npt.ArrayLike | None, count: int) -> FloatArray:
    if weights is None:
        return np.ones(count)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (count,):
        raise ValueError(f"{array.shape} weights for {count} pairs")
    if (array < 0).any() or not np.isfinite(array).all():
        raise ValueError("weights must be finite and not negative")
    return array


def weighted_mean(values: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """`sum w v / sum w` over `[M]` values; nan where the weights sum to 0."""
    array = np.asarray(values, dtype=np.float64)
    weight = _weights(weights, array.shape[0])
    total = float(weight.sum())
    return float(weight @ array) / total if total > 0 else float("nan")


def pair_credits(differences: npt.ArrayLike) -> FloatArray:
    """Credit for each judged pair: 1 where `d > 0`, 0 where `d < 0`, 1/2 where the model's two scores are equal.

    Args:
        differences: `[M]` reward of the preferred minus reward of the other.

    Returns:
        `[M]` in {0, 1/2, 1}. With the half, a model that gives everything the same score has accuracy 1/2, and the
        mean is the area under the ROC curve of the differences in both orders (Bradley, 1997).
    """
    return 0.5 * (np.sign(_differences(differences)) + 1.0)


def pair_accuracy(differences: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """`mean of 1[d > 0] + 1/2 1[d = 0]` over pairs that people did not tie; nan without pairs."""
    return weighted_mean(pair_credits(differences), weights)


def pair_log_losses(differences: npt.ArrayLike) -> FloatArray:
    """`-log sigma(d)` for each of `[M]` pairs, in nats; stable for any size of `d`; `log 2` is knowing nothing."""
    return np.logaddexp(0.0, -_differences(differences))


def pair_log_loss(differences: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Mean of `-log sigma(d)` in nats; both orders of a pair lose the same, so it is scikit-learn's `log_loss`."""
    return weighted_mean(pair_log_losses(differences), weights)


def pair_brier_scores(differences: npt.ArrayLike) -> FloatArray:
    """`(1 - sigma(d))^2` for each of `[M]` pairs (Brier, 1950, one event); 1/4 is knowing nothing."""
    return np.asarray(expit(-_differences(differences)) ** 2)


def pair_brier(differences: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Mean of `(1 - sigma(d))^2`; the same in both orders, so it equals scikit-learn's `brier_score_loss`."""
    return weighted_mean(pair_brier_scores(differences), weights)


@dataclass(frozen=True)
class CalibrationBins:
    """Which bin each prediction falls into, for both orders of `[M]` pairs.

    Attributes:
        edges: `[B - 1]` inner edges, in probability.
        forward: `[M]` bin of `p = sigma(d)`, whose label is 1.
        backward: `[M]` bin of `1 - p`, whose label is 0.
        count: `B`, the number of bins.
    """

    edges: FloatArray
    forward: IntArray
    backward: IntArray

    @property
    def count(self) -> int:
        """`B`, the number of bins."""
        return int(self.edges.shape[0]) + 1


def calibration_bins(differences: npt.ArrayLike, bins: int = 10) -> CalibrationBins:
    """Equal-mass bins over the predictions of both orders of each pair.

    Equal predictions always share a bin (otherwise their order would decide the calibration error), so heavily tied
    scores give fewer bins than asked for.

    Args:
        differences: `[M]`.
        bins: how many bins to aim for, at least 1.

    Raises:
        ValueError: if `bins` is below 1.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    d = _differences(differences)
    forward, backward = expit(d), expit(-d)
    predictions = np.sort(np.concatenate([forward, backward]))
    if predictions.size == 0:
        empty = np.zeros(0, dtype=np.int64)
        return CalibrationBins(np.zeros(0), empty, empty)
    places = (np.arange(1, bins) * predictions.size) // bins
    edges = np.unique(predictions[places]) if bins > 1 else np.zeros(0)
    edges = edges[edges > predictions[0]]
    return CalibrationBins(
        edges,
        np.searchsorted(edges, forward, side="right").astype(np.int64),
        np.searchsorted(edges, backward, side="right").astype(np.int64),
    )


def calibration_sums(
    differences: npt.ArrayLike, bins: CalibrationBins, weights: npt.ArrayLike | None = None
) -> FloatArray:
    """`[B, 3]` sums per bin over both orders: weight, weight times prediction, weight times label."""
    d = _differences(differences)
    weight = _weights(weights, d.shape[0])
    sums = np.zeros((bins.count, 3))
    for index, prediction, label in ((bins.forward, expit(d), 1.0), (bins.backward, expit(-d), 0.0)):
        sums[:, 0] += np.bincount(index, weight, bins.count)
        sums[:, 1] += np.bincount(index, weight * prediction, bins.count)
        sums[:, 2] += np.bincount(index, weight * label, bins.count)
    return sums


@dataclass(frozen=True)
class ReliabilityCurve:
    """The reliability diagram: per bin `[B]` the mean prediction, how often it came true, and the weight behind it."""

    predicted: FloatArray
    observed: FloatArray
    weight: FloatArray


def reliability_curve(
    differences: npt.ArrayLike, bins: int = 10, weights: npt.ArrayLike | None = None
) -> ReliabilityCurve:
    """Mean prediction against observed frequency in equal-mass bins, both orders of each pair.

    Equal to scikit-learn's `calibration_curve(strategy="quantile")` up to where the edges between tied predictions
    fall. The weight counts a pair twice, once per order. Empty bins are left out.
    """
    sums = calibration_sums(differences, calibration_bins(differences, bins), weights)
    sums = sums[sums[:, 0] > 0]
    return ReliabilityCurve(sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0], sums[:, 0])


def expected_calibration_error(
    differences: npt.ArrayLike, bins: int = 10, weights: npt.ArrayLike | None = None
) -> float:
    """`ECE = sum_b (n_b / n) |mean label_b - mean prediction_b|` with equal-mass bins, both orders of each pair.

    Source: Naeini, Cooper and Hauskrecht, 2015; equal mass as in Nixon et al., 2019. It is biased upwards on few
    pairs: compare it with `calibration_noise`.
    """
    sums = calibration_sums(differences, calibration_bins(differences, bins), weights)
    total = sums[:, 0].sum()
    return float(np.abs(sums[:, 2] - sums[:, 1]).sum() / total) if total > 0 else float("nan")


def calibration_noise(differences: npt.ArrayLike, bins: int = 10, weights: npt.ArrayLike | None = None) -> float:
    """The calibration error that a *perfectly* calibrated model with these predictions would still show by chance.

    With pair `i` in bin `b` by `c_ib in {1, -1, 0}` (forward, backward; 0 if neither or both), the bin's summed
    residual has variance `V_b = sum_i (w_i c_ib)^2 p_i (1 - p_i)`, so by the normal approximation
    `E[ECE] = sum_b sqrt(2 V_b / pi) / sum_b n_b`, pairs taken as independent.
    """
    d = _differences(differences)
    weight = _weights(weights, d.shape[0])
    found = calibration_bins(d, bins)
    variance = weight**2 * expit(d) * expit(-d) * (found.forward != found.backward)
    per_bin = np.bincount(found.forward, variance, found.count) + np.bincount(found.backward, variance, found.count)
    total = 2.0 * weight.sum()
    return float(np.sqrt(2.0 * per_bin / np.pi).sum() / total) if total > 0 else float("nan")


def temperature(differences: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """The maximum-likelihood `T` in `p = sigma(d / T)`: 1 is calibrated, above 1 overconfident, below 1 too timid.

    Solves `sum_i w_i d_i sigma(-s d_i) = 0` for `s = 1 / T`, which is convex (temperature scaling, Guo et al., 2017);
    `1 / T` equals the coefficient of an unpenalised logistic regression without intercept on both orders.

    Returns:
        `inf` where people disagree with the scores on balance (`sum w d <= 0`: no positive scale helps), 0 where no
        pair at all is scored the wrong way round (any larger scale is likelier), nan without pairs.
    """
    d = _differences(differences)
    weight = _weights(weights, d.shape[0])
    d, weight = d[weight > 0], weight[weight > 0]
    if d.size == 0:
        return float("nan")
    largest = float(np.abs(d).max())
    if float(weight @ d) <= 0.0 or largest == 0.0:
        return float("inf")
    if (d >= 0).all():
        return 0.0
    unit = d / largest

    def slope(s: float) -> float:
        return float((weight * unit) @ expit(-s * unit))

    high = 1.0
    while slope(high) > 0.0:
        high *= 2.0
    return largest / float(brentq(slope, 0.0, high, xtol=1e-12, rtol=1e-12))


def top_credit(scores: npt.ArrayLike, best: npt.ArrayLike) -> float:
    """Best-of-K credit of one prompt: the share of the model's top completions that people also put on top.

    `|M and S| / |M|` with `M` the completions that share the model's maximum and `S` those that people put first. A
    model with equal scores gets `|S| / K`, exactly what guessing gets.

    Args:
        scores: `[K]` rewards of the judged completions.
        best: `[K]` bool, True for the completions in the first tier.
    """
    values, first = np.asarray(scores, dtype=np.float64), np.asarray(best, dtype=bool)
    if values.shape != first.shape or values.ndim != 1 or values.size == 0:
        raise ValueError(f"scores {values.shape} and best {first.shape} must both be [K] with K >= 1")
    return float(first[values == values.max()].mean())


def kendall_tau_b(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Kendall's tau-b of two `[K]` lists: `(C - D) / sqrt((n0 - ties_x) (n0 - ties_y))`, `n0 = K (K - 1) / 2`.

    Equal to `scipy.stats.kendalltau`; nan where either list is constant. Source: Kendall, 1945.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"two lists of one length expected, got shapes {a.shape} and {b.shape}")
    upper = np.triu_indices(a.size, 1)
    sign_a = np.sign(a[:, None] - a[None, :])[upper]
    sign_b = np.sign(b[:, None] - b[None, :])[upper]
    untied = float(np.abs(sign_a).sum()) * float(np.abs(sign_b).sum())
    return float(sign_a @ sign_b) / float(np.sqrt(untied)) if untied > 0 else float("nan")


def ndcg(relevance: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Normalised discounted cumulative gain of one prompt: `DCG / ideal DCG`, `DCG = sum_j rel_(j) / log2(j + 1)`.

    Linear gains, every rank counts, and completions with equal scores share the mean of their gains over all orders,
    so it equals scikit-learn's `ndcg_score`. Source: Järvelin and Kekäläinen, 2002; ties: McSherry and Najork, 2008.

    Args:
        relevance: `[K]` not negative, higher is better.
        scores: `[K]` rewards.

    Returns:
        A number in `[0, 1]`; nan where nothing is relevant.
    """
    gains, values = np.asarray(relevance, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if gains.shape != values.shape or gains.ndim != 1:
        raise ValueError(f"relevance {gains.shape} and scores {values.shape} must both be [K]")
    if (gains < 0).any():
        raise ValueError(f"relevance must not be negative, got {gains.tolist()}")
    discount = 1.0 / np.log2(np.arange(gains.size) + 2.0)
    ideal = float(np.sort(gains)[::-1] @ discount)
    if ideal == 0.0:
        return float("nan")
    _, level, sizes = np.unique(-values, return_inverse=True, return_counts=True)
    mean_gain = np.bincount(level, gains, sizes.size) / sizes
    return float(np.repeat(mean_gain, sizes) @ discount) / ideal


def partial_correlation(sums: FloatArray) -> FloatArray:
    """Correlation of x and y given z, from centred second moments.

    `(r_xy - r_xz r_yz) / sqrt((1 - r_xz^2) (1 - r_yz^2))` (Yule, 1907). With moments centred within each prompt it
    is the partial correlation with one fixed effect per prompt.

    Args:
        sums: `[..., 6]` sums of `xx, yy, zz, xy, xz, yz`. With `zz = 0` this is the plain correlation of x and y.

    Returns:
        `[...]`; nan where x or y does not vary beyond z.
    """
    xx, yy, zz, xy, xz, yz = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where(zz > 0, 1.0 / np.where(zz > 0, zz, 1.0), 0.0)
        rest_xx, rest_yy = xx - xz * xz * inverse, yy - yz * yz * inverse
        usable = (rest_xx > 1e-12 * xx) & (rest_yy > 1e-12 * yy)
        result = (xy - xz * yz * inverse) / np.sqrt(np.where(usable, rest_xx * rest_yy, 1.0))
    return np.where(usable, np.clip(result, -1.0, 1.0), np.nan)
