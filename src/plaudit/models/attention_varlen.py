"""Packed attention with FlashAttention kernels for sequences of many lengths; CUDA, half precision.

Without a window: the cascade of `attention_cascade`, two calls a layer however many texts there are. With a window, or
with the `flash_attn` package: each completion's keys are `[what can be seen of the prefix; its own]`, gathered, and its
queries stand at the end of them, as these kernels align causal masks.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plaudit.models.attention_cascade import CascadeKernel, Gradients, cascade_attention, merge_parts
from plaudit.models.attention_layout import (
    AttentionOptions,
    PackedAttention,
    Sequences,
    Span,
    gather_rows,
    running_ends,
)


class ExpandedSequences(NamedTuple):
    """Every prefix and completion with all the keys it may see.

    Attributes:
        key_rows: `[S]` int64, the place in the row of each gathered key; a prefix stands here once per completion.
        query_ends: int32, `0` and the running sum of query lengths; queries are the row itself.
        key_ends: int32, the same of key lengths.
        longest_query: most queries in one sequence.
        longest_key: most keys in one sequence.
    """

    key_rows: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


def expand_sequences(attention: PackedAttention, window: int | None, device: torch.device) -> ExpandedSequences:
    """The row as sequences `[prefix; own]`, the queries at the end of their keys.

    Args:
        attention: the layout.
        window: the active window; of a prefix only the last `window - 1` tokens can be seen by a completion.
        device: where the indices go.
    """
    queries: list[Span] = []
    keys: list[list[Span]] = []
    for block in attention.blocks:
        start, end = block.prefix
        if end > start:
            queries.append(block.prefix)
            keys.append([block.prefix])
        seen = start if window is None else max(start, end - (window - 1))
        for completion in block.completions:
            queries.append(completion)
            keys.append([(seen, end), completion])
    key_lengths = [sum(end - start for start, end in spans) for spans in keys]
    return ExpandedSequences(
        gather_rows([span for spans in keys for span in spans], device),
        running_ends(queries, device),
        running_ends([(0, length) for length in key_lengths], device),
        max(end - start for start, end in queries),
        max(key_lengths),
    )


def _kernels() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """torch's forward and backward operators: the public `varlen_attn` cannot be given a merged log-sum-exp."""
    # The module defines the operators.
    import torch.nn.attention.varlen

    return torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward


@cache
def _grouped(arguments: tuple[str, ...]) -> dict[str, bool]:
    """What lets fewer heads of keys through: torch 2.10 and 2.11 have no such argument, their kernel takes them."""
    return {"enable_gqa": True} if "enable_gqa" in arguments else {}


@cache
def _arguments_of_operator() -> tuple[str, ...]:
    # The module defines the operator.
    import torch.nn.attention.varlen

    return tuple(argument.name for argument in torch.ops.torch_attn._varlen_attn.default._schema.arguments)


def _gather(tensor: Tensor, rows: Tensor, whole: bool) -> Tensor:
    return tensor.contiguous() if whole else tensor.index_select(0, rows)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    *,
    causal: bool,
    scaling: float,
    into: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    index = sequences.indices(query.device)
    q = _gather(query, index.query_rows, sequences.whole)
    k, v = (_gather(t, index.key_rows, sequences.whole) for t in (key, value))
    window = [-1, 0] if causal else [-1, -1]
    options = (causal, scaling, window, *_grouped(_arguments_of_operator()).values())
    out, lse, _ = _kernels()[0](q, k, v, index.query_ends, index.key_ends, *sequences.longest, *options)
    lse = lse.transpose(0, 1).contiguous()
    if into is None:
        return out, lse
    rows = index.query_rows
    merged = merge_parts(into[0].index_select(0, rows), into[1].index_select(0, rows), out, lse)
    for whole, part in zip(into, merged, strict=True):
        whole.index_copy_(0, rows, part)
    return into


def _backward(
    grad_out: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    sequences: Sequences,
    *,
    causal: bool,
    scaling: float,
    into: Gradients | None,
) -> Gradients:
    query, key, value, out, lse = saved
    index = sequences.indices(query.device)
    grad, q, o, sums = (_gather(t, index.query_rows, sequences.whole) for t in (grad_out, query, out, lse))
    k, v = (_gather(t, index.key_rows, sequences.whole) for t in (key, value))
    found = _kernels()[1](
        grad,
        q,
        k,
        v,
        o,
        sums.transpose(0, 1).contiguous(),
        index.query_ends,
        index.key_ends,
        *sequences.longest,
        causal,
        # State of the random generator, of which nothing is read without dropout.
        torch.zeros(2, dtype=torch.uint64, device=query.device),
        scaling,
        [-1, 0] if causal else [-1, -1],
    )
    if into is None:
        first, second, third = found
        return first, second, third
    for gradient, share, rows in zip(into, found, (index.query_rows, index.key_rows, index.key_rows), strict=True):
        gradient.index_add_(0, rows, share)
    return into


VARLEN_KERNEL = CascadeKernel(_forward, _backward)
"""torch's own FlashAttention, one call for all sequences."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def varlen_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: PackedAttention,
    options: AttentionOptions,
) -> Tensor:
    """torch's `varlen_attn` (torch 2.10 and later); arguments and result as for `reference_backend`.

    Raises:
        ValueError: for dropout, soft-caps and sinks, which the kernel does not have.
    """
    from torch.nn.attention.varlen import varlen_attn

    if options.dropout or options.softcap is not None or options.sinks is not None:
        raise ValueError("varlen attention has no dropout, no soft-cap and no sinks; use attn_implementation: auto")
    window = attention.active_window(options.window)
    if window is None:
        return cascade_attention(query, key, value, attention, VARLEN_KERNEL, scaling=options.scaling)
    sides = (window - 1, 0 if attention.layout.causal else window - 1)

    grouped = _grouped(tuple(inspect.signature(varlen_attn).parameters))

    def attend(q: Tensor, k: Tensor, v: Tensor, sequences: ExpandedSequences) -> Tensor:
        _, *ends = sequences
        kernel: Any = varlen_attn
        result: Tensor = kernel(q, k, v, *ends, scale=options.scaling, window_size=sides, **grouped)
        return result

    return expanded_attention(query, key, value, attention, attend, window=window)


def expanded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: PackedAttention,
    attend: Callable[[Tensor, Tensor, Tensor, ExpandedSequences], Tensor],
    *,
    window: int | None,
) -> Tensor:
    """Attention of every text over `[prefix; own]`, keys gathered.

    Args:
        query: `[1, h, N, d]`.
        key: `[1, g, N, d]`.
        value: `[1, g, N, d]`.
        attention: the layout.
        attend: `[N, h, d]` queries, `[S, g, d]` keys and values, and the sequences, to `[N, h, d]`.
        window: the active window.

    Returns:
        `[1, h, N, d]`.
    """
    sequences = attention.derived(("expanded", window), lambda: expand_sequences(attention, window, query.device))
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    rows = sequences.key_rows
    out = attend(q.contiguous(), k.index_select(0, rows), v.index_select(0, rows), sequences)
    return out.transpose(0, 1).unsqueeze(0)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def flash_backend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention: PackedAttention,
    options: AttentionOptions,
) -> Tensor:
    """The `flash_attn` package (2.6 and later); arguments and result as for `reference_backend`.

    Raises:
        ValueError: for sinks, which it does not have.
    """
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found, unused-ignore]

    if options.sinks is not None:
        raise ValueError("flash_attn has no attention sinks; use attn_implementation: auto")
    causal = attention.layout.causal
    window = attention.active_window(options.window)
    own: dict[str, Any] = {"dropout_p": options.dropout, "softmax_scale": options.scaling, "causal": causal}
    if window is not None:
        own["window_size"] = (window - 1, 0 if causal else window - 1)
    if options.softcap is not None:
        own["softcap"] = options.softcap

    def attend(q: Tensor, k: Tensor, v: Tensor, sequences: ExpandedSequences) -> Tensor:
        _, *ends = sequences
        result: Tensor = flash_attn_varlen_func(q, k, v, *ends, **own)
        return result

    return expanded_attention(query, key, value, attention, attend, window=window)
