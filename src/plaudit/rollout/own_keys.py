"""Memory for the keys and values that rows write while they decode: without gaps, and taken from the system once."""

import math
from collections.abc import Sequence

from torch import Tensor

ROOM = 16
"""Places of a row for which room is made at a time."""
_SPARE = 4


def new_room(like: Tensor) -> Tensor:
    """`[R, g, 16, d]` of zeros, of the type of `[R, g, d]`; there is memory for four times as many places behind it."""
    rows, groups, size = like.shape
    shape = (rows, groups, ROOM, size)
    room = like.new_empty(_SPARE * math.prod(shape))[: math.prod(shape)].view(shape)
    return room.zero_()


def more_room(cache: Tensor, rows: int, steps: int) -> Tensor:
    """Room for more places of the first `rows` rows, of which `steps` are kept; the new ones hold zeros.

    A row's places lie side by side and the rows one behind the other: all rows move when one needs more. A gap behind
    each, kept free for later, would make every step slower: reading 40 of 64 places took an AMD core three times as
    long as reading 40 that lie side by side, and longer than reading all 64.

    Args:
        cache: `[R, g, steps, d]`, which must not be used any more afterwards.
        rows: how many rows go on.
        steps: places in use, all of them.

    Returns:
        `[rows, g, steps + n, d]`, in the same memory where that suffices, otherwise in twice as much as is needed.
    """
    kept = cache[:rows, :, :steps]
    shape = (rows, cache.shape[1], steps + max(ROOM, steps // 8), cache.shape[3])
    count = math.prod(shape)
    if cache.untyped_storage().nbytes() >= count * cache.element_size():
        kept = kept.clone()
        grown = cache.as_strided(shape, _strides(shape), 0)
    else:
        grown = cache.new_empty(2 * count)[:count].view(shape)
    grown[:, :, :steps] = kept
    grown[:, :, steps:] = 0
    return grown


def _strides(shape: Sequence[int]) -> list[int]:
    """Of a tensor without gaps."""
    return [math.prod(shape[place + 1 :]) for place in range(len(shape))]
