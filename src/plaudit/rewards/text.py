"""Words, sentences and lengths of text in any language, for rules that count.

Scripts that are written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese) count every character as a word,
so that a length in words means something there too. Full-width and half-width forms are the same character (NFKC).
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, get_args

Unit = Literal["words", "characters", "sentences"]

_SPACELESS = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3005, 0x3007),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)

#: The end of a sentence: Western marks where a space, a closing mark or the end follows; those of other scripts always.
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？｡।॥؟۔]+[」』”’）]*|\n\s*\n")


def normal(text: str) -> str:
    """The text with one form for each character: NFKC."""
    return unicodedata.normalize("NFKC", text)


def words(text: str) -> list[str]:
    """The words of a text, in lower case, without punctuation.

    A word is a run of letters, digits and the marks on them, with apostrophes and hyphens inside (`don't`,
    `well-kept`); in a script without spaces every character (with its marks) is one.
    """
    found: list[str] = []
    current = ""
    folded = normal(text).casefold()
    for place, character in enumerate(folded):
        kind = _kind(character)
        if kind == "letter":
            current += character
        elif kind == "mark" and (current or found):
            if current:
                current += character
            else:
                found[-1] += character
        elif kind == "joiner" and current and place + 1 < len(folded) and _kind(folded[place + 1]) == "letter":
            current += "'" if character == "’" else character
        else:
            if current:
                found.append(current)
            current = ""
            if kind == "spaceless":
                found.append(character)
    return [*found, current] if current else found


def sentences(text: str) -> list[str]:
    """The sentences of a text that hold a word, split behind `. ! ? …` and the marks of other scripts."""
    return [part.strip() for part in _SENTENCE_END.split(text) if any(_is_word(character) for character in part)]


def length(text: str, unit: Unit = "words") -> int:
    """How long a text is.

    Args:
        text: the text.
        unit: `words`, `characters` (white space not counted, marks with their letter) or `sentences`.

    Raises:
        ValueError: for another unit.
    """
    if unit == "words":
        return len(words(text))
    if unit == "characters":
        return sum(1 for c in normal(text) if not c.isspace() and _kind(c) != "mark")
    if unit == "sentences":
        return len(sentences(text))
    raise ValueError(f"unit is {unit!r}; it must be one of {', '.join(get_args(Unit))}")


def is_spaceless(character: str) -> bool:
    """Whether this character belongs to a script that is written without spaces."""
    return any(low <= ord(character) <= high for low, high in _SPACELESS)


def spaceless_share(text: str) -> float:
    """The share of a text's letters that belong to a script without spaces; 0 without letters."""
    letters = [c for c in normal(text) if _is_word(c)]
    return sum(map(is_spaceless, letters)) / len(letters) if letters else 0.0


def ngrams(items: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` neighbours, in order; none where there are fewer items."""
    return [tuple(items[start : start + n]) for start in range(len(items) - n + 1)]


def contains_words(found: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether `wanted` stands in `found` as neighbours."""
    return bool(wanted) and tuple(wanted) in set(ngrams(found, len(wanted)))


def _is_word(character: str) -> bool:
    return _kind(character) in ("letter", "spaceless")


@lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    category = unicodedata.category(character)
    if category[0] == "M" or character in "\u200c\u200d":
        return "mark"
    if category[0] in "LN":
        return "spaceless" if is_spaceless(character) else "letter"
    if character in "'’-‐":
        return "joiner"
    return "break"
