"""Lexical diversity: how varied the words of an answer are. One character is one word in scripts without spaces."""

from collections.abc import Sequence

from plaudit.rewards.base import Reward, Sample
from plaudit.rewards.functions import SampleReward
from plaudit.rewards.text import words


def type_token(window: int | None = None) -> Reward:
    """`r = distinct words / words`, in 0..1; 0 for an answer without words.

    Longer texts repeat more, so this falls with length. With a window it is the mean over all runs of `window` words
    (MATTR, Covington and McFall 2010, doi:10.1080/09296171003643098), which does not.

    Args:
        window: words of a run; None is the whole text. A text that is shorter is one run.

    Raises:
        ValueError: if the window is below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1 word")
    return SampleReward(lambda sample: type_token_ratio(words(sample.completion), window), "type_token")


def mtld(threshold: float = 0.72, *, cap: float = 100.0) -> Reward:
    """`r = min(MTLD, cap) / cap`, in 0..1; 0 for an answer without words. See `mtld_of`.

    MTLD hardly depends on length, down to about 100 words. It can be no more than the number of words.

    Args:
        threshold: the type-token ratio at which a stretch ends, in 0..1.
        cap: the MTLD that is worth 1; prose by people reaches 60 to 120.

    Raises:
        ValueError: if a number is out of range.
    """
    if not 0 < threshold < 1 or cap <= 0:
        raise ValueError(f"threshold {threshold} must lie between 0 and 1, cap {cap} above 0")

    def reward(sample: Sample) -> float:
        found = words(sample.completion)
        return min(mtld_of(found, threshold), cap) / cap if found else 0.0

    return SampleReward(reward, "mtld")


def type_token_ratio(found: Sequence[str], window: int | None = None) -> float:
    """Distinct words over words, or its mean over all windows; 0 without words."""
    if not found:
        return 0.0
    if window is None or window >= len(found):
        return len(set(found)) / len(found)
    counts: dict[str, int] = {}
    total = 0
    for place, word in enumerate(found):
        counts[word] = counts.get(word, 0) + 1
        if place >= window:
            left = found[place - window]
            counts[left] -= 1
            if not counts[left]:
                del counts[left]
        total += len(counts) if place >= window - 1 else 0
    return total / ((len(found) - window + 1) * window)


def mtld_of(found: Sequence[str], threshold: float = 0.72) -> float:
    """The measure of textual lexical diversity: mean length of stretches that keep their type-token ratio.

    `MTLD = ½ (N / F_→ + N / F_←)`, `F` the number of stretches, forwards and backwards: a stretch ends where its
    ratio has fallen to the threshold; what is left counts `(1 − ratio) / (1 − threshold)` of one. A text in which no
    word comes twice has no stretch at all; it counts as one, so that MTLD is `N`.

    Source: McCarthy and Jarvis 2010, Behavior Research Methods 42, doi:10.3758/BRM.42.2.381; the last case is the
    convention of the package lexicalrichness.

    Args:
        found: the words, at least one.
        threshold: see `mtld`.

    Raises:
        ValueError: without words.
    """
    if not found:
        raise ValueError("a text without words has no lexical diversity")
    return (_one_way(found, threshold) + _one_way(found[::-1], threshold)) / 2


def _one_way(found: Sequence[str], threshold: float) -> float:
    factors = 0.0
    seen: set[str] = set()
    count = 0
    for word in found:
        seen.add(word)
        count += 1
        if len(seen) / count <= threshold:
            factors += 1
            seen, count = set(), 0
    if count:
        factors += (1 - len(seen) / count) / (1 - threshold)
    return len(found) / (factors or 1.0)
