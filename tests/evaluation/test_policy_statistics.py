"""The numbers that policies are compared by: by hand, brute force, scipy, scikit-learn, simulated coverage, edges."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression

from plaudit.evaluation.intervals import Statistic, estimate
from plaudit.evaluation.policy_answers import Answers, given_answers
from plaudit.evaluation.policy_statistics import (
    METRICS,
    SHARES,
    answer_statistics,
    clusters_of,
    difference,
    estimates,
    prompt_mean,
    reward_statistics,
    same_length_win_rate,
    token_mean,
    win_tables,
)

NAN = math.nan
OPTIONS = {"resamples": 400, "confidence": 0.95, "seed": 0}


def alone(count):
    return clusters_of([None] * count)


def test_win_tables_by_hand():
    credits, tied = win_tables(np.array([[2.0, NAN]]), np.array([[1.0, 2.0, 3.0, NAN]]))
    assert credits[0, 0, :3].tolist() == [1.0, 0.5, 0.0]
    assert tied[0, 0, :3].tolist() == [0.0, 1.0, 0.0]
    assert np.isnan(credits[0, 0, 3])
    assert np.isnan(credits[0, 1]).all()
    assert np.isnan(tied[0, 1]).all()


def test_win_rate_equals_a_plain_loop_and_is_the_complement():
    generator = np.random.default_rng(0)
    own, start = generator.integers(0, 4, (9, 3)).astype(float), generator.integers(0, 4, (9, 5)).astype(float)
    own[2, 1] = start[4, 0] = NAN
    own[7] = NAN
    answers = given_answers([["x"] * 3] * 9)
    found = reward_statistics(own, answers, start, alone(9))
    per_prompt = []
    for row in range(9):
        pairs = [(a, b) for a, b in itertools.product(own[row], start[row]) if not math.isnan(a + b)]
        if pairs:
            per_prompt.append(np.mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))
    assert found["win_rate"].value == pytest.approx(np.mean(per_prompt))
    other = reward_statistics(start, given_answers([["x"] * 5] * 9), own, alone(9))
    assert other["win_rate"].value == pytest.approx(1 - found["win_rate"].value)
    assert found["invalid"].value == pytest.approx((1 + 3) / 27)
    assert found["reward"].value == pytest.approx(np.nanmean([np.nanmean(row) for row in np.delete(own, 7, 0)]))
    assert found["win_rate"].count == sum((~np.isnan(own[r])).sum() * (~np.isnan(start[r])).sum() for r in range(9))


def test_a_model_against_itself_is_a_tie():
    rewards = np.random.default_rng(0).normal(size=(20, 4))
    found = reward_statistics(rewards, given_answers([["x"] * 4] * 20), rewards, alone(20))
    assert found["win_rate"].value == 0.5


def test_all_ties():
    rewards = np.zeros((6, 2))
    statistics = reward_statistics(rewards, given_answers([["x", "y"]] * 6), rewards, alone(6))
    found, _ = estimates(statistics, alone(6), **OPTIONS)
    win = found["win_rate"]
    assert (win.value, win.low, win.high) == (0.5, 0.5, 0.5)
    assert found["ties"].value == 1.0
    assert found["ties"].low == pytest.approx(binomtest(6, 6).proportion_ci(0.95).low)


def test_everything_invalid():
    nothing = np.full((4, 2), NAN)
    statistics = reward_statistics(nothing, given_answers([["x", "y"]] * 4), np.zeros((4, 3)), alone(4))
    found, _ = estimates(statistics, alone(4), **OPTIONS)
    assert math.isnan(found["reward"].value)
    assert math.isnan(found["win_rate"].value)
    assert found["reward"].count == found["win_rate"].count == 0
    assert found["invalid"].value == 1.0


def test_one_prompt_has_no_interval():
    statistics = reward_statistics(
        np.array([[1.0, 2.0]]), given_answers([["x", "y"]]), np.array([[0.0, 1.5]]), alone(1)
    )
    found, _ = estimates(statistics, alone(1), **OPTIONS)
    assert found["reward"].value == 1.5
    assert math.isnan(found["reward"].low)
    assert found["win_rate"].value == 0.75
    assert math.isnan(found["win_rate"].low)


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_winning_always_gets_an_exact_interval(won):
    own = np.full((8, 1), 2 * won - 1)
    statistics = reward_statistics(own, given_answers([["x"]] * 8), np.zeros((8, 2)), alone(8))
    found = estimates(statistics, alone(8), **OPTIONS)[0]["win_rate"]
    wanted = binomtest(int(8 * won), 8).proportion_ci(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))


def test_coverage_of_win_rate_and_paired_gain():
    """400 repetitions of 80 prompts with 2 and 3 answers: 95 % intervals hold the truth 91 to 98 times in 100 (standard
    error 1.1). Unpaired, the interval of the gain would be far too wide: prompts differ more than models."""
    generator = np.random.default_rng(5)
    hits, widths = np.zeros(2), []
    clusters = alone(80)
    answers, base_answers = given_answers([["x"] * 2] * 80), given_answers([["x"] * 3] * 80)
    # P(win) of two normals that differ by 0.5 with variance 1 each; the prompt's level cancels.
    truth = 0.6381631950841185
    for repetition in range(400):
        level = 3 * generator.normal(size=(80, 1))
        own = level + 0.5 + generator.normal(size=(80, 2))
        start = level + generator.normal(size=(80, 3))
        found = reward_statistics(own, answers, start, clusters)
        base = reward_statistics(start, base_answers, None, clusters)
        gain = difference(found["reward"], base["reward"])
        shown, _ = estimates(
            {"win_rate": found["win_rate"], "gain": gain}, clusters, resamples=200, confidence=0.95, seed=repetition
        )
        hits += [
            shown["win_rate"].low <= truth <= shown["win_rate"].high,
            shown["gain"].low <= 0.5 <= shown["gain"].high,
        ]
        widths.append(shown["gain"].high - shown["gain"].low)
    assert ((hits / 400 > 0.91) & (hits / 400 < 0.98)).all()
    assert np.mean(widths) < 0.6  # 4 · sqrt((1/2 + 1/3) / 80) = 0.41; unpaired 4 · 3 · sqrt(2/80) = 1.9


def test_groups_are_redrawn_whole():
    groups = clusters_of(["a", None, "a", "b", "b", None])
    assert groups.index.tolist() == [0, 1, 0, 2, 2, 3]
    assert groups.count == 4
    values = np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    statistic = prompt_mean(values, groups)
    assert statistic.value == 3.5
    assert statistic.sums.tolist() == [[4.0, 2.0], [2.0, 1.0], [9.0, 2.0], [6.0, 1.0]]


def test_differences_pair_what_both_have():
    clusters = alone(4)
    own = prompt_mean(np.array([[1.0], [2.0], [NAN], [10.0]]), clusters)
    start = prompt_mean(np.array([[0.0], [0.5], [7.0], [NAN]]), clusters)
    found = difference(own, start)
    assert found.value == pytest.approx(1.25)
    nothing = difference(own, prompt_mean(np.full((4, 1), NAN), clusters))
    assert nothing.count == 0
    assert math.isnan(nothing.value)


def test_token_means_weigh_tokens():
    found = token_mean(np.array([[2.0, 9.0], [4.0, NAN]]), np.array([[1.0, 3.0], [4.0, NAN]]), alone(2))
    assert found.value == pytest.approx(15 / 8)


def simulated_lengths(generator, prompts, gain, slope):
    own_lengths = generator.uniform(50, 250, (prompts, 2))
    start_lengths = generator.uniform(20, 180, (prompts, 2))
    gap = own_lengths[:, :, None] - start_lengths[:, None, :]
    x = np.tanh(gap / gap.std())
    credits = (generator.uniform(size=gap.shape) < 1 / (1 + np.exp(-(gain + slope * x)))).astype(float)
    return credits, own_lengths, start_lengths, x


def test_same_length_win_rate_is_a_logistic_regression():
    generator = np.random.default_rng(2)
    credits, own, start, x = simulated_lengths(generator, 300, -0.4, 2.0)
    found = same_length_win_rate(credits, own, start, alone(300))
    peer = LogisticRegression(C=1e9, tol=1e-10).fit(x.reshape(-1, 1), credits.reshape(-1))
    assert found.value == pytest.approx(1 / (1 + np.exp(-peer.intercept_[0])), abs=1e-4)
    # It wins by length alone: more than half of the pairs, but fewer at equal length.
    assert credits.mean() > 0.52
    assert found.value < 0.45


def test_same_length_win_rate_covers_the_truth():
    generator = np.random.default_rng(4)
    truth, hits = 1 / (1 + np.exp(0.4)), 0
    for repetition in range(200):
        credits, own, start, _ = simulated_lengths(generator, 120, -0.4, 1.5)
        statistic = same_length_win_rate(credits, own, start, alone(120))
        found, _ = estimates({"x": statistic}, alone(120), resamples=200, confidence=0.95, seed=repetition)
        hits += found["x"].low <= truth <= found["x"].high
    assert 0.90 <= hits / 200 <= 0.99


def test_same_length_win_rate_at_the_edges():
    lengths = np.full((5, 1), 3.0)
    credits = np.array([1.0, 1.0, 1.0, 0.0, 0.5]).reshape(5, 1, 1)
    assert same_length_win_rate(credits, lengths, lengths, alone(5)).value == pytest.approx(0.7)
    won = same_length_win_rate(np.ones((5, 1, 1)), lengths, lengths, alone(5))
    assert math.isnan(won.value)
    assert won.count == 0
    # Length alone tells who wins: no finite fit.
    longer = np.array([10.0, 20, 1, 2, 30]).reshape(5, 1)
    separated = same_length_win_rate(
        (longer > 5).astype(float).reshape(5, 1, 1), longer, np.full((5, 1), 5.0), alone(5)
    )
    assert math.isnan(separated.value)
    assert same_length_win_rate(np.full((5, 1, 1), NAN), lengths, lengths, alone(5)).count == 0
    halves = same_length_win_rate(np.full((5, 1, 1), 0.5), longer, lengths, alone(5))
    assert halves.value == pytest.approx(0.5)


def test_answers_without_a_model_and_with_nothing_in_them():
    answers = Answers([["", "two words"], ["三个字"]], [[True, False], [None]])
    found = answer_statistics(answers, alone(2), 1)
    assert found["words"].value == pytest.approx((1 + 3) / 2)
    assert found["empty"].value == pytest.approx((0.5 + 0) / 2)
    assert found["unfinished"].value == 0.5
    assert found["unfinished"].count == 2
    assert not set(found) & {"kl", "entropy", "tokens", "self_bleu", "same_answer"}
    assert set(found) <= set(METRICS)
    assert set(METRICS) >= SHARES


def test_measures_of_the_model():
    answers = Answers(
        [["a b", "a b"], ["c", "d e"]], [[True] * 2] * 2,
        {"tokens": np.array([[2.0, 4.0], [1.0, 3.0]]), "kl": np.array([[1.0, 2.0], [0.0, -1.0]]),
         "kl_k3": np.array([[1.0, 1.0], [0.5, 0.5]]), "entropy": np.array([[2.0, 2.0], [1.0, 5.0]])},
    )  # fmt: skip
    found = {name: statistic.value for name, statistic in answer_statistics(answers, alone(2), 2).items()}
    assert found["kl"] == 0.5
    assert found["kl_k3"] == 0.75
    assert found["kl_per_token"] == pytest.approx(2 / 10)
    assert found["kl_k3_per_token"] == pytest.approx(3 / 10)
    assert found["entropy"] == 1.0
    assert found["tokens"] == 2.5
    assert found["same_answer"] == 0.5
    assert found["distinct_1"] == pytest.approx((2 / 4 + 3 / 3) / 2)


def test_answers_that_do_not_fit_together():
    with pytest.raises(ValueError, match="prompt 1 has no answer"):
        Answers([["a"], []], [[True], []])
    with pytest.raises(ValueError, match="one entry per completion"):
        Answers([["a"]], [[True, False]])
    with pytest.raises(ValueError, match=r"measure 'kl' is \(1, 2\); it must be \(1, 1\)"):
        Answers([["a"]], [[True]], {"kl": np.zeros((1, 2))})


def test_estimates_are_those_of_the_bootstrap():
    statistic = prompt_mean(np.random.default_rng(0).normal(size=(30, 2)), alone(30))
    found, draws = estimates({"reward": statistic}, alone(30), **OPTIONS)
    assert isinstance(statistic, Statistic)
    assert found["reward"] == estimate(statistic, draws["reward"], 0.95)
    assert draws["reward"].shape == (400,)
    none, _ = estimates({"win_rate": statistic}, alone(30), resamples=0, confidence=0.95, seed=0)
    assert math.isnan(none["win_rate"].low)
