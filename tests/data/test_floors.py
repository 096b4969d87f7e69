import math

import pytest

from plaudit.data.floors import (
    clustered_rate,
    cross_validated_floor,
    fit_bag_of_words,
    length_floor,
    pair_accuracy,
    unigrams_and_bigrams,
    words,
)
from plaudit.data.records import Comparison, Ranking


def pair(prompt: str, better: str, worse: str, group: str | None = None) -> Comparison:
    return Comparison(prompt=prompt, completions=(worse, better), judgement=Ranking(((1,), (0,))), group=group)


def polite(count: int) -> list[Comparison]:
    return [pair(f"q {n}", f"thanks for item {n}", f"go away with item {n}") for n in range(count)]


def test_words_of_any_script() -> None:
    assert words("Don't STOP, naïve!") == ["don", "'", "t", "stop", ",", "naïve", "!"]
    assert words("日本語のtest") == ["日", "本", "語", "の", "test"]
    assert unigrams_and_bigrams("not good") == ["not", "good", "not good"]


def test_clustered_rate_by_hand() -> None:
    # Residuals by cluster: 1 - .5 + 1 - .5 = 1 and 0 - .5 + 0 - .5 = -1; variance 2/1 · (1 + 1) / 16 = .25.
    rate = clustered_rate([1, 1, 0, 0], ["a", "a", "b", "b"])
    assert rate is not None
    assert (rate.value, rate.count, rate.clusters) == (0.5, 4, 2)
    assert (rate.low, rate.high) == (0.0, 1.0)
    apart = clustered_rate([1.0, 0.0] * 50, range(100))
    assert apart is not None
    assert apart.high - apart.value == pytest.approx(1.96 * math.sqrt(0.25 / 99))
    assert clustered_rate([], []) is None


def test_length_floor_leaves_equal_lengths_out() -> None:
    rate = length_floor([pair("p", "long", "no"), pair("q", "a", "longer"), pair("r", "ab", "cd")])
    assert rate is not None
    assert (rate.value, rate.count) == (0.5, 2)
    assert length_floor([pair("r", "ab", "cd")]) is None


def test_bag_of_words_learns_words_and_gives_one_score_per_completion() -> None:
    train, test = polite(40), polite(60)[40:]
    bag = fit_bag_of_words(train)
    scores = bag.scores(test)
    assert [len(row) for row in scores] == [2] * 20
    assert all(better > worse for worse, better in scores)
    best, worst = bag.strongest_words(3)
    assert "thanks" in {word for word, _ in best} | {"thanks for"}
    assert all(weight > 0 for _, weight in best)
    assert all(weight < 0 for _, weight in worst)
    rate = pair_accuracy(test, scores)
    assert rate is not None
    assert rate.value == 1.0
    assert bag.scores([]) == []


def test_bag_of_words_is_antisymmetric_and_weighs_records() -> None:
    records = [pair("p", "good", "bad"), pair("q", "bad", "good")]
    (worse, better), _ = fit_bag_of_words(records).scores(records)
    assert better == pytest.approx(worse, abs=1e-9)
    heavy = [pair("p", "good", "bad"), Comparison(
        prompt="q", completions=("bad", "good"), judgement=Ranking(((0,), (1,))), weight=0.1)]  # fmt: skip
    (worse, better), _ = fit_bag_of_words(heavy, regularisation=1.0).scores(heavy)
    assert better > worse
    with pytest.raises(ValueError, match="no judged, untied pair"):
        fit_bag_of_words([Comparison(prompt="p", completions=("a", "b"), judgement=Ranking(((0, 1),)))])


def test_bag_of_words_for_chinese() -> None:
    train = [pair(f"问 {n}", f"谢谢您的耐心第{n}次", f"走开别来烦我第{n}次") for n in range(30)]
    rate = pair_accuracy(train[20:], fit_bag_of_words(train[:20]).scores(train[20:]))
    assert rate is not None
    assert rate.value == 1.0


def test_cross_validation_never_sees_the_prompt() -> None:
    # No word stands in two prompts, so only a model that had seen the prompt could tell.
    records = [pair(f"q {n}", f"word{n}", f"other{n}") for n in range(100)]
    rate = cross_validated_floor(records)
    assert rate is not None
    assert (rate.value, rate.count) == (0.5, 100)
    good = cross_validated_floor(polite(100))
    assert good is not None
    assert good.value == 1.0
    assert cross_validated_floor([pair("p", "a", "b")]) is None


def test_few_groups_are_left_out_one_at_a_time() -> None:
    records = [pair(f"q {n}", f"thanks {n}", f"go away {n}", group=str(n % 3)) for n in range(30)]
    rate = cross_validated_floor(records)
    assert rate is not None
    assert (rate.value, rate.count) == (1.0, 30)


def test_equal_scores_count_half() -> None:
    rate = pair_accuracy([pair("p", "a", "b"), pair("q", "a", "b")], [[1.0, 1.0], [0.0, 2.0]])
    assert rate is not None
    assert rate.value == 0.75
