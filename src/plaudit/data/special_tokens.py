"""What a tokenizer puts around texts, found by trying it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PairSpecials:
    """What a tokenizer puts before, between and behind two texts, and the token type of the second."""

    head: list[int]
    middle: list[int]
    tail: list[int]
    token_type: int


def leading_specials(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer puts before a text (bos); what it may put behind one is not wanted before an answer."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    dressed = list(tokenizer("a")["input_ids"])
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    return []


def find_anchor(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """A text to tokenise completions behind, where the tokenizer puts a space before every text; else None."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    anchor = "\n"
    return None if ids(anchor) + ids("ab") == ids(anchor + "ab") else anchor


def pair_specials(tokenizer: "PreTrainedTokenizerBase") -> PairSpecials:
    """The special tokens that the tokenizer builds around and between two texts, found from a pair of letters."""
    encoded = tokenizer("a", "b")
    ids = list(encoded["input_ids"])
    first, second = (list(tokenizer(letter, add_special_tokens=False)["input_ids"]) for letter in "ab")
    start = next((i for i in range(len(ids)) if ids[i : i + len(first)] == first), None)
    end = next((i for i in range(len(ids), -1, -1) if ids[i - len(second) : i] == second), None)
    if start is None or end is None or not first or not second or start + len(first) > end - len(second):
        raise ValueError("cannot see how this tokenizer joins two texts; an encoder needs a tokenizer of pairs")
    middle = ids[start + len(first) : end - len(second)]
    types = encoded.get("token_type_ids")
    return PairSpecials(ids[:start], middle, ids[end:], int(types[end - 1]) if types else 0)
