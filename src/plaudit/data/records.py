"""The records that every job shares: comparisons, judgements and demonstrations. Imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass


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
