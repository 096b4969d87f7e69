"""The cluster bootstrap: against a loop, its coverage on clustered data, pairing, and its speed."""

import time

import numpy as np
import pytest

from plaudit.data.records import Comparison, Ranking
from plaudit.evaluation import intervals
from plaudit.evaluation.evaluate import compare, evaluate_models
from plaudit.evaluation.metrics import pair_credits


def test_draws_equal_a_plain_loop_over_clusters():
    generator = np.random.default_rng(0)
    clusters = generator.integers(0, 12, 60)
    values, weights = generator.normal(size=60), generator.uniform(0.5, 2, 60)
    statistic = intervals.mean_statistic(values, clusters, 12, weights)
    assert statistic.value == pytest.approx(np.average(values, weights=weights))
    draws = intervals.bootstrap_draws({"mean": statistic}, 12, resamples=50, seed=3)["mean"]
    picked = np.random.default_rng(3).integers(0, 12, size=(50, 12))
    for row, draw in zip(picked, draws, strict=True):
        items = np.concatenate([np.flatnonzero(clusters == cluster) for cluster in row])
        assert draw == pytest.approx(np.average(values[items], weights=weights[items]))


def test_memory_bound_does_not_change_the_draws():
    generator = np.random.default_rng(0)
    statistic = intervals.mean_statistic(generator.normal(size=30), np.arange(30) % 7, 7)
    whole = intervals.bootstrap_draws({"a": statistic}, 7, resamples=100, seed=1)["a"]
    pieces = intervals.bootstrap_draws({"a": statistic}, 7, resamples=100, seed=1, chunk=50)["a"]
    assert whole.tolist() == pieces.tolist()


def clustered_pairs(generator, prompts, pairs):
    """Credits whose chance of success varies by prompt: mean 0.65, strongly correlated within a prompt."""
    chance = generator.beta(1.3, 0.7, prompts)
    clusters = np.repeat(np.arange(prompts), pairs)
    return pair_credits(np.where(generator.uniform(size=clusters.size) < chance[clusters], 1.0, -1.0)), clusters


def test_coverage_is_nominal_by_cluster_and_too_low_without():
    """Expected coverage 95 %; with 400 repetitions the standard error is 1.1 points. Ignoring the clusters of 20
    correlated pairs narrows the interval about threefold: coverage falls below 60 %."""
    generator = np.random.default_rng(11)
    hits, naive_hits, repetitions, naive_repetitions = 0, 0, 400, 80
    for repetition in range(repetitions):
        credits, clusters = clustered_pairs(generator, 80, 20)
        for name, index in (("cluster", clusters), ("naive", np.arange(credits.size))):
            if name == "naive" and repetition >= naive_repetitions:
                continue
            statistic = intervals.mean_statistic(credits, index, int(index.max()) + 1)
            draws = intervals.bootstrap_draws({"a": statistic}, int(index.max()) + 1, resamples=200, seed=repetition)
            found = intervals.estimate(statistic, draws["a"])
            inside = found.low <= 0.65 <= found.high
            if name == "cluster":
                hits += inside
            else:
                naive_hits += inside
    assert 0.91 <= hits / repetitions <= 0.98
    assert naive_hits / naive_repetitions < 0.60


def test_paired_differences_are_narrower_than_the_difference_of_unpaired():
    generator = np.random.default_rng(5)
    base, clusters = clustered_pairs(generator, 300, 4)
    other = np.where(generator.uniform(size=base.size) < 0.05, 1 - base, base)
    statistics = {name: intervals.mean_statistic(v, clusters, 300) for name, v in (("a", base), ("b", other))}
    draws = intervals.bootstrap_draws(statistics, 300, seed=2)
    paired = intervals.paired_difference(
        (statistics["a"].value, draws["a"]), (statistics["b"].value, draws["b"]), base.size
    )
    again = intervals.bootstrap_draws({"b": statistics["b"]}, 300, seed=99)["b"]
    unpaired = intervals.paired_difference((statistics["a"].value, draws["a"]), (statistics["b"].value, again), 1)
    assert paired.value == pytest.approx(base.mean() - other.mean())
    assert (paired.high - paired.low) < 0.5 * (unpaired.high - unpaired.low)
    same = intervals.paired_difference((1.0, draws["a"]), (1.0, draws["a"]), 1)
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)


def test_separate_calls_with_one_seed_are_paired():
    statistic = intervals.mean_statistic(np.arange(10.0), np.arange(10), 10)
    first = intervals.bootstrap_draws({"a": statistic}, 10, seed=4)["a"]
    second = intervals.bootstrap_draws({"x": statistic, "a": statistic}, 10, seed=4)["a"]
    assert first.tolist() == second.tolist()


def test_edges():
    empty = intervals.mean_statistic(np.zeros(0), np.zeros(0, dtype=np.int64), 3)
    found = intervals.estimate(empty, intervals.bootstrap_draws({"a": empty}, 3)["a"])
    assert np.isnan([found.value, found.low, found.high]).all()
    assert found.count == 0
    one = intervals.mean_statistic(np.ones(5), np.zeros(5, dtype=np.int64), 1)
    found = intervals.estimate(one, intervals.bootstrap_draws({"a": one}, 1)["a"])
    assert found.value == 1.0
    assert np.isnan(found.low)
    with pytest.raises(ValueError, match="clusters"):
        intervals.bootstrap_draws({"a": one}, 2)
    with pytest.raises(ValueError, match="paired"):
        intervals.paired_difference((0.0, np.zeros(2)), (0.0, np.zeros(3)), 1)


def test_one_prompt_makes_no_difference_certain():
    comparison = Comparison(prompt="p", completions=("a", "b", "c"), judgement=Ranking(((0,), (1,), (2,))))
    scores = {"right": [[3.0, 2.0, 1.0]], "wrong": [[1.0, 2.0, 3.0]]}
    for found in compare(evaluate_models([comparison], scores)):
        assert np.isnan([found.difference.low, found.difference.high]).all(), found


def test_intervals_ignore_undefined_draws_unless_they_are_most():
    assert intervals.percentile_interval(np.array([1.0, 1.0, np.nan])) == (1.0, 1.0)
    assert np.isnan(intervals.percentile_interval(np.array([1.0, np.nan, np.nan]))[0])


def test_two_thousand_resamples_of_two_thousand_prompts_are_quick():
    generator = np.random.default_rng(0)
    credits, clusters = clustered_pairs(generator, 2000, 6)
    statistics = {f"m{i}": intervals.mean_statistic(credits, clusters, 2000) for i in range(20)}
    start = time.perf_counter()
    intervals.bootstrap_draws(statistics, 2000, resamples=2000)
    assert time.perf_counter() - start < 3.0  # about 0.2 s; the bound is loose because machines are shared
