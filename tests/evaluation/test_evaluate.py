"""Evaluation of scores: brute force over pairs, hand numbers, identities, pairing and breakdowns."""

import time

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import kendalltau

from plaudit.data.records import Best, Comparison, Labels, Ranking, Ratings, Scores, Votes
from plaudit.evaluation.evaluate import EvaluationOptions, compare, evaluate_models, evaluate_scores
from plaudit.evaluation.judged import judge
from plaudit.evaluation.metrics import temperature

FEW = EvaluationOptions(resamples=50)


def record(judgement, size, **more):
    return Comparison(
        prompt=more.pop("prompt", "q"), completions=tuple("abcdefghi"[:size]), judgement=judgement, **more
    )


def test_by_hand():
    comparisons = [
        record(Ranking(((0,), (1, 2))), 3, prompt="one"),  # pairs 0>1, 0>2; 1 and 2 tied by people
        record(Best(1), 2, prompt="two"),
    ]
    found = evaluate_scores(comparisons, [[1.0, 1.0, 3.0], [0.0, np.log(3.0)]], options=FEW)
    # 0>1: equal scores (1/2); 0>2: wrong (0); 1>0: right (1)
    assert found.metrics["accuracy"].value == pytest.approx(1.5 / 3)
    assert found.metrics["prompt_accuracy"].value == pytest.approx((0.25 + 1) / 2)
    losses = [np.log(2), np.log1p(np.exp(2.0)), -np.log(0.75)]
    assert found.metrics["log_loss"].value == pytest.approx(np.mean(losses))
    assert found.metrics["brier"].value == pytest.approx(np.mean([0.25, expit(2.0) ** 2, 0.0625]))
    assert found.metrics["best_of_k_accuracy"].value == pytest.approx((0 + 1) / 2)
    assert found.counts["pairs"] == 3
    assert found.counts["human_ties"] == 1
    assert found.human_ties["mean_absolute_difference"] == 2.0
    assert [example.probability for example in found.examples] == [pytest.approx(expit(-2.0))]
    assert (found.examples[0].preferred, found.examples[0].other) == ("a", "c")


def brute_force(comparisons, scores):
    """Accuracy, log-loss, best-of-K and tau written as plainly as possible, with other helpers than the library's."""
    credits, losses, tops, taus = [], [], [], []
    for comparison, values in zip(comparisons, scores, strict=True):
        human = dict(enumerate([None] * len(values)))
        match comparison.judgement:
            case Ranking(tiers):
                human = {slot: -depth for depth, tier in enumerate(tiers) for slot in tier}
            case Best(index):
                human = {slot: float(slot == index) for slot in human}
            case Votes(numbers) | Scores(numbers):
                human = {slot: numbers[slot] for slot in human if numbers[slot] is not None}
        for i in human:
            for j in human:
                if human[i] > human[j]:
                    d = values[i] - values[j]
                    credits.append(1.0 if d > 0 else 0.5 if d == 0 else 0.0)
                    losses.append(-np.log(1 / (1 + np.exp(-d))))
        if len(set(human.values())) < 2:
            continue
        model_top = [i for i in human if values[i] == max(values[j] for j in human)]
        tops.append(np.mean([human[i] == max(human.values()) for i in model_top]))
        if len(human) >= 3:
            tau = kendalltau([human[i] for i in human], [values[i] for i in human]).statistic
            taus.append(0.0 if np.isnan(tau) else tau)
    return np.mean(credits), np.mean(losses), np.mean(tops), np.mean(taus)


@pytest.mark.parametrize("seed", range(5))
def test_against_brute_force(simulated, seed):
    comparisons, rewards = simulated(40, seed, sizes=(2, 3, 5, 9))
    rewards = [[round(value, 0) for value in row] for row in rewards]  # some equal scores
    found = evaluate_scores(comparisons, rewards, options=EvaluationOptions(resamples=0)).metrics
    names = ("accuracy", "log_loss", "best_of_k_accuracy", "kendall_tau")
    assert [found[name].value for name in names] == pytest.approx(brute_force(comparisons, rewards), abs=1e-12)
    assert np.isnan(found["accuracy"].low)


def test_order_of_completions_changes_nothing(simulated, permute):
    comparisons, rewards = simulated(30, 3)
    generator = np.random.default_rng(0)
    pairs = [permute(c, r, generator.permutation(len(r)).tolist()) for c, r in zip(comparisons, rewards, strict=True)]
    before = evaluate_scores(comparisons, rewards, options=FEW)
    after = evaluate_scores([c for c, _ in pairs], [r for _, r in pairs], options=FEW)
    for name, value in before.metrics.items():
        assert after.metrics[name].value == pytest.approx(value.value, abs=1e-12), name
        assert after.metrics[name].low == pytest.approx(value.low, abs=1e-12, nan_ok=True), name


def test_shift_by_prompt_changes_nothing_and_scale_only_calibration(simulated):
    comparisons, rewards = simulated(30, 4)
    base = evaluate_scores(comparisons, rewards, options=FEW).metrics
    generator = np.random.default_rng(0)
    shifted = [[value + shift for value in row] for row, shift in zip(rewards, generator.normal(0, 9, 30), strict=True)]
    moved = evaluate_scores(comparisons, shifted, options=FEW).metrics
    doubled = evaluate_scores(comparisons, [[2 * v for v in row] for row in rewards], options=FEW).metrics
    for name in base:
        assert moved[name].value == pytest.approx(base[name].value, abs=1e-9), name
    assert doubled["temperature"].value == pytest.approx(2 * base["temperature"].value, rel=1e-9)
    for name in ("accuracy", "best_of_k_accuracy", "kendall_tau", "scaled_log_loss", "length_partial_correlation"):
        assert doubled[name].value == pytest.approx(base[name].value, abs=1e-9), name
    assert doubled["log_loss"].value != pytest.approx(base["log_loss"].value, abs=1e-3)


def test_equal_scores_are_chance(simulated):
    comparisons, rewards = simulated(40, 5)
    found = evaluate_scores(comparisons, [[0.0] * len(row) for row in rewards], options=FEW)
    assert found.metrics["accuracy"].value == 0.5
    assert found.metrics["log_loss"].value == pytest.approx(np.log(2))
    assert found.metrics["calibration_error"].value == pytest.approx(0.0, abs=1e-12)
    assert found.metrics["kendall_tau"].value == 0.0
    for _, accuracy, chance in found.best_of_k:
        assert accuracy.value == pytest.approx(chance)


def test_the_truth_is_calibrated(simulated):
    """Gumbel noise makes picks follow the softmax and pairs of two completions the sigmoid: temperature 1."""
    comparisons, rewards = simulated(1600, 6, sizes=(2,), kinds=("ranking",))
    found = evaluate_scores(comparisons, rewards, options=EvaluationOptions(resamples=100))
    assert found.metrics["temperature"].low < 1.0 < found.metrics["temperature"].high
    assert found.metrics["temperature"].value == pytest.approx(1.0, abs=0.15)
    assert found.metrics["calibration_error"].value < 2 * found.calibration_noise < 0.07
    overconfident = evaluate_scores(comparisons, [[3 * v for v in row] for row in rewards], options=FEW)
    assert overconfident.metrics["temperature"].value == pytest.approx(3.0, abs=0.45)
    assert overconfident.metrics["calibration_error"].value > 5 * overconfident.calibration_noise


def test_one_step_bootstrap_of_the_temperature_follows_the_full_one(simulated):
    comparisons, rewards = simulated(300, 8, sizes=(3,), kinds=("ranking",))
    found = evaluate_scores(comparisons, rewards, options=EvaluationOptions(resamples=150, seed=5))
    judged = judge(comparisons)
    flat = np.concatenate([np.array(row) for row in rewards])
    d = flat[judged.winner] - flat[judged.loser]
    picked = np.random.default_rng(5).integers(0, 300, size=(150, 300))
    full = [temperature(d, np.bincount(row, minlength=300)[judged.pair_clusters]) for row in picked]
    assert np.corrcoef(full, found.draws["temperature"])[0, 1] > 0.99
    assert np.std(found.draws["temperature"]) == pytest.approx(np.std(full), rel=0.05)


def test_comparison_of_models_is_paired_and_matches_the_single_values(simulated):
    comparisons, rewards = simulated(120, 7)
    generator = np.random.default_rng(1)
    noisy = [[v + generator.normal(0, 1.5) for v in row] for row in rewards]
    truth, other, same = evaluate_models(
        comparisons, {"truth": rewards, "noisy": noisy, "again": rewards}, options=EvaluationOptions(resamples=500)
    )
    found = {(c.first, c.second, c.metric): c.difference for c in compare([truth, other, same])}
    accuracy = found["truth", "noisy", "accuracy"]
    assert accuracy.value == pytest.approx(truth.metrics["accuracy"].value - other.metrics["accuracy"].value)
    assert accuracy.low > 0
    assert (found["truth", "again", "accuracy"].low, found["truth", "again", "accuracy"].high) == (0.0, 0.0)
    alone = evaluate_scores(comparisons, noisy, options=EvaluationOptions(resamples=500))
    assert alone.metrics == other.metrics


def test_missing_scores_are_counted_and_left_out_for_all(simulated):
    comparisons, rewards = simulated(20, 2, sizes=(2,), kinds=("ranking",))
    holed = [list(row) for row in rewards]
    holed[0][1] = None
    first, second = evaluate_models(comparisons, {"a": rewards, "b": holed}, options=FEW)
    assert first.counts["pairs_without_score"] == second.counts["pairs_without_score"] == 1
    assert first.counts["pairs_used"] == 19
    with pytest.raises(ValueError, match="same pairs"):
        compare([evaluate_scores(comparisons, rewards, options=FEW), second])


def test_clusters():
    comparisons = [
        record(Best(0), 2, prompt="same", group="g"),
        record(Best(0), 2, prompt="Same "),
        record(Best(1), 2, prompt="other", group="g"),
        record(Best(1), 2, prompt="third"),
    ]
    assert judge(comparisons, cluster_by="prompt").clusters.tolist() == [0, 0, 1, 2]
    assert judge(comparisons[1:], cluster_by="prompt").cluster_by == "prompt"
    assert judge(comparisons).clusters.tolist() == [0, 0, 0, 1]  # the group and everything that shares its prompt
    assert judge(comparisons).cluster_by == "group"
    assert judge(comparisons, cluster_by="record").num_clusters == 4
    with pytest.raises(ValueError, match="record 1 has no 'group'"):
        judge(comparisons, cluster_by="group")


def test_breakdowns():
    comparisons = [
        record(Scores((3.0, 1.0, 1.0)), 3, prompt="1", annotator="x", subset="s"),
        record(Votes((3.0, 1.0)), 2, prompt="2", annotator="y", subset="s"),
        record(Ratings({"a": (1.0, 2.0), "b": (1.0, 2.0)}), 2, prompt="3", annotator="y"),
        record(Ranking(((0,), (1,), (2,))), 3, prompt="4", annotator="y"),
        record(Labels((True, False)), 2, prompt="5"),
        record(Best(0), 2, prompt="6", margin=0.25),
    ]
    scores = [[1.0, 0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [3.0, 2.0, 1.0], [0.0, 1.0], [1.0, 0.0]]
    found = evaluate_scores(comparisons, scores, options=FEW).breakdowns
    margins = {row.label: (row.accuracy.value, row.accuracy.count) for row in found["margin"]}
    assert margins == {
        "difference in vote share 0.5": (1.0, 1),
        "places apart 1": (1.0, 2),
        "places apart 2": (1.0, 1),
        "score difference 2": (1.0, 3),
        "stated margin 0.25": (1.0, 1),
    }
    assert {row.label: row.accuracy.count for row in found["K"]} == {"2": 4, "3": 5}
    assert {row.label: row.accuracy.count for row in found["annotator"]} == {"y": 5, "(none)": 2, "x": 2}
    assert {row.label: row.accuracy.value for row in found["judgement"]}["labels"] == 0.0
    assert sum(row.accuracy.count for row in found["subset"]) == 9


def test_many_annotators_are_folded_and_margins_bucketed():
    generator = np.random.default_rng(0)
    comparisons = [
        record(Scores((0.0, float(gap))), 2, prompt=str(i), annotator=f"a{i % 40:02d}")
        for i, gap in enumerate(generator.uniform(0.01, 1, 400))
    ]
    found = evaluate_scores(comparisons, [[0.0, 1.0]] * 400, options=FEW).breakdowns
    assert len(found["annotator"]) == 24
    assert found["annotator"][-1].label == "all others (17)"
    assert sum(row.accuracy.count for row in found["annotator"]) == 400
    assert [row.accuracy.count for row in found["margin"]] == pytest.approx([80] * 5, abs=1)


def test_length():
    """Rewards that are the length: partial correlation 1; accuracy 1 where people prefer longer, 0 where shorter."""
    generator = np.random.default_rng(0)
    comparisons, scores = [], []
    for index in range(60):
        texts = tuple("x" * int(size) for size in generator.choice(np.arange(1, 200), 3, replace=False))
        order = generator.permutation(3)
        comparisons.append(
            Comparison(prompt=str(index), completions=texts, judgement=Ranking(tuple((int(i),) for i in order)))
        )
        scores.append([float(np.log1p(len(text))) + 5 * index for text in texts])
    found = evaluate_scores(comparisons, scores, options=FEW).metrics
    assert found["length_correlation"].value == pytest.approx(1.0)
    assert found["length_partial_correlation"].value == pytest.approx(1.0)
    assert found["accuracy_shorter_preferred"].value == 0.0
    assert found["accuracy_longer_preferred"].value == 1.0
    assert found["accuracy_shorter_preferred"].count + found["accuracy_longer_preferred"].count == 180


def test_partial_correlation_removes_what_people_said():
    """Reward = human order exactly, and people prefer longer: correlated with length, but not given people's order."""
    generator = np.random.default_rng(1)
    comparisons, scores = [], []
    for index in range(400):
        quality = generator.normal(size=5)
        order = np.argsort(-quality)
        texts = tuple("x" * int(np.exp(4 + 0.5 * q + 0.4 * generator.normal())) + str(i) for i, q in enumerate(quality))
        comparisons.append(
            Comparison(prompt=str(index), completions=texts, judgement=Ranking(tuple((int(i),) for i in order)))
        )
        rank = np.argsort(order)
        scores.append([float(-rank[i]) + 0.3 * generator.normal() for i in range(5)])
    found = evaluate_scores(comparisons, scores, options=EvaluationOptions(resamples=300)).metrics
    assert found["length_correlation"].value > 0.5
    assert abs(found["length_partial_correlation"].value) < 0.08
    assert found["length_partial_correlation"].low < 0.0 < found["length_partial_correlation"].high


def test_unjudged_completions_take_no_part():
    comparisons = [record(Ranking(((0,), (2,))), 3), record(Scores((None, 2.0, 1.0)), 3, prompt="r")]
    found = evaluate_scores(comparisons, [[1.0, 99.0, 0.0], [99.0, 1.0, 0.0]], options=FEW)
    assert found.metrics["best_of_k_accuracy"].value == 1.0
    assert found.metrics["accuracy"].count == 2


def test_weights_multiply():
    comparisons = [record(Best(0), 2, weight=3.0), record(Best(1), 2, prompt="r")]
    found = evaluate_scores(comparisons, [[1.0, 0.0], [1.0, 0.0]], options=FEW).metrics
    assert found["accuracy"].value == 0.75
    assert found["best_of_k_accuracy"].value == 0.75


def test_examples_are_the_worst_one_per_prompt(simulated):
    comparisons, rewards = simulated(40, 9)
    found = evaluate_scores(comparisons, [[-v for v in row] for row in rewards], options=EvaluationOptions(examples=6))
    assert len(found.examples) == 6
    assert len({example.prompt for example in found.examples}) == 6
    chances = [example.probability for example in found.examples]
    assert chances == sorted(chances)
    assert all(example.preferred_reward < example.other_reward for example in found.examples)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([[1.0, 2.0]], "scores for 1 records"),
        ([[1.0, 2.0], [1.0]], r"record 1 \(id 'two'\): 1 scores for 2"),
        ([[1.0, 2.0], [float("nan"), 1.0]], r"'m': record 1 \(id 'two'\): the score of completion 0 is nan"),
        ([[1.0, 2.0], [float("inf"), 1.0]], "inf"),
        ([[None, 2.0], [None, 1.0]], "no pair"),
    ],
)
def test_wrong_scores_are_refused(scores, message):
    comparisons = [record(Best(0), 2, id="one"), record(Best(0), 2, id="two", prompt="r")]
    with pytest.raises(ValueError, match=message):
        evaluate_models(comparisons, {"m": scores}, options=FEW)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match="no comparison"):
        judge([])
    with pytest.raises(ValueError, match="1 human ties"):
        evaluate_scores([record(Ranking(((0, 1),)), 2)], [[0.0, 1.0]])


def test_many_prompts_are_quick(simulated):
    comparisons, rewards = simulated(1000, 0, sizes=(2, 4))
    start = time.perf_counter()
    evaluate_scores(comparisons, rewards)
    assert time.perf_counter() - start < 12.0  # about 1 s
