"""What a model must beat: length alone, and a bag of words. Both score completions, so that pairs can be bootstrapped.

A floor is a scorer: `scores(comparisons)` gives one number per completion, higher is better, like a reward model's.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from plaudit.configs.data import SplitKey
from plaudit.data.records import Comparison, preference_pairs, prompt_text
from plaudit.data.splits import kfold, leave_one_out, prompt_key, split_keys

FloatArray = npt.NDArray[np.float64]

#: A word, one character of a script that is written without spaces, or one mark of punctuation.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
    r"|[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
    r"|[^\w\s]"
)


@dataclass(frozen=True)
class Rate:
    """A rate over pairs with its interval.

    Attributes:
        value: the rate in 0..1.
        low: lower end of the 95 % interval.
        high: upper end.
        count: pairs behind it.
        clusters: prompts behind it.
    """

    value: float
    low: float
    high: float
    count: int
    clusters: int


def clustered_rate(wins: Sequence[float], clusters: Sequence[object]) -> Rate | None:
    """The mean of `wins` (each in 0..1) with a 95 % interval that treats the items of one cluster as dependent.

    `r = Σ wins / n`; `Var(r) ≈ G/(G-1) · Σ_g (Σ_{i∈g} (wins_i - r))² / n²` (the linearised ratio estimator, Cochran
    1977, chapter 9.A), interval `r ± 1.96·√Var`, cut to 0..1. None where there is nothing to average; with a single
    cluster the interval is all of 0..1.
    """
    if not wins:
        return None
    mean = float(np.mean(wins))
    sums: dict[object, float] = {}
    for win, cluster in zip(wins, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + (win - mean)
    count = len(sums)
    if count < 2:
        return Rate(mean, 0.0, 1.0, len(wins), count)
    variance = count / (count - 1) * sum(value**2 for value in sums.values()) / len(wins) ** 2
    half = 1.96 * variance**0.5
    return Rate(mean, max(0.0, mean - half), min(1.0, mean + half), len(wins), count)


def words(text: str) -> list[str]:
    """The words of a text in lower case; every character by itself where the script has no spaces."""
    return _WORD.findall(text.casefold())


def unigrams_and_bigrams(text: str) -> list[str]:
    """The words of a text and its pairs of neighbours (`"not good"`)."""
    single = words(text)
    return single + [f"{a} {b}" for a, b in pairwise(single)]


def length_scores(comparisons: Sequence[Comparison]) -> list[list[float]]:
    """The length floor as scores: the number of characters of every completion (negate it for "shorter wins")."""
    return [[float(len(text)) for text in comparison.completions] for comparison in comparisons]


def pair_rate(comparisons: Sequence[Comparison], win: Callable[[int, int, int], float | None]) -> Rate | None:
    """The mean of something over all judged, untied pairs, clustered by prompt.

    Args:
        comparisons: whose pairs are counted.
        win: from the place of the comparison and its winner and loser to a number in 0..1; None leaves the pair out.
    """
    wins: list[float] = []
    clusters: list[str] = []
    for place, comparison in enumerate(comparisons):
        key = prompt_key(comparison.prompt)
        for winner, loser in preference_pairs(comparison):
            value = win(place, winner, loser)
            if value is not None:
                wins.append(value)
                clusters.append(key)
    return clustered_rate(wins, clusters)


def length_floor(comparisons: Sequence[Comparison]) -> Rate | None:
    """How often the longer completion of a judged, untied pair won; pairs of equal length are left out.

    1 minus this is "the shorter one wins". None where no pair differs in length.
    """
    lengths = length_scores(comparisons)

    def longer(place: int, winner: int, loser: int) -> float | None:
        one, other = lengths[place][winner], lengths[place][loser]
        return None if one == other else float(one > other)

    return pair_rate(comparisons, longer)


@dataclass(frozen=True)
class BagOfWords:
    """A fitted bag-of-words scorer: `score(text) = w · tfidf(text)`.

    Attributes:
        vectorizer: scikit-learn's TF-IDF vectorizer.
        coefficients: `[features]` the weights `w`.
        response_only: whether the prompt is left out of the text.
    """

    vectorizer: Any
    coefficients: FloatArray
    response_only: bool

    def scores(self, comparisons: Sequence[Comparison]) -> list[list[float]]:
        """One score per completion; `σ(score_i - score_j)` is the probability that `i` is preferred to `j`."""
        texts = [text for comparison in comparisons for text in _texts(comparison, self.response_only)]
        if not texts:
            return []
        flat = (self.vectorizer.transform(texts) @ self.coefficients).tolist()
        ends = np.cumsum([len(comparison.completions) for comparison in comparisons])
        return [flat[end - len(c.completions) : end] for end, c in zip(ends, comparisons, strict=True)]

    def strongest_words(self, count: int = 15) -> tuple[list[tuple[str, float]], list[tuple[str, float]]]:
        """The words (and pairs) with the largest and the smallest weights, the strongest first."""
        names = self.vectorizer.get_feature_names_out()
        order = np.argsort(self.coefficients)
        best = [(str(names[i]), float(self.coefficients[i])) for i in order[::-1][:count] if self.coefficients[i] > 0]
        worst = [(str(names[i]), float(self.coefficients[i])) for i in order[:count] if self.coefficients[i] < 0]
        return best, worst


def fit_bag_of_words(
    train: Sequence[Comparison],
    *,
    response_only: bool = True,
    regularisation: float = 1e-4,
    analyse: Callable[[str], list[str]] = unigrams_and_bigrams,
) -> BagOfWords:
    """Logistic regression on the difference of two completions' TF-IDF vectors of words and word pairs.

    `P(i ≻ j) = σ(w · (v_i - v_j))`, no intercept, each pair in both orders, every comparison weighing the same
    (times its own weight) however many pairs it has. `v = (1 + log tf)·idf` over words,
    marks and pairs of neighbours that stand in at least two texts (50,000 at most). It is not scaled to unit length:
    length may then be used as well, which makes the floor harder to beat.

    Args:
        train: comparisons; their judged, untied pairs are learned from.
        response_only: leave the prompt out. With the prompt in, only the scaling of `v` changes with it.
        regularisation: inverse strength `C` of the squared penalty (scikit-learn).
        analyse: text to its words and pairs.

    Raises:
        ValueError: if there is no judged, untied pair.
    """
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    texts: dict[str, int] = {}
    winners: list[int] = []
    losers: list[int] = []
    weights: list[float] = []
    for comparison in train:
        places = [texts.setdefault(text, len(texts)) for text in _texts(comparison, response_only)]
        pairs = preference_pairs(comparison)
        for winner, loser in pairs:
            winners.append(places[winner])
            losers.append(places[loser])
            weights.append(comparison.weight / len(pairs))
    if not winners:
        raise ValueError("no judged, untied pair to fit a bag of words to")
    vectorizer = TfidfVectorizer(
        analyzer=analyse, sublinear_tf=True, norm=None, min_df=2 if len(texts) >= 200 else 1, max_features=50_000
    )
    vectors = vectorizer.fit_transform(list(texts))
    differences = vectors[winners] - vectors[losers]
    both = vstack([differences, -differences]).tocsr()
    labels = np.repeat([1, 0], len(winners))
    model = LogisticRegression(C=regularisation, fit_intercept=False, max_iter=300, solver="liblinear")
    model.fit(both, labels, sample_weight=np.tile(np.asarray(weights) / np.mean(weights), 2))
    return BagOfWords(vectorizer, model.coef_[0].astype(np.float64), response_only)


def pair_accuracy(comparisons: Sequence[Comparison], scores: Sequence[Sequence[float]]) -> Rate | None:
    """How often the preferred completion of a judged, untied pair scores higher (equal scores count half)."""

    def right(place: int, winner: int, loser: int) -> float:
        one, other = scores[place][winner], scores[place][loser]
        return 0.5 if one == other else float(one > other)

    return pair_rate(comparisons, right)


def cross_validated_floor(
    comparisons: Sequence[Comparison], *, folds: int = 5, response_only: bool = True, seed: int = 0
) -> Rate | None:
    """The bag-of-words floor over all comparisons, each scored by a model that never saw its prompt (or group).

    None where there are too few prompts for the folds, or no judged pair.
    """
    by_group = any(comparison.group is not None for comparison in comparisons)
    seen: dict[str, list[str]] = {}

    def analyse(text: str) -> list[str]:
        if text not in seen:
            seen[text] = unigrams_and_bigrams(text)
        return seen[text]

    try:
        parts = _folds(comparisons, folds, "group" if by_group else "prompt", seed)
        scored = [
            (test, fit_bag_of_words(train, response_only=response_only, analyse=analyse).scores(test))
            for train, test in parts
        ]
    except ValueError:
        return None
    return pair_accuracy([c for test, _ in scored for c in test], [s for _, scores in scored for s in scores])


def _folds(
    comparisons: Sequence[Comparison], folds: int, key: SplitKey, seed: int
) -> list[tuple[list[Comparison], list[Comparison]]]:
    """Folds by hash, or one key at a time where there are so few keys that folds by hash would be empty or lopsided."""
    if len(set(split_keys(comparisons, key))) < 4 * folds:
        return list(leave_one_out(comparisons, key).values())
    return kfold(comparisons, folds, key, seed)


def _texts(comparison: Comparison, response_only: bool) -> list[str]:
    if response_only:
        return list(comparison.completions)
    prompt = prompt_text(comparison.prompt)
    return [f"{prompt}\n\n{text}" for text in comparison.completions]
