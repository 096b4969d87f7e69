"""Floors are fitted where they are said to be, and never on what they score."""

import numpy as np
import pytest

from plaudit.data.records import Best, Comparison
from plaudit.evaluation import reward_floors as module
from plaudit.evaluation.evaluate import EvaluationOptions, evaluate_models
from plaudit.evaluation.reward_floors import reward_floors


def comparisons_of(count, better, worse, start=0):
    return [
        Comparison(prompt=f"prompt {i}", completions=(f"{worse} {i}", f"{better} {i}"), judgement=Best(1))
        for i in range(start, start + count)
    ]


def accuracy(comparisons, scores):
    return (
        evaluate_models(comparisons, {"f": scores}, options=EvaluationOptions(resamples=0))[0].metrics["accuracy"].value
    )


def test_a_telling_word_is_found_across_folds():
    comparisons = comparisons_of(80, "kindly done", "rudely done")
    floors = reward_floors(comparisons)
    assert accuracy(comparisons, floors.scores["bag_of_words"]) == 1.0
    assert "in 5 folds by prompt" in floors.note


def test_length_learns_its_direction():
    shorter = comparisons_of(60, "ok", "ok but with a lot more words")
    longer = comparisons_of(60, "ok but with a lot more words", "ok")
    assert accuracy(shorter, reward_floors(shorter, names=["length"]).scores["length"]) == 1.0
    assert accuracy(longer, reward_floors(longer, names=["length"]).scores["length"]) == 1.0
    # Fitted where the shorter won, it is wrong where the longer wins: nothing leaks from what is scored.
    found = reward_floors(longer, train=shorter)
    assert accuracy(longer, found.scores["length"]) == 0.0
    assert "60 training comparisons" in found.note


def test_cross_fitting_does_not_leak():
    """Labels are coin flips and every word is its own: a bag of words that saw them would be right, this one cannot."""
    generator = np.random.default_rng(0)
    comparisons = [
        Comparison(
            prompt=f"p{i}", completions=(f"left{i} {more}", f"right{i} {more}"), judgement=Best(winner), annotator=more
        )
        for i, winner in enumerate(generator.integers(0, 2, 150).tolist())
        for more in ("so", "thus")
    ]
    unseen = accuracy(comparisons, reward_floors(comparisons).scores["bag_of_words"])
    assert unseen == pytest.approx(0.5, abs=0.1)
    assert accuracy(comparisons, reward_floors(comparisons, train=comparisons).scores["bag_of_words"]) == 1.0


def test_groups_stay_together_and_small_data_gets_fewer_folds():
    comparisons = [
        Comparison(prompt=f"p{i}", completions=(f"a {i}", f"b {i}"), judgement=Best(1), group=f"g{i % 6}")
        for i in range(30)
    ]
    assert "folds by group" in reward_floors(comparisons).note
    assert reward_floors(comparisons[:1]).scores == {}
    assert "too few" in reward_floors(comparisons[:1]).note
    assert reward_floors(comparisons, names=[]).scores == {}


def test_a_floor_that_cannot_be_fitted_leaves_the_other(monkeypatch):
    def refuse(train, test):
        raise ValueError("empty vocabulary")

    monkeypatch.setitem(module._FITS, "bag_of_words", refuse)
    found = reward_floors(comparisons_of(30, "a", "bb"))
    assert list(found.scores) == ["length"]
    assert "no floor 'bag_of_words': empty vocabulary." in found.note


def test_scores_keep_the_order_of_the_comparisons():
    comparisons = comparisons_of(40, "good", "bad")
    floors = reward_floors(comparisons, names=["length"])
    assert [len(row) for row in floors.scores["length"]] == [2] * 40
    assert all(row[0] != row[1] for row in floors.scores["length"])
