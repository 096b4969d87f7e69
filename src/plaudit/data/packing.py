"""Packing: tokenised groups laid end to end in one row, and the same completions back as plain padded rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from plaudit.core.layout import PackedBatch, PackedLayout
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PaddedRows:
    """The plain padded form of a packed batch: one row per completion, its prefix repeated.

    Attributes:
        input_ids: `[C, T]` int64; padding holds the pad id, which nothing else depends on.
        attention_mask: `[C, T]` bool, True on real tokens; made from lengths, never from the pad id.
        completion_start: `[C]` int64, column of the completion's first token.
        completion_end: `[C]` int64, one past the column of the completion's last token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_start: Tensor
    completion_end: Tensor

    @property
    def position_ids(self) -> Tensor:
        """`[C, T]` int64: tokens count from 0 from each row's first real token; padding holds 0."""
        return (self.attention_mask.long().cumsum(1) - 1).clamp(min=0)

    def to(self, device: torch.device | str) -> "PaddedRows":
        """The same rows on `device`."""
        return PaddedRows(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.completion_start.to(device),
            self.completion_end.to(device),
        )


def pack_groups(groups: Sequence[TokenisedGroup], *, causal: bool, num_slots: int | None = None) -> PackedBatch:
    """Lay groups end to end in one row: each block's prefix once, its completions after it, no padding.

    Positions of a prefix count from 0 and those of every completion start at the length of its prefix, so each
    completion sees exactly what it would see alone behind the prompt.

    Args:
        groups: `P` tokenised groups; group `i` becomes `group_index == i`.
        causal: True for decoders. For encoders (False) every block must hold exactly one completion, because
            prefix and completion attend to each other.
        num_slots: `K`, the width of the score table; default: the largest number of completions of a group.

    Returns:
        A batch of `N` tokens and `C` completions, in the order of groups, blocks, completions; on the CPU.

    Raises:
        ValueError: if there is nothing to pack, a completion has no token, two completions of a group share a slot,
            a slot does not fit into `num_slots`, or a bidirectional block holds several completions.
    """
    if not groups:
        raise ValueError("no groups to pack: give at least one TokenisedGroup")
    width = max(group.num_slots for group in groups) if num_slots is None else num_slots
    _check_groups(groups, causal=causal, width=width)
    blocks = [block for group in groups for block in group.blocks]

    # A piece is a prefix or a completion; the row is the pieces end to end.
    pieces: list[list[int]] = []
    for block in blocks:
        pieces.append(block.prefix)
        pieces.extend(block.completions)
    piece_lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    piece_ends = np.cumsum(piece_lengths)
    piece_starts = piece_ends - piece_lengths
    total = int(piece_ends[-1])

    completions_per_block = np.fromiter((len(block.completions) for block in blocks), np.int64, len(blocks))
    prefix_pieces = np.cumsum(completions_per_block + 1) - (completions_per_block + 1)
    piece_blocks = np.repeat(np.arange(len(blocks)), completions_per_block + 1)
    piece_segments = np.arange(len(pieces)) - prefix_pieces[piece_blocks]
    prefix_lengths = piece_lengths[prefix_pieces]
    first_positions = np.where(piece_segments == 0, 0, prefix_lengths[piece_blocks])
    positions = np.arange(total) + np.repeat(first_positions - piece_starts, piece_lengths)

    is_completion = piece_segments > 0
    completion_blocks = piece_blocks[is_completion]
    blocks_per_group = [len(group.blocks) for group in groups]
    group_of_block = np.repeat(np.arange(len(groups)), blocks_per_group)
    layout = PackedLayout(
        positions=torch.from_numpy(positions),
        block_ids=torch.from_numpy(np.repeat(piece_blocks, piece_lengths)),
        segment_ids=torch.from_numpy(np.repeat(piece_segments if causal else piece_segments * 0, piece_lengths)),
        completion_starts=torch.from_numpy(piece_starts[is_completion]),
        completion_ends=torch.from_numpy(piece_ends[is_completion]),
        prefix_starts=torch.from_numpy(piece_starts[prefix_pieces][completion_blocks]),
        prefix_ends=torch.from_numpy(piece_ends[prefix_pieces][completion_blocks]),
        group_index=torch.from_numpy(group_of_block[completion_blocks]),
        slot_index=torch.tensor([slot for block in blocks for slot in block.slots], dtype=torch.int64),
        num_groups=len(groups),
        num_slots=width,
        causal=causal,
    )
    input_ids = np.fromiter(chain.from_iterable(pieces), np.int64, total)
    return PackedBatch(torch.from_numpy(input_ids), layout)


def unpack_rows(batch: PackedBatch, pad_id: int, side: str = "right") -> PaddedRows:
    """Write every completion of a packed batch as its own padded row `[prefix, completion]`.

    Args:
        batch: `N` tokens and `C` completions.
        pad_id: what stands in the padding; may equal a real token's id, since the mask is made from lengths.
        side: `"right"` puts the padding after the text, `"left"` before it.

    Returns:
        `C` rows of `T = max(prefix + completion)` columns, in the layout's completion order, on the batch's device.

    Raises:
        ValueError: if `side` is neither `"right"` nor `"left"`.
    """
    if side not in ("right", "left"):
        raise ValueError(f'side is {side!r}; use "right" or "left"')
    layout = batch.layout
    prefix_lengths = layout.prefix_ends - layout.prefix_starts
    lengths = prefix_lengths + layout.completion_ends - layout.completion_starts
    width = int(lengths.max()) if layout.num_completions else 0
    offset = width - lengths if side == "left" else torch.zeros_like(lengths)
    column = torch.arange(width, device=batch.input_ids.device)[None, :] - offset[:, None]
    mask = (column >= 0) & (column < lengths[:, None])
    in_prefix = column < prefix_lengths[:, None]
    place = torch.where(
        in_prefix,
        layout.prefix_starts[:, None] + column,
        (layout.completion_starts - prefix_lengths)[:, None] + column,
    )
    tokens = batch.input_ids[torch.where(mask, place, torch.zeros_like(place))]
    return PaddedRows(
        input_ids=torch.where(mask, tokens, torch.full_like(tokens, pad_id)),
        attention_mask=mask,
        completion_start=offset + prefix_lengths,
        completion_end=offset + lengths,
    )


def _check_groups(groups: Sequence[TokenisedGroup], *, causal: bool, width: int) -> None:
    for index, group in enumerate(groups):
        slots = [slot for block in group.blocks for slot in block.slots]
        if len(set(slots)) != len(slots):
            raise ValueError(f"group {index} has two completions in one slot: {slots}")
        if slots and not 0 <= min(slots) <= max(slots) < width:
            raise ValueError(f"group {index} has slots {slots}, which do not fit into a table of {width} columns")
        for block in group.blocks:
            _check_block(block, index, causal=causal)


def _check_block(block: TokenisedBlock, group: int, *, causal: bool) -> None:
    if not block.completions:
        raise ValueError(f"group {group} has a block without any completion")
    if len(block.completions) != len(block.slots):
        raise ValueError(f"group {group}: {len(block.completions)} completions but {len(block.slots)} slots")
    if not all(block.completions):
        raise ValueError(f"group {group} has a completion of no token; append an end token to empty answers")
    if not causal and len(block.completions) != 1:
        raise ValueError(
            f"group {group}: a bidirectional block holds one completion, not {len(block.completions)}; "
            "give the encoder one block per completion"
        )
