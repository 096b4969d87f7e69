"""The records that every job shares: comparisons, judgements and demonstrations. Imports nothing heavy."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: `role` is `system`, `user`, `assistant` or `tool`."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Ranking:
    """Tiers of completion indices, best first; those in one tier are tied; an index in no tier is unjudged."""

    tiers: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Best:
    """The index of the one completion that was picked out of the K."""

    index: int


@dataclass(frozen=True)
class Votes:
    """How many annotators (or how much weight) picked each of the K completions."""

    counts: tuple[float, ...]


@dataclass(frozen=True)
class Scores:
    """One number per completion, higher is better; None where unjudged."""

    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Labels:
    """Good (True) or bad (False) per completion; None where unjudged."""

    values: tuple[bool | None, ...]


@dataclass(frozen=True)
class Ratings:
    """Named attributes, each with one number per completion; None where unjudged."""

    attributes: Mapping[str, tuple[float | None, ...]]


Judgement = Ranking | Best | Votes | Scores | Labels | Ratings


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt with its K completions and one judgement by one annotator.

    `group` names what must not be split (a document, a conversation tree); `subset` a part of the data that is
    reported apart; `margin` how much better (in score units) the better of two must be, for pairs.
    """

    prompt: Prompt
    completions: tuple[str, ...]
    judgement: Judgement
    id: str | None = None
    annotator: str | None = None
    weight: float = 1.0
    margin: float | None = None
    images: tuple[str, ...] = ()
    group: str | None = None
    subset: str | None = None


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """A prompt with a completion that a person wrote."""

    prompt: Prompt
    completion: str
    id: str | None = None
    weight: float = 1.0
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class PromptRecord:
    """A prompt to be answered.

    `columns` is whatever else stood beside it and a reward may want to see, such as the answer to a question.
    """

    prompt: Prompt
    id: str | None = None
    group: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


class RecordError(ValueError):
    """A record that cannot be used, with everything a person needs to mend it.

    Attributes:
        reason: a short name under which such records are counted, e.g. `"identical completions"`.
        key: the key (or path of keys) that is wrong, e.g. `"ranking[1]"`.
        expected: what should have stood there.
        problem: what stood there instead.
        place: file and line, once a reader has added them.
        is_fault: False where nothing is broken but there is nothing to learn either (a reply without ranked siblings);
            such rows are counted as refused and never stop a run.
    """

    def __init__(
        self,
        reason: str,
        *,
        key: str = "",
        problem: str = "",
        expected: str = "",
        place: str = "",
        is_fault: bool = True,
    ) -> None:
        self.reason, self.key, self.problem, self.expected = reason, key, problem, expected
        self.place, self.is_fault = place, is_fault
        super().__init__(reason)

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        key = f" in key '{self.key}'" if self.key else ""
        problem = f": {self.problem}" if self.problem else ""
        expected = f"; expected {self.expected}" if self.expected else ""
        return f"{where}{self.reason}{key}{problem}{expected}"


def prompt_text(prompt: Prompt) -> str:
    """The prompt as one plain text: messages become `role: content` paragraphs; plain text stays as it is."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def first_user_turn(prompt: Prompt) -> str:
    """What the person said first; for plain text the whole prompt. The split key is made from it."""
    if isinstance(prompt, str):
        return prompt
    return next((message.content for message in prompt if message.role == "user"), prompt_text(prompt))


def tiers_of(
    judgement: Judgement,
    num_completions: int,
    tie_threshold: float = 0.0,
    attribute_weights: Mapping[str, float] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """Any judgement as tiers, best first; completions that were not judged stand in no tier.

    A pick is `((picked,), (the others,))`; votes, scores and (weighted) ratings are sorted by value; labels are
    `((good…), (bad…))`. For values, a tier is opened by the best value left and takes every value that is equal or
    less than `tie_threshold` below it.

    Args:
        judgement: what the annotator said.
        num_completions: `K`.
        tie_threshold: differences smaller than this are ties, in units of the values; 0 ties only equal values.
        attribute_weights: for ratings, the weight of each attribute; by default all count 1. A completion that lacks
            an attribute of non-zero weight is unjudged.

    Raises:
        ValueError: if a weighted attribute is not among the ratings.
    """
    match judgement:
        case Ranking(tiers):
            return tiers
        case Best(index):
            rest = tuple(other for other in range(num_completions) if other != index)
            return ((index,), rest) if rest else ((index,),)
        case Labels(values):
            both = tuple(tuple(i for i, label in enumerate(values) if label is wanted) for wanted in (True, False))
            return tuple(tier for tier in both if tier)
        case Votes(counts):
            return _tiers_of_values(counts, tie_threshold)
        case Scores(values=numbers):
            return _tiers_of_values(numbers, tie_threshold)
        case Ratings():
            return _tiers_of_values(rating_totals(judgement, attribute_weights), tie_threshold)


def rating_totals(ratings: Ratings, attribute_weights: Mapping[str, float] | None = None) -> tuple[float | None, ...]:
    """One weighted sum of attributes per completion (`K` values); None where a weighted attribute is missing."""
    weights = dict.fromkeys(ratings.attributes, 1.0) if attribute_weights is None else dict(attribute_weights)
    unknown = sorted(set(weights) - set(ratings.attributes))
    if unknown:
        raise ValueError(f"weights for attributes {unknown}, but the ratings have {sorted(ratings.attributes)}")
    used = [(weight, ratings.attributes[name]) for name, weight in weights.items() if weight != 0]
    columns = zip(*(values for _, values in used), strict=True)
    totals: list[float | None] = []
    for column in columns:
        present = [value for value in column if value is not None]
        total = sum(weight * value for (weight, _), value in zip(used, present, strict=False))
        totals.append(total if len(present) == len(column) else None)
    return tuple(totals)


def preference_pairs(comparison: Comparison, tie_threshold: float = 0.0) -> list[tuple[int, int]]:
    """`(winner, loser)` for every pair of completions that was judged and not tied, best winner first.

    A pick gives `K - 1` pairs (the others were not compared with one another).
    """
    tiers = tiers_of(comparison.judgement, len(comparison.completions), tie_threshold)
    return [
        (winner, loser)
        for place, tier in enumerate(tiers)
        for winner in tier
        for lower in tiers[place + 1 :]
        for loser in lower
    ]


def tied_pairs(comparison: Comparison, tie_threshold: float = 0.0) -> list[tuple[int, int]]:
    """`(i, j)`, `i < j`, for every pair that was judged equal: same tier, same score, same number (> 0) of votes.

    Completions that merely were not picked, or got the same yes/no label, were not compared: they are no ties.
    """
    judgement = comparison.judgement
    if isinstance(judgement, Best | Labels):
        return []
    tiers = tiers_of(judgement, len(comparison.completions), tie_threshold)
    if isinstance(judgement, Votes):
        tiers = tuple(tier for tier in tiers if any(judgement.counts[index] > 0 for index in tier))
    ordered = [sorted(tier) for tier in tiers]
    return [(tier[a], tier[b]) for tier in ordered for a in range(len(tier)) for b in range(a + 1, len(tier))]


def _tiers_of_values(values: Sequence[float | None], tie_threshold: float) -> tuple[tuple[int, ...], ...]:
    judged = sorted(((-value, index) for index, value in enumerate(values) if value is not None))
    tiers: list[list[int]] = []
    top = math.inf
    for negative, index in judged:
        if tiers and (negative == top or negative - top < tie_threshold):
            tiers[-1].append(index)
        else:
            tiers.append([index])
            top = negative
    return tuple(tuple(sorted(tier)) for tier in tiers)
