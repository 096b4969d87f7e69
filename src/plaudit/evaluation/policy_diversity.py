"""How varied several answers to one prompt are. Words as `plaudit.rewards.text` cuts them: characters in Chinese."""

import math
from collections import Counter
from collections.abc import Sequence

from plaudit.rewards.text import ngrams

SMOOTHED = 0.1
"""What a BLEU precision counts in place of no match: NLTK's `method1`."""


def distinct_n(answers: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over n-grams of all answers together, in 0..1; nan where there is none.

    It falls as answers get longer or more: compare at equal numbers of answers, and look at the length beside it.

    Source: Li et al. 2016, arXiv:1510.03055.

    Args:
        answers: words of each answer.
        n: words of an n-gram, at least 1.

    Raises:
        ValueError: if `n` is below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1")
    found = [gram for answer in answers for gram in ngrams(answer, n)]
    return len(set(found)) / len(found) if found else math.nan


def self_bleu(answers: Sequence[Sequence[str]], order: int = 4) -> float:
    """Mean BLEU of every answer against all others of the same prompt, in 0..1: 1 for answers that are all the same.

    `BLEU = BP · exp((1/m) Σ_k log p_k)`, `m = min(order, words)`, `p_k` the clipped k-gram precision (0.1 matches in
    place of none), `BP = min(1, exp(1 − r/c))` with the length `r` that is nearest to the answer's `c` (the shorter of
    two). Orders that an answer is too short for are left out, so that short answers are judged too. An answer without
    words has BLEU 1 if another one has none either, else 0.

    Source: Zhu et al. 2018, "Texygen", arXiv:1802.01886; BLEU: Papineni et al. 2002; smoothing: Chen and Cherry 2014,
    method 1.

    Args:
        answers: words of each answer.
        order: the longest n-grams that count.

    Returns:
        nan with fewer than two answers.

    Raises:
        ValueError: if `order` is below 1.
    """
    if order < 1:
        raise ValueError(f"order is {order}; it must be at least 1")
    if len(answers) < 2:
        return math.nan
    counts = [[Counter(ngrams(answer, n)) for n in range(1, order + 1)] for answer in answers]
    most = [_two_highest([found[n] for found in counts]) for n in range(order)]
    lengths = [len(answer) for answer in answers]
    return sum(_bleu(counts[i], most, lengths, i, order) for i in range(len(answers))) / len(answers)


def same_answers(answers: Sequence[str]) -> float:
    """The share of pairs of answers that are the same text, in 0..1; nan with fewer than two."""
    pairs = len(answers) * (len(answers) - 1)
    return sum(count * (count - 1) for count in Counter(answers).values()) / pairs if pairs else math.nan


_Highest = dict[tuple[str, ...], tuple[int, int, int]]


def _two_highest(counts: Sequence[Counter[tuple[str, ...]]]) -> _Highest:
    """For every n-gram the highest count in one answer, which answer has it, and the highest count in another."""
    found: _Highest = {}
    for owner, counter in enumerate(counts):
        for gram, count in counter.items():
            first, holder, second = found.get(gram, (0, -1, 0))
            found[gram] = (count, owner, first) if count > first else (first, holder, max(second, count))
    return found


def _bleu(
    counts: Sequence[Counter[tuple[str, ...]]],
    most: Sequence[_Highest],
    lengths: Sequence[int],
    own: int,
    order: int,
) -> float:
    length = lengths[own]
    others = [other for place, other in enumerate(lengths) if place != own]
    if length == 0:
        return float(0 in others)
    orders = min(order, length)
    total = 0.0
    for n in range(orders):
        matched = 0
        for gram, count in counts[n].items():
            first, holder, second = most[n][gram]
            matched += min(count, second if holder == own else first)
        total += math.log((matched or SMOOTHED) / (length - n))
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return math.exp(total / orders + min(0.0, 1 - nearest / length))
