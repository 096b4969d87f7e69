"""Intervals by bootstrap over clusters: whole prompts (or groups) are redrawn, never single pairs.

The pairs of one prompt share their completions and often their annotator, so they are not independent; treating them
as if they were gives intervals that are too narrow. Every metric is written as a function of *sums over clusters*,
so one matrix product redraws it thousands of times, and every model is redrawn with the same clusters, which makes
differences between models paired.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from plaudit.evaluation.metrics import FloatArray, IntArray


@dataclass(frozen=True)
class Statistic:
    """A metric that depends on the data only through sums.

    Attributes:
        sums: `[C, m]` what each cluster contributes to the `m` sums.
        combine: from sums `[..., m]` to the metric `[...]`.
        count: how many items (pairs, prompts) stand behind it.
    """

    sums: FloatArray
    combine: Callable[[FloatArray], FloatArray]
    count: int

    @property
    def value(self) -> float:
        """The metric on the data as it is; nan where nothing stands behind it."""
        return float(self.combine(self.sums.sum(axis=0))) if self.count else float("nan")


@dataclass(frozen=True)
class Estimate:
    """A number with its interval and the number of items behind it; nan bounds where there is no interval."""

    value: float
    low: float
    high: float
    count: int


def ratio_of_sums(sums: FloatArray) -> FloatArray:
    """`sum a / sum b` from `[..., 2]`; nan where `sum b` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / np.where(sums[..., 1] > 0, sums[..., 1], 1.0), np.nan)


def cluster_sums(values: FloatArray, clusters: IntArray, num_clusters: int) -> FloatArray:
    """Sum the rows of `values [M, m]` by cluster: `[C, m]`.

    Args:
        values: what each item contributes.
        clusters: `[M]` in `0..C-1`.
        num_clusters: `C`.
    """
    columns = [np.bincount(clusters, values[:, j], num_clusters) for j in range(values.shape[1])]
    return np.stack(columns, axis=1) if columns else np.zeros((num_clusters, 0))


def mean_statistic(
    values: FloatArray, clusters: IntArray, num_clusters: int, weights: FloatArray | None = None
) -> Statistic:
    """The weighted mean of `[M]` items as a `Statistic`: `sum w v / sum w`."""
    weight = np.ones_like(values) if weights is None else weights
    sums = cluster_sums(np.stack([weight * values, weight], axis=1), clusters, num_clusters)
    return Statistic(sums, ratio_of_sums, int(values.shape[0]))


def resampled_counts(num_clusters: int, resamples: int, generator: np.random.Generator) -> FloatArray:
    """`[R, C]` how often each cluster is drawn in each resample: `C` draws with replacement per row."""
    drawn = generator.integers(0, num_clusters, size=(resamples, num_clusters))
    drawn += np.arange(resamples)[:, None] * num_clusters
    return np.bincount(drawn.ravel(), minlength=resamples * num_clusters).reshape(resamples, -1).astype(np.float64)


def bootstrap_draws(
    statistics: dict[str, Statistic], num_clusters: int, *, resamples: int = 2000, seed: int = 0, chunk: int = 4_000_000
) -> dict[str, FloatArray]:
    """Redraw every statistic on the same resampled clusters.

    Args:
        statistics: by name, all with `C = num_clusters` rows of sums.
        num_clusters: `C`.
        resamples: `R`.
        seed: of the generator; the same seed and `C` give the same clusters, so draws of different calls are paired.
        chunk: bounds the memory: about this many counts are held at a time.

    Returns:
        `[R]` per name. nan where a resample leaves the metric undefined.

    Raises:
        ValueError: if a statistic has another number of clusters.
    """
    for name, statistic in statistics.items():
        if statistic.sums.shape[0] != num_clusters:
            raise ValueError(f"{name}: sums of {statistic.sums.shape[0]} clusters, expected {num_clusters}")
    draws = {name: np.full(resamples, np.nan) for name in statistics}
    usable = [name for name, statistic in statistics.items() if statistic.count]
    if num_clusters == 0 or not usable:
        return draws
    stacked = np.concatenate([statistics[name].sums for name in usable], axis=1)
    widths = np.cumsum([statistics[name].sums.shape[1] for name in usable])[:-1]
    generator = np.random.default_rng(seed)
    step = max(1, chunk // num_clusters)
    for start in range(0, resamples, step):
        stop = min(resamples, start + step)
        totals = resampled_counts(num_clusters, stop - start, generator) @ stacked
        for name, part in zip(usable, np.split(totals, widths, axis=1), strict=True):
            draws[name][start:stop] = statistics[name].combine(part)
    return draws


def percentile_interval(draws: FloatArray, confidence: float = 0.95) -> tuple[float, float]:
    """The central `confidence` share of the draws (percentile interval, Efron, 1979).

    Draws that are nan are left out; `(nan, nan)` where fewer than half are defined.
    """
    defined = draws[~np.isnan(draws)]
    if defined.size < max(1, draws.size / 2):
        return float("nan"), float("nan")
    tail = 0.5 * (1.0 - confidence)
    low, high = np.quantile(defined, [tail, 1.0 - tail], method="inverted_cdf")
    return float(low), float(high)


def estimate(statistic: Statistic, draws: FloatArray, confidence: float = 0.95) -> Estimate:
    """The value of a statistic with its percentile interval; without an interval if only one cluster contributes."""
    contributing = int((statistic.sums != 0).any(axis=1).sum())
    low, high = percentile_interval(draws, confidence) if contributing > 1 else (float("nan"), float("nan"))
    return Estimate(statistic.value, low, high, statistic.count)


def paired_difference(
    first: tuple[float, FloatArray], second: tuple[float, FloatArray], count: int, confidence: float = 0.95
) -> Estimate:
    """`first - second` with its interval from draws on the *same* resampled clusters.

    Args:
        first: value and `[R]` draws.
        second: value and `[R]` draws, redrawn with the same seed and clusters.
        count: how many items stand behind both.
    """
    if first[1].shape != second[1].shape:
        raise ValueError(f"{first[1].shape} draws cannot be paired with {second[1].shape}")
    with np.errstate(invalid="ignore"):
        draws = first[1] - second[1]
    low, high = percentile_interval(draws, confidence)
    return Estimate(first[0] - second[0], low, high, count)
