"""From character spans to the policy's tokens, whatever tokens the reward saw."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plaudit.rewards.base import Score


def token_ends(tokenizer: Any, ids: Sequence[int], completion: str) -> list[int]:
    """For each token how many characters of the completion have been written with it; special tokens write none.

    Args:
        tokenizer: the tokenizer of these ids.
        ids: the `T` tokens of the completion.
        completion: its text, perhaps without the white space that the tokens begin with.

    Returns:
        `T` numbers that never fall. A character of several tokens is written by the last of them.
    """
    texts = [str(tokenizer.decode(list(ids[: count + 1]), skip_special_tokens=True)) for count in range(len(ids))]
    before = 0 if not texts or completion[:1].isspace() else len(texts[-1]) - len(texts[-1].lstrip())
    ends: list[int] = []
    for text in texts:
        # Half a character decodes to a replacement sign, which the next token takes back.
        whole = text if text == texts[-1] else text.rstrip("\ufffd")
        ends.append(max(min(max(len(whole) - before, 0), len(completion)), ends[-1] if ends else 0))
    return ends


def token_rewards(score: Score, index: int, token_ends: Sequence[int]) -> Tensor:
    """What each token of one completion earns: its spans, and the rest of the total at the last token.

    `r_t = Σ_{spans that end in token t} score`, and `+ (total − Σ spans)` for the last `t`. A span is earned by the
    token that holds its last character, since only then has all of it been said. The sum is the total.

    Args:
        score: the scores of a batch.
        index: which sample.
        token_ends: for each of `T` tokens, in order, how many characters of the text have been written once it is
            there; the end token, which writes none, repeats the last number.

    Returns:
        `[T]` float32.

    Raises:
        ValueError: if there is no token, the ends fall, or the sample is invalid.
    """
    if not bool(score.valid[index]):
        raise ValueError(f"sample {index} has no valid reward: {score.problems.get(index, 'no reason given')}")
    ends = torch.tensor(list(token_ends), dtype=torch.int64)
    if not len(ends) or bool((ends.diff() < 0).any()):
        raise ValueError(f"token_ends are {list(token_ends)[:8]}; there must be one at least, and they never fall")
    rewards = torch.zeros(len(ends))
    spans = score.spans[index] if score.spans is not None else ()
    for _, end, value in spans:
        # The first token with which `end` characters are written; text behind the last token belongs to that.
        place = min(int(torch.searchsorted(ends, max(end, 1))), len(ends) - 1)
        rewards[place] += value
    # Of this sample alone: `Score.remainder` adds up the spans of all.
    rewards[-1] += score.total[index] - torch.tensor(math.fsum(value for _, _, value in spans))
    return rewards
