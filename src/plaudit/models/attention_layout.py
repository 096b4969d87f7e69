"""The packed layout as attention layers need it: spans, sequences, windows; worked out once per forward."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plaudit.core.layout import PackedLayout
from plaudit.core.transfer import to_device

Span = tuple[int, int]
"""First place in the row and one past the last."""


def allowed_pairs(layout: PackedLayout, window: int | None = None) -> Tensor:
    """Which token may attend to which, as the layout's rule says.

    `allowed(q, k) = b_q == b_k and (s_k == s_q or s_k == 0) and (not causal or p_k <= p_q)`; a window `w` adds
    `p_q - p_k < w` (causal) or `|p_q - p_k| < w` (bidirectional), measured in positions. This is the exclusive bound
    that transformers hands to every attention function (its bidirectional models pass half the window plus one).

    Args:
        layout: `N` tokens.
        window: the `sliding_window` argument of the layer, or None for full attention.

    Returns:
        `[N, N]` bool, rows are queries; every token may attend to itself.
    """
    blocks, segments = layout.block_ids, layout.segment_ids
    allowed = (segments[None, :] == segments[:, None]) | (segments[None, :] == 0)
    allowed &= blocks[:, None] == blocks[None, :]
    return allowed & visible_positions(layout.positions, layout.positions, causal=layout.causal, window=window)


def visible_positions(queries: Tensor, keys: Tensor, *, causal: bool, window: int | None) -> Tensor:
    """The part of the rule that positions decide: `[Q]` and `[S]` int64 to `[Q, S]` bool, True attends."""
    distance = queries[:, None] - keys[None, :]
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        allowed = allowed & ((distance if causal else distance.abs()) < window)
    return allowed


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """What a layer asks of attention besides the layout.

    Attributes:
        scaling: factor on the scores.
        window: sliding window in positions, exclusive, or None.
        dropout: probability of dropping an attention weight.
        softcap: cap on the scores (Gemma 2), or None.
        sinks: `[h]` logits that take probability and give nothing (gpt-oss), or None.
    """

    scaling: float
    window: int | None = None
    dropout: float = 0.0
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True)
class BlockSpans:
    """Where one block stands in the row.

    Attributes:
        prefix: its prefix; empty where the completions stand alone.
        completions: its completions, end to end behind the prefix. In a bidirectional layout prefix and completion are
            one text, which stands here as a single completion without a prefix.
    """

    prefix: Span
    completions: tuple[Span, ...]

    @property
    def tail(self) -> Span:
        """All completions of the block as one span."""
        return self.completions[0][0], self.completions[-1][1]


@dataclass(frozen=True)
class Sequences:
    """Pairs of spans of one row: the tokens of `queries[i]` attend to those of `keys[i]`.

    Attributes:
        queries: where each sequence's queries stand, in the row's order, without overlap.
        keys: where its keys stand; spans may repeat or overlap.
        whole: whether the queries tile the whole row, and the keys are the same spans.
    """

    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    whole: bool = False

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys in one sequence."""
        queries, keys = (max((end - start for start, end in spans), default=0) for spans in (self.queries, self.keys))
        return queries, keys

    def indices(self, device: torch.device) -> "SequenceIndices":
        """The same as index tensors on a device, made once."""
        if device not in self._indices:
            self._indices[device] = SequenceIndices(
                gather_rows(self.queries, device),
                gather_rows(self.keys, device),
                running_ends(self.queries, device),
                running_ends(self.keys, device),
            )
        return self._indices[device]

    @cached_property
    def _indices(self) -> dict[torch.device, "SequenceIndices"]:
        return {}


class SequenceIndices(NamedTuple):
    """Sequences as kernels for variable lengths take them.

    Attributes:
        query_rows: `[M]` int64, the place in the row of each gathered query.
        key_rows: `[S]` int64, the place in the row of each gathered key.
        query_ends: int32, `0` and the running sum of query lengths, one more than sequences.
        key_ends: int32, the same of key lengths.
    """

    query_rows: Tensor
    key_rows: Tensor
    query_ends: Tensor
    key_ends: Tensor


def running_ends(spans: Sequence[Span], device: torch.device) -> Tensor:
    """`0` and the running sum of the spans' lengths: int32, one more number than spans."""
    lengths = torch.tensor([0, *(end - start for start, end in spans)])
    return to_device(lengths.cumsum(0).to(torch.int32), device)


def gather_rows(spans: Sequence[Span], device: torch.device) -> Tensor:
    """The places that the spans cover, one span after the other: `[sum of lengths]` int64."""
    if not spans:
        return torch.empty(0, dtype=torch.long, device=device)
    return to_device(torch.cat([torch.arange(start, end) for start, end in spans]), device)


class PackedAttention:
    """What one packed forward hands to every attention layer: the layout, what is derived from it, a call counter.

    Attributes:
        layout: where everything stands.
        backend: name of the backend, or `auto`.
        calls: how often an attention layer has used it.
    """

    def __init__(self, layout: PackedLayout, backend: str = "auto") -> None:
        """Nothing is computed until a layer asks.

        Args:
            layout: the layout of the row.
            backend: one of `plaudit.models.attention_backends.BACKENDS`, or `auto`.
        """
        self.layout = layout
        self.backend = backend
        self.calls = 0
        self._derived: dict[Hashable, Any] = {}

    def derived(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """What `build` makes, made at the first layer that asks under this key and kept for the others."""
        if key not in self._derived:
            self._derived[key] = build()
        return self._derived[key]

    @property
    def blocks(self) -> tuple[BlockSpans, ...]:
        """Every block of the row, in its order; read from the layout on the CPU that this one was moved from."""
        return self.derived("blocks", lambda: block_spans(self.layout.on_host))  # type: ignore[no-any-return]

    @property
    def pieces(self) -> tuple[Span, ...]:
        """Every prefix that is not empty and every completion, in the row's order; together they tile the row."""

        def build() -> tuple[Span, ...]:
            spans = (span for block in self.blocks for span in (block.prefix, *block.completions))
            return tuple(span for span in spans if span[1] > span[0])

        return self.derived("pieces", build)  # type: ignore[no-any-return]

    @property
    def own(self) -> Sequences:
        """Runs that are plainly causal: a prefix with the first completion behind it, and every other completion."""

        def build() -> Sequences:
            runs = tuple(
                run
                for block in self.blocks
                for run in ((block.prefix[0], block.completions[0][1]), *block.completions[1:])
            )
            return Sequences(runs, runs, whole=True)

        return self.derived("own", build)  # type: ignore[no-any-return]

    @property
    def shared(self) -> Sequences:
        """For every block with siblings and a prefix: all later completions' tokens as queries, the prefix as keys."""

        def build() -> Sequences:
            blocks = [b for b in self.blocks if b.prefix[1] > b.prefix[0] and len(b.completions) > 1]
            queries = tuple((block.completions[1][0], block.tail[1]) for block in blocks)
            return Sequences(queries, tuple(block.prefix for block in blocks))

        return self.derived("shared", build)  # type: ignore[no-any-return]

    def active_window(self, window: int | None) -> int | None:
        """The window, or None where no text of this row is longer than it, so that it hides nothing."""
        if window is None:
            return None
        longest = self.derived("longest", lambda: max(map(longest_text, self.blocks)))
        return None if longest <= window else window

    def mask(self, window: int | None) -> Tensor:
        """`[1, 1, N, N]` bool for this window; only the reference needs it."""
        return self.derived(("mask", window), lambda: allowed_pairs(self.layout, window)[None, None])  # type: ignore[no-any-return]


def longest_text(block: BlockSpans) -> int:
    """Tokens of the longest text, prefix and completion, of a block."""
    return block.prefix[1] - block.prefix[0] + max(end - start for start, end in block.completions)


def block_spans(layout: PackedLayout) -> tuple[BlockSpans, ...]:
    """The blocks of a layout as plain numbers.

    Args:
        layout: `N` tokens, `C` completions.

    Returns:
        One entry per block, in the row's order.

    Raises:
        ValueError: if some tokens belong to no text: attention would leave their states undefined.
    """
    columns = torch.stack(
        (
            layout.block_ids[layout.completion_starts],
            layout.prefix_starts,
            layout.prefix_ends,
            layout.completion_starts,
            layout.completion_ends,
        )
    )
    blocks: list[BlockSpans] = []
    last = -1
    for block, prefix_start, prefix_end, start, end in zip(*columns.tolist(), strict=True):
        if not layout.causal:
            blocks.append(BlockSpans((prefix_start, prefix_start), ((prefix_start, end),)))
        elif block == last:
            blocks[-1] = BlockSpans(blocks[-1].prefix, (*blocks[-1].completions, (start, end)))
        else:
            blocks.append(BlockSpans((prefix_start, prefix_end), ((start, end),)))
        last = block
    covered = sum(block.tail[1] - block.tail[0] + block.prefix[1] - block.prefix[0] for block in blocks)
    if covered != layout.num_tokens:
        raise ValueError(f"the layout's texts cover {covered} of its {layout.num_tokens} tokens")
    return tuple(blocks)
