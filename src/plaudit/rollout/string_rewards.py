"""Rewards of whole strings of a `TokenMDP` that ask for something of all of their tokens together."""

import itertools
from collections.abc import Callable

StringReward = Callable[[int, tuple[int, ...]], float]
"""Reward of a complete string: `(prompt, tokens)`; the tokens end with 0 unless the limit was reached."""


def consistent_style_reward(vocabulary: int, max_length: int) -> StringReward:
    """Words of the lower and of the upper half are two styles: `r = (pairs that stay - pairs that change) / (L - 1)`.

    Neither style is better; only staying with the one that was begun is rewarded, and length while doing so.
    """
    half = vocabulary // 2

    def reward(prompt: int, tokens: tuple[int, ...]) -> float:
        styles = [token <= half for token in tokens if token]
        return sum(1.0 if one == two else -1.0 for one, two in itertools.pairwise(styles)) / max(max_length - 1, 1)

    return reward


def key_and_door_reward(vocabulary: int, max_length: int) -> StringReward:
    """1 for strings whose first word is the prompt's key k and whose last word is its door `V - k`, else 0.

    The key of prompt p is `1 + p mod (V - 1)`. Key and door are not neighbours: the string has at least three words
    (as many as the limit allows where that is less), so the reward is sparse and its first half pays nothing alone.
    """

    def reward(prompt: int, tokens: tuple[int, ...]) -> float:
        words = [token for token in tokens if token]
        key = 1 + prompt % (vocabulary - 1)
        return float(len(words) >= min(3, max_length) and words[0] == key and words[-1] == vocabulary - key)

    return reward


STRING_REWARDS: dict[str, Callable[[int, int], StringReward]] = {
    "consistent_style": consistent_style_reward,
    "key_and_door": key_and_door_reward,
}
"""Structured rewards by name; each is made for a vocabulary size and a length limit."""
