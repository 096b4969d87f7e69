"""Lexical diversity and readability against hand numbers and other people's implementations."""

from collections.abc import Callable
from typing import Any

import pytest

from plaudit.rewards.base import Sample
from plaudit.rewards.diversity import mtld, mtld_of, type_token, type_token_ratio
from plaudit.rewards.readability import flesch_reading_ease, lix, readability, syllables, tateishi
from plaudit.rewards.relevance import lexical_overlap


def value(reward: Any, completion: str, prompt: Any = "p") -> float | None:
    score = reward([Sample(prompt, completion)])
    return float(score.total[0]) if score.valid[0] else None


def test_type_token_ratio() -> None:
    assert value(type_token(), "the cat and the CAT") == pytest.approx(3 / 5)
    assert value(type_token(), "好好学习天天向上") == pytest.approx(6 / 8)
    assert value(type_token(), "!!") == 0.0
    with pytest.raises(ValueError, match="window is 0"):
        type_token(0)


@pytest.mark.parametrize("window", [1, 3, 7, 50, 60])
def test_the_moving_ratio_is_the_mean_over_windows(window: int) -> None:
    found = [str((i * i * 7 + i) % 11) for i in range(50)]
    runs = [found[i : i + window] for i in range(max(1, len(found) - window + 1))]
    assert type_token_ratio(found, window) == pytest.approx(sum(len(set(r)) / len(r) for r in runs) / len(runs))


def test_mtld_by_hand() -> None:
    # McCarthy and Jarvis's example: the first stretch of "of the people by the people for the people" ends at its
    # sixth word (4/6). Forwards nothing of "for the people" repeats: 9 words, 1 stretch. Backwards the first stretch
    # ends at the fifth word, "people the for people the" (3/5); the rest "by people the of" does not repeat: 9/1.
    assert mtld_of(["of", "the", "people", "by", "the", "people", "for", "the", "people"]) == pytest.approx(9.0)
    # a a | a a | a: two words end a stretch (1/2), one is left with ratio 1.
    assert mtld_of(["a"] * 5) == pytest.approx(2.5)
    # a b c a: ratio 3/4 is above the threshold, so all is left over: (1 - 0.75) / 0.28 of a stretch.
    assert mtld_of(list("abca")) == pytest.approx(4 / (0.25 / 0.28))
    assert mtld_of(list("abcdef")) == 6.0
    with pytest.raises(ValueError, match="no lexical diversity"):
        mtld_of([])


@pytest.mark.parametrize(
    ("count", "make", "wanted", "at_half"),
    [
        (120, lambda i: (i * i * 7 + i) % 23, 12.0, 24.0),
        (300, lambda i: (i**3 + 3 * i) % 101, 75.0, 131.53153153153153),
        (37, lambda i: i % 5, 7.4, 10.360000000000001),
        (10, lambda i: i, 10.0, 10.0),
    ],
)
def test_mtld_is_what_lexicalrichness_computes(
    count: int, make: Callable[[int], int], wanted: float, at_half: float
) -> None:
    # Numbers of lexicalrichness 0.5.1, `LexicalRichness.mtld`, for these words.
    found = [str(make(i)) for i in range(count)]
    assert mtld_of(found) == pytest.approx(wanted, rel=1e-12)
    assert mtld_of(found, 0.5) == pytest.approx(at_half, rel=1e-12)


def test_mtld_as_a_reward() -> None:
    assert value(mtld(cap=20), "of the people by the people for the people") == pytest.approx(9 / 20)
    assert value(mtld(cap=5), "of the people by the people for the people") == 1.0
    assert value(mtld(cap=10), "好好好好好") == pytest.approx(0.25)
    assert value(mtld(), "") == 0.0
    with pytest.raises(ValueError, match="threshold 1"):
        mtld(1)


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("the", 1), ("cat", 1), ("make", 1), ("makes", 1), ("jumped", 1), ("wanted", 2), ("table", 2), ("horses", 2),
        ("readability", 5), ("rhythm", 1), ("idea", 2), ("free", 1), ("don't", 1), ("42", 1),
    ],
)  # fmt: skip
def test_syllables(word: str, count: int) -> None:
    assert syllables(word) == count


def test_flesch_reading_ease() -> None:
    # 6 words, 1 sentence, 6 syllables; a well-known example, 116.145.
    assert flesch_reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6)
    assert flesch_reading_ease("The cat sat on the mat.") == pytest.approx(116.145)


def test_lix() -> None:
    # 9 words in 2 sentences, of which "readable" and "sentences" have 7 letters or more.
    assert lix("This is a readable text. It has two sentences.") == pytest.approx(9 / 2 + 100 * 2 / 9)


def test_tateishi() -> None:
    # 今日|の|天気|は、晴|れです。: 12 characters, 5/3 kanji and 5/3 hiragana per run, one comma per stop. The package
    # tateishi-readability gives 84.62 here, with characters per run (10/6) where the formula has characters per
    # sentence (12): 84.62 + 0.12 (10/6 − 12) = 83.38.
    assert tateishi("今日の天気は、晴れです。") == pytest.approx(83.38)
    # Katakana and Latin letters: テレビ|で|NHK|を|見|る。, two runs of hiragana of one: を and る; で is the third.
    by_hand = -0.12 * 11 - 1.37 * 3 + 7.4 * 1 - 23.18 * 1 - 5.4 * 3 - 4.67 * 0 + 115.79
    assert tateishi("テレビでNHKを見る。") == pytest.approx(by_hand)


def test_readability_by_language() -> None:
    assert value(readability(), "今日の天気は、晴れです。") == pytest.approx(0.8338)
    assert value(readability(), "今天天气很好。我们去公园。") == pytest.approx(1 - 11 / 2 / 60)
    assert value(readability(), "This is a readable text. It has two sentences.") == pytest.approx(
        1 - (9 / 2 + 200 / 9 - 20) / 60
    )
    assert value(readability("flesch"), "The cat sat on the mat.") == 1.0
    assert value(readability(), "?!") == 0.0
    with pytest.raises(ValueError, match="formula is 'fog'"):
        readability("fog")  # type: ignore[arg-type]


def test_lexical_overlap() -> None:
    rule = lexical_overlap()
    assert value(rule, "Paris is a city", "What is the capital of France? Paris?") == pytest.approx(1 / 3)
    assert value(rule, "the capital of France: PARIS", "What is the capital of France? Paris?") == 1.0
    assert value(rule, "anything", "What is it?") is None
    assert value(lexical_overlap(ignore=[]), "it", "What is it?") == pytest.approx(1 / 3)
    # 东京 京的 的天 天气: two of four pairs of characters.
    assert value(rule, "东京今天天气好", "东京的天气？") == pytest.approx(2 / 4)
    assert value(rule, "東", "東京") == 0.0


def test_the_last_user_turn_is_what_was_asked() -> None:
    from plaudit.data.records import Message

    prompt = (Message("user", "cats"), Message("assistant", "ok"), Message("user", "dogs"))
    assert value(lexical_overlap(), "dogs", prompt) == 1.0
    assert value(lexical_overlap(), "cats", prompt) == 0.0
