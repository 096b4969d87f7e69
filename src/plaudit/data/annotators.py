"""Several annotators of the same completions: joined into one comparison."""

from collections.abc import Sequence
from dataclasses import replace

from plaudit.data.records import (
    Best,
    Comparison,
    Judgement,
    Labels,
    Prompt,
    Ranking,
    Ratings,
    Scores,
    Votes,
    tiers_of,
)

Key = tuple[Prompt, tuple[str, ...], frozenset[str], str]


def merge_annotators(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Join comparisons of one prompt and the same set of completions (in any order) into one.

    Rankings, picks and votes become votes: every judgement gives its weight to its best completion, shared equally
    where several are tied at the top; votes count as they are. Scores and ratings become weighted means over those
    who judged a completion. Labels become the weighted majority; an even split is unjudged.
    Judgements of different kinds (relative, scores, labels, ratings) are not mixed: each kind gives its own
    comparison. A comparison that stands alone stays as it is, and so do rankings that leave completions unjudged (votes
    would make losers of those) and those whose sum would say nothing (labels that all split evenly, weights of 0).
    Other images are another prompt. The joined comparison stands in the place of its first,
    keeps that one's order, id, group and subset, has no annotator and weight 1; a margin is kept where all agree.

    Note that votes keep of a long ranking only who won; keep annotators apart to learn from whole rankings.
    """
    found: dict[Key | int, list[Comparison]] = {}
    for place, comparison in enumerate(comparisons):
        texts = frozenset(comparison.completions)
        key = (comparison.prompt, comparison.images, texts, _kind(comparison.judgement))
        found.setdefault(place if _leaves_some_unjudged(comparison) else key, []).append(comparison)
    merged: list[Comparison] = []
    for members in found.values():
        joined = _merge(members) if len(members) > 1 else members[0]
        merged.extend(members if _is_blank(joined.judgement) else [joined])
    return merged


def _kind(judgement: Judgement) -> str:
    return "relative" if isinstance(judgement, Ranking | Best | Votes) else type(judgement).__name__


def _leaves_some_unjudged(comparison: Comparison) -> bool:
    judgement = comparison.judgement
    return isinstance(judgement, Ranking) and sum(map(len, judgement.tiers)) < len(comparison.completions)


def _is_blank(judgement: Judgement) -> bool:
    if isinstance(judgement, Votes):
        return sum(judgement.counts) <= 0
    if isinstance(judgement, Labels | Scores):
        return all(value is None for value in judgement.values)
    return isinstance(judgement, Ratings) and all(v is None for vs in judgement.attributes.values() for v in vs)


def _merge(members: Sequence[Comparison]) -> Comparison:
    first = members[0]
    order = {text: index for index, text in enumerate(first.completions)}
    places = [[member.completions.index(text) for text in order] for member in members]
    weights = [member.weight for member in members]
    margins = {member.margin for member in members}
    return replace(
        first,
        judgement=_join([member.judgement for member in members], places, weights),
        annotator=None,
        weight=1.0,
        margin=margins.pop() if len(margins) == 1 else None,
    )


def _join(judgements: Sequence[Judgement], places: Sequence[Sequence[int]], weights: Sequence[float]) -> Judgement:
    """One judgement in the order of the first; `places[n][i]` is where completion `i` stands for annotator `n`."""
    first = judgements[0]
    if isinstance(first, Scores):
        columns = [one.values for one in judgements if isinstance(one, Scores)]
        return Scores(_means(columns, places, weights))
    if isinstance(first, Ratings):
        rated = [one.attributes for one in judgements if isinstance(one, Ratings)]
        empty = (None,) * len(places[0])
        names = dict.fromkeys(name for one in rated for name in one)
        return Ratings({name: _means([one.get(name, empty) for one in rated], places, weights) for name in names})
    if isinstance(first, Labels):
        signs = [tuple(None if v is None else 1.0 if v else -1.0 for v in one.values)
                 for one in judgements if isinstance(one, Labels)]  # fmt: skip
        return Labels(tuple(None if not mean else mean > 0 for mean in _means(signs, places, weights)))
    counts = [0.0] * len(places[0])
    for judgement, place, weight in zip(judgements, places, weights, strict=True):
        shares = _shares(judgement, len(place))
        for index, there in enumerate(place):
            counts[index] += weight * shares[there]
    return Votes(tuple(counts))


def _shares(judgement: Judgement, num_completions: int) -> Sequence[float]:
    if isinstance(judgement, Votes):
        return judgement.counts
    top = tiers_of(judgement, num_completions)[0]
    return [1 / len(top) if index in top else 0.0 for index in range(num_completions)]


def _means(
    columns: Sequence[Sequence[float | None]], places: Sequence[Sequence[int]], weights: Sequence[float]
) -> tuple[float | None, ...]:
    """The weighted mean per completion over those who judged it; None where nobody (or only weight 0) did."""
    means: list[float | None] = []
    for index in range(len(places[0])):
        there = [(column[place[index]], weight) for column, place, weight in zip(columns, places, weights, strict=True)]
        judged = [(value, weight) for value, weight in there if value is not None and weight > 0]
        total = sum(weight for _, weight in judged)
        means.append(sum(value * weight for value, weight in judged) / total if judged else None)
    return tuple(means)
