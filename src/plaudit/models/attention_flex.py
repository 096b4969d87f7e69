"""Packed attention with FlexAttention: the layout's rule as a mask function over index tensors, and its block mask.

The kernel is compiled for the first row and once more for rows of every other length: rows are filled up to whole
tiles, and a new length is a new number of tiles, not a new program. The block mask is worked out tile by tile from the
layout, `O((N / 128)²)` numbers; the `[N, N]` mask that `create_block_mask` would evaluate never exists.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from plaudit.core.layout import PackedLayout
from plaudit.models.attention_layout import AttentionOptions, PackedAttention

TILE = 128
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class PaddedIndices(NamedTuple):
    """The layout's index tensors, filled up to `M` places, a multiple of the tile.

    Attributes:
        blocks: `[M]` int64; every place of the filling is a block of its own, so that it sees itself alone.
        segments: `[M]` int64.
        positions: `[M]` int64.
    """

    blocks: Tensor
    segments: Tensor
    positions: Tensor


def padded_indices(layout: PackedLayout, tile: int = TILE) -> PaddedIndices:
    """Fill a layout up to whole tiles: `[N]` to `[M]`."""
    extra = -layout.num_tokens % tile
    filling = torch.arange(1, extra + 1, device=layout.block_ids.device)
    return PaddedIndices(
        torch.cat((layout.block_ids, layout.block_ids[-1] + filling)),
        nn.functional.pad(layout.segment_ids, (0, extra)),
        nn.functional.pad(layout.positions, (0, extra)),
    )


def mask_function(indices: PaddedIndices, *, causal: bool, window: int | None) -> MaskFunction:
    """The layout's rule in the form that FlexAttention compiles.

    Args:
        indices: read by the function, so that other lengths need no other program.
        causal: whether the layout is a decoder's.
        window: the active window, or None.

    Returns:
        `(batch, head, query, key) -> bool`, on indices of any shape.
    """
    blocks, segments, positions = indices

    def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (blocks[query] == blocks[key]) & ((segments[key] == segments[query]) | (segments[key] == 0))
        distance = positions[query] - positions[key]
        if causal:
            seen = seen & (distance >= 0)
        if window is not None:
            seen = seen & ((distance if causal else distance.abs()) < window)
        return seen

    return allowed


def tile_kinds(indices: PaddedIndices, *, causal: bool, window: int | None, tile: int = TILE) -> tuple[Tensor, Tensor]:
    """Which tiles of the mask are empty, mixed or full, from the extremes of each tile's indices.

    Args:
        indices: `M` places.
        causal: whether the layout is a decoder's.
        window: the active window, or None.
        tile: places per tile.

    Returns:
        `mixed` and `full`, `[M / tile, M / tile]` bool, rows are queries. A tile that is neither is empty for certain;
        one that is full is full for certain; a mixed one may be either.
    """
    blocks, segments, positions = (t.view(-1, tile) for t in indices)
    # Pieces are the row's prefixes and completions, numbered in its order.
    key = indices.blocks * (indices.segments.max() + 1) + indices.segments
    pieces = torch.cat((key.new_zeros(1), (key[1:] != key[:-1]).long().cumsum(0))).view(-1, tile)

    def overlap(first: Tensor, second: Tensor) -> Tensor:
        return (first.amin(1)[:, None] <= second.amax(1)[None]) & (second.amin(1)[None] <= first.amax(1)[:, None])

    # Blocks of which a tile holds some of the prefix; the dummies make the range empty where it holds none.
    in_prefix = segments == 0
    lowest = blocks.masked_fill(~in_prefix, torch.iinfo(torch.long).max).amin(1)
    highest = blocks.masked_fill(~in_prefix, -1).amax(1)
    prefix_seen = (lowest[None] <= blocks.amax(1)[:, None]) & (highest[None] >= blocks.amin(1)[:, None])
    some = overlap(pieces, pieces) | (overlap(blocks, blocks) & prefix_seen)

    one_block = (blocks.amin(1)[:, None] == blocks.amax(1)[None]) & (blocks.amax(1)[:, None] == blocks.amin(1)[None])
    one_piece = (pieces.amin(1)[:, None] == pieces.amax(1)[None]) & (pieces.amax(1)[:, None] == pieces.amin(1)[None])
    every = one_piece | (one_block & in_prefix.all(1)[None])

    nearest = positions.amin(1)[:, None] - positions.amax(1)[None]
    farthest = positions.amax(1)[:, None] - positions.amin(1)[None]
    if causal:
        # What a token may see never stands behind it in the row.
        order = torch.arange(len(blocks), device=blocks.device)
        some, every = some & (farthest >= 0) & (order[None] <= order[:, None]), every & (nearest >= 0)
    if window is not None:
        if causal:
            some, every = some & (nearest < window), every & (farthest < window)
        else:
            some = some & (nearest < window) & (-farthest < window)
            every = every & (farthest < window) & (-nearest < window)
    return some & ~every, every


def block_mask(layout: PackedLayout, window: int | None, tile: int = TILE) -> BlockMask:
    """FlexAttention's block mask of a layout.

    Args:
        layout: `N` tokens.
        window: the active window, or None.
        tile: places per tile.

    Returns:
        The mask of `[M, M]`, `M` being `N` filled up to whole tiles.
    """
    indices = padded_indices(layout, tile)
    kinds = tile_kinds(indices, causal=layout.causal, window=window, tile=tile)
    lists: list[Tensor] = []
    for kind in kinds:
        counts = kind.sum(1, dtype=torch.int32)
        # Stable: the listed tiles come first, in the row's order.
        order = kind.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
        lists += [counts[None, None], order[None, None]]
    places = indices.blocks.shape[0]
    partial_count, partial_order, full_count, full_order = lists
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_order,
        full_count,
        full_order,
        BLOCK_SIZE=tile,
        mask_mod=mask_function(indices, causal=layout.causal, window=window),
        seq_lengths=(places, places),
    )


@cache
def _kernel(device: str) -> Any:
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


@cache
def _score_function(softcap: float | None) -> Any:
    if softcap is None:
        return None

    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]
def flex_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: PackedAttention,
    options: AttentionOptions,
) -> Tensor:
    """FlexAttention; arguments and result as for `reference_backend`. On the CPU only without gradients, and slowly.

    A sink `s` per head takes part in the softmax and gives nothing: `out · sigmoid(lse − s)`.

    Raises:
        ValueError: for dropout, which FlexAttention does not have.
    """
    if options.dropout:
        raise ValueError("FlexAttention has no dropout; use attn_implementation: auto")
    window, sinks = attention.active_window(options.window), options.sinks
    mask = attention.derived(("flex", window), lambda: block_mask(attention.layout, window))
    tokens = query.shape[2]
    extra = -tokens % TILE
    padded = [nn.functional.pad(t, (0, 0, 0, extra)) for t in (query, key, value)]
    attend = _kernel(query.device.type)
    own: dict[str, Any] = {"score_mod": _score_function(options.softcap), "block_mask": mask, "scale": options.scaling}
    own["enable_gqa"] = query.shape[1] != key.shape[1]
    out: Tensor
    if sinks is None:
        out = attend(*padded, **own)[:, :, :tokens]
        return out
    from torch.nn.attention.flex_attention import AuxRequest

    out, aux = attend(*padded, return_aux=AuxRequest(lse=True), **own)
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[:, None]).unsqueeze(-1)
    return (out * share).to(out.dtype)[:, :, :tokens]
