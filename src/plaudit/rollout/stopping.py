"""Where an answer ends: end tokens and stop strings."""

from collections.abc import Sequence
from typing import Any


class StopStrings:
    """Finds stop strings in what has been generated, and decodes only where one may just have ended.

    Attributes:
        strings: what ends an answer.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        """Prepare.

        Args:
            tokenizer: the tokenizer of the generated ids.
            strings: what ends an answer, none of them empty.
        """
        self.strings = tuple(strings)
        self._tokenizer = tokenizer
        self._last = {string[-1] for string in strings}
        self._may_end: dict[int, bool] = {}

    def reached(self, ids: Sequence[int]) -> bool:
        """Whether the text of these ids holds a stop string, given that it did not before the last of them."""
        if not self.strings or not self._can_complete(ids[-1]):
            return False
        text = decode(self._tokenizer, ids)
        return any(string in text for string in self.strings)

    def cut(self, text: str) -> str:
        """The text up to the first stop string in it."""
        places = [place for string in self.strings if (place := text.find(string)) >= 0]
        return text[: min(places)] if places else text

    def _can_complete(self, token: int) -> bool:
        """Whether the text of this token may hold the last character of a stop string."""
        found = self._may_end.get(token)
        if found is None:
            piece = decode(self._tokenizer, [token])
            # White space and parts of a character may look different on their own.
            unclear = not piece or piece != piece.strip() or "\ufffd" in piece or any(c.isspace() for c in self._last)
            found = self._may_end[token] = unclear or any(last in piece for last in self._last)
        return found


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of these ids without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
