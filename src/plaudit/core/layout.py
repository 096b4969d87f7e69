"""The packed layout: many groups laid end to end in one row, without padding and without repeated prompts."""

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from plaudit.core.transfer import to_device


@dataclass(frozen=True)
class PackedLayout:
    """Where everything stands in one packed row of `N` tokens that holds `C` completions of `P` prompts.

    The row is a sequence of *blocks*. A block is one prefix (a prompt, possibly empty) followed by the completions
    that share it. A token attends to the prefix of its block and to its own segment, never to a sibling completion
    and never to another block. Completions of one prompt may stand in several blocks (a chat template that is not
    prefix-stable, an encoder, a group split in two): `group_index` and `slot_index` say where each score belongs.

    Attention rule, with `b` block, `s` segment (0 = prefix), `p` position:
        `allowed(q, k) = b_q == b_k and (s_k == s_q or s_k == 0) and (not causal or p_k <= p_q)`
    A sliding window of `w` adds `p_q - p_k < w` (causal) or `|p_q - p_k| <= w // 2` (bidirectional), measured in
    positions, not in places in the row.

    Attributes:
        positions: `[N]` int64. A prefix counts from 0; every completion starts at the length of its prefix.
        block_ids: `[N]` int64, non-decreasing from 0.
        segment_ids: `[N]` int64; 0 in a prefix, 1, 2, … in the completions of a block. In a bidirectional layout
            prefix and completion form one text, so every segment id is 0 and every block holds one completion.
        completion_starts: `[C]` int64, place in the row of the completion's first token.
        completion_ends: `[C]` int64, one past the completion's last token; always greater than the start.
        prefix_starts: `[C]` int64, place of the first token of the prefix that this completion sees.
        prefix_ends: `[C]` int64, one past that prefix; equal to the start for an empty prefix.
        group_index: `[C]` int64 in `0..P-1`, the prompt that the completion answers.
        slot_index: `[C]` int64 in `0..K-1`, which of the prompt's completions it is.
        num_groups: `P`.
        num_slots: `K`, the width of the `[P, K]` score table.
        causal: True for decoders; False for encoders.
        host: the layout on the CPU that this one was moved from, or None.
    """

    positions: Tensor
    block_ids: Tensor
    segment_ids: Tensor
    completion_starts: Tensor
    completion_ends: Tensor
    prefix_starts: Tensor
    prefix_ends: Tensor
    group_index: Tensor
    slot_index: Tensor
    num_groups: int
    num_slots: int
    causal: bool = True
    host: "PackedLayout | None" = field(default=None, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        """`N`, the number of tokens in the row."""
        return self.positions.shape[0]

    @property
    def num_completions(self) -> int:
        """`C`, the number of completions in the row."""
        return self.completion_starts.shape[0]

    @property
    def predictor_index(self) -> Tensor:
        """`[N]` int64: the place whose state predicts each token, -1 where nothing does.

        The first token of every completion is predicted by the *last prefix token*, every other token by the one
        before it in its own segment; the first token of a block by nothing.
        """
        index = torch.arange(self.num_tokens, device=self.positions.device) - 1
        index = torch.where(self.positions == 0, torch.full_like(index, -1), index)
        has_prefix = self.prefix_ends > self.prefix_starts
        return index.scatter(0, self.completion_starts[has_prefix], self.prefix_ends[has_prefix] - 1)

    def to(self, device: torch.device | str) -> "PackedLayout":
        """The same layout with every index tensor on `device`; `host` stays behind."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {name: to_device(tensor, device) for name, tensor in tensors.items()}
        return replace(self, **moved, host=self.on_host if self.positions.device.type == "cpu" else self.host)

    @property
    def on_host(self) -> "PackedLayout":
        """The layout to read plain numbers from: the one that was moved, where there is one, so that nobody waits."""
        return self if self.host is None else self.host


@dataclass(frozen=True)
class PackedBatch:
    """Token ids of one packed row and its layout.

    Attributes:
        input_ids: `[N]` int64.
        layout: where everything stands.
    """

    input_ids: Tensor
    layout: PackedLayout

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch on `device`."""
        return PackedBatch(to_device(self.input_ids, device), self.layout.to(device))


def check_layout(layout: PackedLayout) -> None:
    """Refuse a layout whose tensors contradict each other; everything but the spans is recomputed and compared.

    Blocks must tile the row: a prefix, then its completions end to end. From that follow block ids, segment ids and
    positions. For layouts from other hands and for tests; it synchronises with the device.

    Args:
        layout: `N` tokens, `C` completions, `P` groups, `K` slots.

    Raises:
        ValueError: for wrong dtypes or shapes, spans that do not tile the row, ids or positions that do not follow from
            the spans, groups or slots out of range, two completions of one group in one slot, or a bidirectional
            block with several completions.
    """
    for each in fields(layout):
        value = getattr(layout, each.name)
        if not isinstance(value, Tensor):
            continue
        per_token = each.name in ("positions", "block_ids", "segment_ids")
        size = layout.num_tokens if per_token else layout.num_completions
        if value.dtype != torch.int64 or value.shape != (size,):
            raise ValueError(f"{each.name} must be int64 [{size}], got {value.dtype} {list(value.shape)}")
    if layout.num_completions == 0:
        raise ValueError("the layout has no completion")
    first = _check_tiling(layout)
    block = first.long().cumsum(0) - 1
    in_block = torch.arange(len(first), device=first.device) - first.nonzero().squeeze(1)[block]
    if not layout.causal and not bool(first.all()):
        raise ValueError("a bidirectional block holds one completion, because prefix and completion see each other")
    prefix = (layout.prefix_ends - layout.prefix_starts)[first]
    sizes = torch.stack([prefix.new_zeros(len(first)), layout.completion_ends - layout.completion_starts], 1)
    sizes[first, 0] = prefix
    spans = sizes.flatten()
    zero = torch.zeros_like(block)
    expected = {
        "block_ids": torch.stack([block, block], 1).flatten().repeat_interleave(spans),
        "segment_ids": torch.stack([zero, in_block + 1 if layout.causal else zero], 1)
        .flatten()
        .repeat_interleave(spans),
        "positions": torch.arange(layout.num_tokens, device=first.device)
        + (torch.stack([zero, prefix[block]], 1).flatten() - (spans.cumsum(0) - spans)).repeat_interleave(spans),
    }
    for name, wanted in expected.items():
        wrong = (getattr(layout, name) != wanted).nonzero()
        if len(wrong):
            place = int(wrong[0])
            found = int(getattr(layout, name)[place])
            raise ValueError(f"{name}[{place}] is {found} but the spans say {int(wanted[place])}")
    _check_table(layout)


def _check_tiling(layout: PackedLayout) -> Tensor:
    """Check that prefixes and completions follow each other without gaps; `[C]` bool, True where a block starts."""
    starts, ends = layout.completion_starts, layout.completion_ends
    if bool((ends <= starts).any()) or bool((layout.prefix_ends < layout.prefix_starts).any()):
        raise ValueError("a completion has no token, or a prefix ends before it starts")
    before = torch.cat([ends.new_zeros(1), ends[:-1]])
    previous_prefix = torch.cat([layout.prefix_starts.new_full((1,), -1), layout.prefix_starts[:-1]])
    previous_end = torch.cat([layout.prefix_ends.new_full((1,), -1), layout.prefix_ends[:-1]])
    sibling = (starts == before) & (layout.prefix_starts == previous_prefix) & (layout.prefix_ends == previous_end)
    first = (layout.prefix_starts == before) & (layout.prefix_ends == starts)
    lost = ~(sibling | first)
    if bool(lost.any()):
        raise ValueError(
            f"completion {int(lost.nonzero()[0])} neither follows a sibling nor opens a block behind its prefix"
        )
    if int(ends[-1]) != layout.num_tokens:
        raise ValueError(f"the last completion ends at {int(ends[-1])} but the row has {layout.num_tokens} tokens")
    return first


def _check_table(layout: PackedLayout) -> None:
    """Check that every completion has its own place in the `[P, K]` table."""
    bounds = {"group_index": layout.num_groups, "slot_index": layout.num_slots}
    for name, bound in bounds.items():
        index = getattr(layout, name)
        if int(index.min()) < 0 or int(index.max()) >= bound:
            raise ValueError(f"{name} goes from {int(index.min())} to {int(index.max())}, outside 0..{bound - 1}")
    places = layout.group_index * layout.num_slots + layout.slot_index
    if int(places.bincount().max()) > 1:
        raise ValueError("two completions stand in the same slot of the same group")


def scatter_to_table(values: Tensor, layout: PackedLayout, fill: float = 0.0) -> Tensor:
    """Put one value per completion into the `[P, K]` table of its prompt and slot.

    Args:
        values: `[C]` or `[C, A]`, one value (or one per attribute) per completion.
        layout: the layout that the values came from.
        fill: what stands where a prompt has no completion.

    Returns:
        `[P, K]` or `[P, K, A]`, of the dtype of `values`; differentiable.

    Raises:
        ValueError: if the number of values is not the number of completions.
    """
    if values.shape[0] != layout.num_completions:
        raise ValueError(f"{values.shape[0]} values for {layout.num_completions} completions")
    table = values.new_full((layout.num_groups, layout.num_slots, *values.shape[1:]), fill)
    return table.index_put((layout.group_index, layout.slot_index), values)
