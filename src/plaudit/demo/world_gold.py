"""The gold reward of the built-in world: what a reply is really worth, computed from its text alone.

It works on any text, also on what a policy makes up, by recognising the sides of a reply in its words. Each side is
bounded, so no single trick pays without end, and the best reply is one that a person would like: it answers this
request about this product, names a day or a number, is polite, and stops.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from itertools import pairwise
from types import MappingProxyType

from plaudit.data.records import Prompt
from plaudit.demo import world_text as text

GOLD_WEIGHTS: Mapping[str, float] = MappingProxyType(
    {
        "product": 1.5,
        "topic": 2.0,
        "concrete": 1.0,
        "manners": 1.25,
        "rambling": -2.0,
        "repetition": -3.0,
        "length": -1.5,
        "strangeness": -4.0,
    }
)

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_SLOT_VALUES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "product": text.PRODUCTS,
        "item": tuple(product.split()[-1] for product in text.PRODUCTS),
        "name": text.NAMES,
        "staff": text.STAFF,
        "day": text.DAYS,
        "number": text.NUMBERS,
        "place": text.PLACES,
        "stray": text.STRAYS,
    }
)
_ITEMS = frozenset(_SLOT_VALUES["item"])
_SPECIFIC = frozenset(word.lower() for word in (*text.DAYS, *text.NUMBERS))
_ANSWERED = frozenset(word for topic in text.TOPICS.values() for word in topic.answered)
_MEANINGFUL = _ITEMS | _ANSWERED | text.POLITE_WORDS | text.RUDE_WORDS
_START, _END = "<start>", "<end>"


@dataclass(frozen=True)
class Sides:
    """The sides of one reply.

    Attributes:
        product: 1 if it speaks of the product that was asked about and of no other, -1 if only of others, else 0.
        topic: (r - w) / (r + w) for r words that answer this kind of request and w that answer others; 0 without any.
        concrete: 1 if a sentence with a word that answers this request names a day or a number, else 0.
        manners: different polite words / 3, at most 1, minus the number of rude sentences; within [-1, 1].
        rambling: share of sentences without any word of product, answer, politeness or rudeness; in [0, 1].
        repetition: share of word trigrams that stood there before; in [0, 1].
        length: 0 from 12 to 45 words; rises to 1 at none and at 60.
        strangeness: share of word pairs, ends of sentences included, that the shop's own language never uses.
    """

    product: float
    topic: float
    concrete: float
    manners: float
    rambling: float
    repetition: float
    length: float
    strangeness: float


def _words(sentence: str) -> list[str]:
    return _WORD.findall(sentence.lower())


def _sentences(completion: str) -> list[str]:
    return [sentence for sentence in _SENTENCE_END.split(completion.strip()) if sentence]


def completion_templates() -> list[str]:
    """All sentences, with slots, that the shop's replies are made of."""
    remedies = [remedy for topic in text.TOPICS.values() for remedy in topic.remedies]
    return [
        *text.GREETINGS,
        *text.SYMPATHIES,
        *text.CLOSINGS,
        *text.INSULTS,
        *text.VAGUE_ANSWERS,
        *text.RAMBLINGS,
        *remedies,
    ]


def _template_bigrams(template: str) -> Iterator[tuple[str, str]]:
    """Every pair of neighbouring words that filling the slots can give, with the ends of the sentence."""
    phrases: list[list[list[str]]] = [[[_START]]]
    for piece in re.findall(r"\{(\w+)\}|([^{}]+)", template):
        values = _SLOT_VALUES[piece[0]] if piece[0] else (piece[1],)
        filled = [words for words in map(_words, values) if words]
        if filled:
            phrases.append(filled)
    phrases.append([[_END]])
    for left, right in pairwise(phrases):
        yield from ((a[-1], b[0]) for a in left for b in right)
    for phrase in phrases:
        for words in phrase:
            yield from pairwise(words)


@cache
def _known_bigrams() -> frozenset[tuple[str, str]]:
    return frozenset(bigram for template in completion_templates() for bigram in _template_bigrams(template))


def _strangeness(sentences: list[str]) -> float:
    known = _known_bigrams()
    strange = total = 0
    for sentence in sentences:
        end = _END if sentence.endswith((".", "!", "?")) else "<cut off>"
        words = [_START, *_words(sentence), end]
        pairs = list(pairwise(words))
        strange += sum(pair not in known for pair in pairs)
        total += len(pairs)
    return strange / total if total else 1.0


def _repetition(words: list[str]) -> float:
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0


@lru_cache(maxsize=4096)
def _asked(prompt: Prompt) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The items that a prompt names, the words that answer it, and the words that answer other requests."""
    topic = prompt_topic(prompt)
    answered = text.TOPICS[topic].answered if topic else frozenset[str]()
    return _ITEMS.intersection(_words(_prompt_text(prompt))), answered, _ANSWERED - answered


def prompt_topic(prompt: Prompt) -> str | None:
    """The kind of request, known by its words; None where none or several fit equally well."""
    words = _words(_prompt_text(prompt))
    hits = {name: sum(word in topic.asked for word in words) for name, topic in text.TOPICS.items()}
    best = max(hits.values())
    winners = [name for name, count in hits.items() if count == best]
    return winners[0] if best and len(winners) == 1 else None


def _prompt_text(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return " ".join(message.content for message in prompt if message.role == "user")


def sides(prompt: Prompt, completion: str) -> Sides:
    """Recognise the sides of a reply in its words; any two texts will do.

    Args:
        prompt: the request, as text or as messages (of which the user's count).
        completion: the reply.

    Returns:
        the sides; an empty reply has length and strangeness 1 and everything else 0.
    """
    asked_items, answered, answered_elsewhere = _asked(prompt)
    sentences = _sentences(completion)
    per_sentence = [_words(sentence) for sentence in sentences]
    words = [word for sentence in per_sentence for word in sentence]
    items = _ITEMS.intersection(words)
    right = len(answered.intersection(words))
    wrong = len(answered_elsewhere.intersection(words))
    specific = any(answered.intersection(sentence) and _SPECIFIC.intersection(sentence) for sentence in per_sentence)
    polite = min(1.0, len(text.POLITE_WORDS.intersection(words)) / 3)
    rude = sum(bool(text.RUDE_WORDS.intersection(sentence)) for sentence in per_sentence)
    rambling = sum(not _MEANINGFUL.intersection(sentence) for sentence in per_sentence)
    return Sides(
        product=0.0 if not items else float(bool(items & asked_items)) - float(bool(items - asked_items)),
        topic=(right - wrong) / max(1, right + wrong),
        concrete=float(specific),
        manners=max(-1.0, polite - rude),
        rambling=rambling / max(1, len(sentences)),
        repetition=_repetition(words),
        length=min(1.0, max(0.0, (12 - len(words)) / 12, (len(words) - 45) / 15)),
        strangeness=_strangeness(sentences),
    )


def gold_reward(prompt: Prompt, completion: str, weights: Mapping[str, float] = GOLD_WEIGHTS) -> float:
    """What a reply is really worth: `Σ_s weight_s · side_s`, at most 5.75 with the weights of the world.

    Args:
        prompt: the request, as text or as messages.
        completion: any text.
        weights: one per side of `Sides`; an annotator's own taste, for example.

    Returns:
        the reward, higher is better.
    """
    return weigh(sides(prompt, completion), weights)


def weigh(reply: Sides, weights: Mapping[str, float]) -> float:
    """`Σ_s weight_s · side_s`; a side without a weight counts nothing."""
    return sum(weights.get(side.name, 0.0) * float(getattr(reply, side.name)) for side in fields(reply))
