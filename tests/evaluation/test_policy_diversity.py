"""Diversity of several answers: by hand, against a plain BLEU, in scripts without spaces, at the extremes."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from plaudit.evaluation.policy_diversity import distinct_n, same_answers, self_bleu
from plaudit.rewards.text import words


def plain_bleu(hypothesis, references, order=4):
    """BLEU as it is defined, straight from Papineni et al. 2002, with the conventions that `self_bleu` names."""
    if not hypothesis:
        return float(any(not reference for reference in references))
    logs = []
    for n in range(1, min(order, len(hypothesis)) + 1):
        own = Counter(tuple(hypothesis[i : i + n]) for i in range(len(hypothesis) - n + 1))
        theirs = [Counter(tuple(r[i : i + n]) for i in range(len(r) - n + 1)) for r in references]
        matched = sum(min(count, max(t[gram] for t in theirs)) for gram, count in own.items())
        logs.append(math.log((matched or 0.1) / sum(own.values())))
    distance = min(abs(len(r) - len(hypothesis)) for r in references)
    nearest = min(len(r) for r in references if abs(len(r) - len(hypothesis)) == distance)
    brevity = 1.0 if len(hypothesis) > nearest else math.exp(1 - nearest / len(hypothesis))
    return brevity * math.exp(sum(logs) / len(logs))


def test_self_bleu_equals_a_plain_bleu():
    generator = np.random.default_rng(0)
    for _ in range(60):
        answers = [
            [str(word) for word in generator.integers(0, 5, int(generator.integers(0, 12)))]
            for _ in range(int(generator.integers(2, 6)))
        ]
        wanted = np.mean(
            [plain_bleu(answer, answers[:i] + answers[i + 1 :]) for i, answer in enumerate(answers)]
        )  # fmt: skip
        assert self_bleu(answers) == pytest.approx(wanted)


def test_bleu_by_hand():
    """`the cat sat` against `the cat ran fast`: precisions 2/3, 1/2, 0.1/1, brevity exp(1 − 4/3); the other way
    2/4, 1/3, 0.1/2, 0.1/1, no brevity."""
    one, two = ["the", "cat", "sat"], ["the", "cat", "ran", "fast"]
    first = math.exp(1 - 4 / 3) * (2 / 3 * 1 / 2 * 0.1) ** (1 / 3)
    second = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1) ** (1 / 4)
    assert self_bleu([one, two]) == pytest.approx((first + second) / 2)


def test_distinct_by_hand():
    answers = [["a", "b", "a"], ["b", "a"]]
    assert distinct_n(answers, 1) == 2 / 5
    assert distinct_n(answers, 2) == 2 / 3
    assert distinct_n(answers, 3) == 1.0
    assert math.isnan(distinct_n(answers, 4))


def test_extremes():
    assert self_bleu([["a", "b"]] * 3) == pytest.approx(1.0)
    assert self_bleu([["a"], ["b"]]) == pytest.approx(0.1)
    assert self_bleu([[], []]) == 1.0
    assert self_bleu([[], ["a"]]) == pytest.approx(0.05)
    assert math.isnan(self_bleu([["a"]]))
    assert math.isnan(distinct_n([[], []], 1))
    assert same_answers(["x", "x", "y"]) == pytest.approx(1 / 3)
    assert math.isnan(same_answers(["x"]))
    with pytest.raises(ValueError, match="n is 0"):
        distinct_n([["a"]], 0)
    with pytest.raises(ValueError, match="order is 0"):
        self_bleu([["a"], ["b"]], 0)


@pytest.mark.parametrize(
    ("same", "other"),
    [("我喜欢喝茶和咖啡", "明天早上会下大雨"), ("お茶が好きです", "明日は雨らしい")],
)
def test_scripts_without_spaces_count_characters(same, other):
    cut = [words(same), words(same), words(other)]
    assert len(cut[0]) == len(same)
    assert self_bleu(cut[:2]) == pytest.approx(1.0)
    assert self_bleu([cut[0], cut[2]]) < 0.35
    # Cut at spaces, each answer would be one word, and nothing could be said.
    assert distinct_n(cut[:2], 2) == pytest.approx(len(set(pairwise(same))) / (2 * (len(same) - 1)))
