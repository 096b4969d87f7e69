"""Readability: how easy an answer is to read, by formulas from counting. They know nothing of what it says."""

import re
from collections.abc import Callable
from itertools import groupby
from typing import Literal

from plaudit.rewards.base import Reward, Sample
from plaudit.rewards.functions import SampleReward
from plaudit.rewards.text import length, normal, sentences, spaceless_share, words

Formula = Literal["auto", "flesch", "lix", "tateishi", "sentence_length"]

_VOWELS = re.compile(r"[aeiouy]+")
_STOPS, _COMMAS = re.compile(r"[。．.!?！？…]"), re.compile(r"[、，,]")
_KANA = re.compile(r"[\u3040-\u30ff\uff66-\uff9f]")


def readability(formula: Formula = "auto") -> Reward:
    """How easy a text is to read, by one of four formulas, scaled to 0..1; 0 for an answer without words.

    `flesch` (English): reading ease / 100; `lix` (any language with spaces): `1 − (LIX − 20) / 60`; `tateishi`
    (Japanese): its score / 100; `sentence_length` (any, and Chinese): `1 − L / 60` with the mean number of words per
    sentence (characters where there are no spaces). Each is cut at 0 and 1. `auto` takes `tateishi` for Japanese,
    `sentence_length` for other scripts without spaces, else `lix`. Numbers of different formulas cannot be compared, so
    name one where all answers are in one language.

    Raises:
        ValueError: for another formula.
    """
    scales: dict[str, Callable[[str], float]] = {
        "flesch": lambda text: flesch_reading_ease(text) / 100,
        "lix": lambda text: 1 - (lix(text) - 20) / 60,
        "tateishi": lambda text: tateishi(text) / 100,
        "sentence_length": lambda text: 1 - length(text) / len(sentences(text)) / 60,
    }
    if formula != "auto" and formula not in scales:
        raise ValueError(f"formula is {formula!r}; it must be auto or one of {', '.join(scales)}")

    def reward(sample: Sample) -> float:
        text = sample.completion
        if not words(text):
            return 0.0
        return min(1.0, max(0.0, scales[formula if formula != "auto" else _suitable(text)](text)))

    return SampleReward(reward, "readability")


def flesch_reading_ease(text: str) -> float:
    """`206.835 − 1.015 · words/sentences − 84.6 · syllables/words` (Flesch 1948): English; 100 easy, 0 hard.

    Syllables are groups of vowels, without a silent `e` at the end; right for about nine words of ten.

    Raises:
        ValueError: without words.
    """
    found = _need_words(text)
    syllable_count = sum(syllables(word) for word in found)
    return 206.835 - 1.015 * len(found) / len(sentences(text)) - 84.6 * syllable_count / len(found)


def syllables(word: str) -> int:
    """The syllables of an English word, at least 1: groups of vowels, without a silent `e`, `es` or `ed` at the end."""
    plain = re.sub(r"[^a-z]", "", word.casefold())
    count = len(_VOWELS.findall(plain))
    silent = re.search(r"[^aeiouyl]e$|[aeiouy][^aeiouy]le$|[^aeiouytd]ed$|[^aeiouyszcgx]es$", plain)
    if silent and not re.search(r"[^aeiouy]le$", plain) and count > 1:
        count -= 1
    return max(1, count)


def lix(text: str) -> float:
    """`LIX = words/sentences + 100 · long words/words`, long is 7 letters or more (Björnsson 1968).

    Below 30 is easy, 40 the middle, above 60 hard, in every language with spaces.

    Raises:
        ValueError: without words.
    """
    found = _need_words(text)
    long_words = sum(length(word, "characters") > 6 for word in found)
    return len(found) / len(sentences(text)) + 100 * long_words / len(found)


def tateishi(text: str) -> float:
    """The Japanese readability score of Tateishi, Ono and Yamada (1988): mean 50, deviation 10, higher is easier.

    `RS' = −0.12 ls − 1.37 la + 7.4 lh − 23.18 lc − 5.4 lk − 4.67 cp + 115.79`: characters per sentence, then the mean
    length of runs of Latin letters, hiragana, kanji and katakana, and commas per full stop. A kind without runs has
    length 0; a text without a stop counts as one sentence.

    Raises:
        ValueError: without words.
    """
    _need_words(text)
    plain = "".join(normal(text).split())
    runs: dict[str, list[int]] = {}
    for kind, group in groupby(plain, _script):
        runs.setdefault(kind, []).append(len(list(group)))
    mean = {kind: sum(lengths) / len(lengths) for kind, lengths in runs.items()}
    stops = len(_STOPS.findall(plain)) or 1
    return (
        -0.12 * len(plain) / len(sentences(text))
        - 1.37 * mean.get("latin", 0.0)
        + 7.4 * mean.get("hiragana", 0.0)
        - 23.18 * mean.get("kanji", 0.0)
        - 5.4 * mean.get("katakana", 0.0)
        - 4.67 * len(_COMMAS.findall(plain)) / stops
        + 115.79
    )


def _script(character: str) -> str:
    code = ord(character)
    if 0x3041 <= code <= 0x309F:
        return "hiragana"
    if 0x30A1 <= code <= 0x30FF:
        return "katakana"
    if 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or code >= 0x20000 or character == "々":
        return "kanji"
    return "latin" if character.isascii() and character.isalpha() else "other"


def _suitable(text: str) -> Formula:
    if spaceless_share(text) < 0.5:
        return "lix"
    return "tateishi" if _KANA.search(text) else "sentence_length"


def _need_words(text: str) -> list[str]:
    found = words(text)
    if not found:
        raise ValueError(f"{text[:40]!r} has no words whose readability could be told")
    return found
