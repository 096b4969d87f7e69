"""From character spans to the policy's tokens, whatever tokens the reward saw."""

from collections.abc import Sequence

import torch
from torch import Tensor

from plaudit.rewards.base import Score


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
    for _, end, value in score.spans[index] if score.spans is not None else ():
        # The first token with which `end` characters are written; text behind the last token belongs to that.
        place = min(int(torch.searchsorted(ends, max(end, 1))), len(ends) - 1)
        rewards[place] += value
    rewards[-1] += score.remainder()[index]
    return rewards
