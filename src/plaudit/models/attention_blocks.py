"""Packed attention text by text with torch's own kernels: the backend for the CPU, and where nothing better works.

Two ways. Where attention is plain (no active window, soft-cap, sink or dropout) and the CPU's flash kernel takes it:
the cascade of `attention_cascade`. Otherwise each prefix and each completion, in chunks of queries, attends to
`[what it sees of the prefix; what it sees of itself]` under a small mask. Neither has anything of the size of the row
squared, or of a block squared.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.integrations.sdpa_attention import repeat_kv

from plaudit.models.attention_cascade import cascade_attention
from plaudit.models.attention_cpu import CPU_KERNEL
from plaudit.models.attention_layout import AttentionOptions, PackedAttention, Span, visible_positions
from plaudit.models.attention_reference import explicit_attention

_CHUNK = 256


@torch.compiler.disable  # type: ignore[untyped-decorator]
def block_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: PackedAttention,
    options: AttentionOptions,
) -> Tensor:
    """Text by text; arguments and result as for `plaudit.models.attention_reference.reference_backend`.

    It takes every option on every device. Lengths are plain numbers here, so `torch.compile` leaves it as it is.
    """
    window = attention.active_window(options.window)
    explicit = options.softcap is not None or options.sinks is not None
    plain = window is None and not explicit and options.dropout == 0.0
    if plain and query.device.type == "cpu" and query.shape[-1] == key.shape[-1] == value.shape[-1]:
        return cascade_attention(query, key, value, attention, CPU_KERNEL, scaling=options.scaling)
    groups = query.shape[1] // key.shape[1]
    sizes = [end - start for start, end in attention.pieces]
    parts = [t.split(sizes, dim=2) for t in (query, repeat_kv(key, groups), repeat_kv(value, groups))]
    masks = _explicit_masks if explicit else _kernel_masks
    calls = attention.derived(("calls", window), lambda: plan_calls(attention, window))
    found = attention.derived(
        (masks, window, query.dtype), lambda: masks(calls, attention.layout.causal, window, query)
    )
    outputs = []
    with _kernels(query.device):
        for call, mask in zip(calls, found, strict=True):
            q = parts[0][call.piece][:, :, call.queries[0] : call.queries[1]]
            k, v = (_gather(t, call) for t in parts[1:])
            if explicit:
                out = explicit_attention(q, k, v, mask, options)
            else:
                out = nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, dropout_p=options.dropout, scale=options.scaling, is_causal=call.causal
                )
            outputs.append(out)
    return torch.cat(outputs, dim=2)


def _kernels(device: torch.device) -> AbstractContextManager[object]:
    """The kernels that may be taken: not cuDNN's, which plans anew for every shape, and every text has its own."""
    if device.type != "cuda":
        return nullcontext()
    chosen = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: AbstractContextManager[object] = sdpa_kernel(chosen)
    return context


@dataclass(frozen=True)
class Call:
    """One call of the kernel: some queries of a piece over the keys that they may see.

    Attributes:
        piece: which of `PackedAttention.pieces` the queries are of.
        queries: their places in that piece.
        prefix: which piece is the prefix, or None.
        prefix_keys: places in the prefix.
        own_keys: places in the piece itself.
        first: position of the piece's first token.
        causal: whether the mask would be the plain causal square.
        full: whether the mask would be True everywhere.
    """

    piece: int
    queries: Span
    prefix: int | None
    prefix_keys: Span
    own_keys: Span
    first: int
    causal: bool
    full: bool


def plan_calls(attention: PackedAttention, window: int | None) -> list[Call]:
    """The calls that cover the row, in its order.

    Args:
        attention: the layout.
        window: the active window: keys that no query of a chunk can see are left out. None cuts no chunks.

    Returns:
        One call per chunk of each piece.
    """
    calls: list[Call] = []
    piece = 0
    for block in attention.blocks:
        length = block.prefix[1] - block.prefix[0]
        prefix = piece if length else None
        if prefix is not None:
            calls += _plan_piece(piece, length, None, 0, attention.layout.causal, window)
            piece += 1
        for start, end in block.completions:
            calls += _plan_piece(piece, end - start, prefix, length, attention.layout.causal, window)
            piece += 1
    return calls


def _plan_piece(
    piece: int, length: int, prefix: int | None, prefix_length: int, causal: bool, window: int | None
) -> list[Call]:
    step = length if window is None else max(window, _CHUNK)
    calls = []
    for start in range(0, length, step):
        end = min(start + step, length)
        first = prefix_length + start
        # The earliest position that any query of the chunk sees.
        earliest = 0 if window is None else max(0, first - window + 1)
        stop = end if causal else length if window is None else min(length, end + window - 1)
        calls.append(
            Call(
                piece=piece,
                queries=(start, end),
                prefix=prefix if earliest < prefix_length else None,
                prefix_keys=(earliest, prefix_length),
                own_keys=(max(0, earliest - prefix_length), stop),
                first=prefix_length,
                causal=causal and window is None and prefix is None,
                full=not causal and window is None,
            )
        )
    return calls


def _gather(pieces: tuple[Tensor, ...], call: Call) -> Tensor:
    own = pieces[call.piece][:, :, call.own_keys[0] : call.own_keys[1]]
    if call.prefix is None:
        return own
    return torch.cat((pieces[call.prefix][:, :, call.prefix_keys[0] : call.prefix_keys[1]], own), dim=2)


def _explicit_masks(calls: list[Call], causal: bool, window: int | None, query: Tensor) -> list[Tensor]:
    """For every call `[1, 1, Q, S]` bool."""
    masks = []
    for call in calls:
        queries = torch.arange(*call.queries) + call.first
        keys = torch.arange(*call.own_keys) + call.first
        if call.prefix is not None:
            keys = torch.cat((torch.arange(*call.prefix_keys), keys))
        masks.append(visible_positions(queries, keys, causal=causal, window=window)[None, None].to(query.device))
    return masks


def _kernel_masks(calls: list[Call], causal: bool, window: int | None, query: Tensor) -> list[Tensor | None]:
    """For every call `[1, 1, Q, S]` in the queries' dtype, 0 or -inf: no layer has to convert a bool mask; or None."""
    masks: list[Tensor | None] = []
    for call in calls:
        if call.causal or call.full:
            masks.append(None)
            continue
        (allowed,) = _explicit_masks([call], causal, window, query)
        masks.append(torch.zeros_like(allowed, dtype=query.dtype).masked_fill_(~allowed, float("-inf")))
    return masks
