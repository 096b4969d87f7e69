"""The kernel of `attention_cascade` on the CPU: torch's flash kernel over as few and as well-shaped calls as possible.

Two things cost time there that the arithmetic does not need. Each call hands out tensors of its own, so that results of
many sequences have to be put together: sequences of equal lengths at equal distances go through in one call instead,
without a copy. And the kernel is slow on the causal triangle, which it fills in number by number (26 against 50 Gflop/s
on rectangles): a long triangle is cut into small ones along the diagonal and rectangles below them, which double in
size from level to level, and meet in their log-sum-exp as all parts of the cascade do.
"""

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv

from plaudit.models.attention_cascade import CascadeKernel, Gradients, merge_parts
from plaudit.models.attention_layout import Sequences, Span

TRIANGLE = 128
"""Length of the triangles along the diagonal; a run of less than two stays whole."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Spans(NamedTuple):
    """Spans of one length at one distance: the `i`-th is `[start + i·step, start + i·step + length)`."""

    start: int
    length: int
    step: int


class KernelCall(NamedTuple):
    """One call of the flash kernel over sequences of equal lengths.

    Attributes:
        number: how many sequences.
        queries: where their queries stand in the row.
        keys: where their keys stand.
        causal: whether a query sees no key behind its own place.
        merged: whether the same queries have been through an earlier call.
    """

    number: int
    queries: Spans
    keys: Spans
    causal: bool
    merged: bool


@lru_cache(maxsize=64)
def plan_kernel_calls(sequences: Sequences, causal: bool) -> tuple[KernelCall, ...]:
    """The calls that cover these sequences; the rectangles of long causal runs come last, small ones first.

    Args:
        sequences: pairs of spans; where attention is causal, queries and keys are the same.
        causal: whether a query sees no key behind its own place.

    Returns:
        Calls of which no two that are not `merged` share a query.
    """
    if not causal:
        return tuple(grouped_calls(zip(sequences.queries, sequences.keys, strict=True)))
    triangles = [span for run in sequences.queries for span in cut_run(run)]
    calls = grouped_calls(zip(triangles, triangles, strict=True), causal=True)
    size = TRIANGLE
    while size < sequences.longest[0]:
        rectangles = (
            ((place, min(place + size, end)), (place - size, place))
            for start, end in sequences.queries
            if end - start >= 2 * TRIANGLE
            for place in range(start + size, end, 2 * size)
        )
        calls += grouped_calls(rectangles, merged=True)
        size *= 2
    return tuple(calls)


def cut_run(run: Span) -> list[Span]:
    """The triangles of a causal run: `TRIANGLE` tokens each, the last with what is left; a short run is one."""
    start, end = run
    if end - start < 2 * TRIANGLE:
        return [run]
    return [(place, min(place + TRIANGLE, end)) for place in range(start, end, TRIANGLE)]


def grouped_calls(
    pairs: Iterable[tuple[Span, Span]], *, causal: bool = False, merged: bool = False
) -> list[KernelCall]:
    """Neighbouring (queries, keys) of equal lengths at equal distances, no two overlapping, in one call each."""
    found: list[KernelCall] = []
    for (start, end), (first, last) in pairs:
        call = KernelCall(1, Spans(start, end - start, 0), Spans(first, last - first, 0), causal, merged)
        joined = joined_call(found[-1], call) if found else None
        if joined is None:
            found.append(call)
        else:
            found[-1] = joined
    return found


def joined_call(call: KernelCall, one_more: KernelCall) -> KernelCall | None:
    """Both in one call, or None where the second does not lie as the sequences of the first do."""
    joined = []
    for spans, following in ((call.queries, one_more.queries), (call.keys, one_more.keys)):
        step = following.start - spans.start if call.number == 1 else spans.step
        regular = following.start == spans.start + call.number * step
        # Overlapping keys would be added to in one place several times at once.
        if following.length != spans.length or not regular or step < spans.length:
            return None
        joined.append(spans._replace(step=step))
    return call._replace(number=call.number + 1, queries=joined[0], keys=joined[1])


def rows_of(tensor: Tensor, spans: Spans, count: int) -> Tensor:
    """`[N, …]` seen as `[count, length, …]`, without a copy."""
    first, *rest = tensor.stride()
    return tensor.as_strided(
        (count, spans.length, *tensor.shape[1:]),
        (max(spans.step, spans.length) * first, first, *rest),
        tensor.storage_offset() + spans.start * first,
    )


def _heads_first(tensor: Tensor, spans: Spans, count: int, heads: int) -> Tensor:
    """`[N, g, d]` seen as `[count, h, length, d]`, grouped heads repeated."""
    part = rows_of(tensor, spans, count).transpose(1, 2)
    return part if part.shape[1] == heads else repeat_kv(part, heads // part.shape[1])


def _merge_into(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """`merge_parts`, written to where the first part stands."""
    if out.dtype != lse.dtype:
        # torch.lerp would round the shares to the dtype of the output.
        for target, value in zip((out, lse), merge_parts(out, lse, other, other_lse), strict=True):
            target.copy_(value)
        return
    merged = torch.logaddexp(lse, other_lse)
    out.lerp_(other, (other_lse - merged).exp_().unsqueeze(-1))
    lse.copy_(merged)


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
    heads = query.shape[1]
    calls = plan_kernel_calls(sequences, causal)
    result = into
    for call in calls:
        part, sums = _flash(
            _heads_first(query, call.queries, call.number, heads),
            _heads_first(key, call.keys, call.number, heads),
            _heads_first(value, call.keys, call.number, heads),
            0.0,
            call.causal,
            scale=scaling,
        )
        part, sums = part.transpose(1, 2), sums.transpose(1, 2)
        if result is None and len(calls) == 1:
            return part.flatten(0, 1), sums.flatten(0, 1)
        if result is None:
            result = torch.empty_like(query, memory_format=torch.contiguous_format), sums.new_empty(query.shape[:2])
        out, lse = (rows_of(tensor, call.queries, call.number) for tensor in result)
        if into is not None or call.merged:
            _merge_into(out, lse, part, sums)
        else:
            out.copy_(part)
            lse.copy_(sums)
    assert result is not None
    return result


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
    heads = query.shape[1]
    calls = plan_kernel_calls(sequences, causal)
    result = into
    for call in calls:
        found = _flash_backward(
            _heads_first(grad_out, call.queries, call.number, heads),
            _heads_first(query, call.queries, call.number, heads),
            _heads_first(key, call.keys, call.number, heads),
            _heads_first(value, call.keys, call.number, heads),
            _heads_first(out, call.queries, call.number, heads),
            rows_of(lse, call.queries, call.number).transpose(1, 2),
            0.0,
            call.causal,
            scale=scaling,
        )
        shares = [share.transpose(1, 2) for share in found]
        if key.shape[1] != heads:
            shares[1:] = [share.unflatten(2, (key.shape[1], -1)).sum(3) for share in shares[1:]]
        if result is None and len(calls) == 1:
            first, second, third = (share.flatten(0, 1) for share in shares)
            return first, second, third
        if result is None:
            first, second, third = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in saved[:3])
            result = first, second, third
        for gradient, share, spans in zip(result, shares, (call.queries, call.keys, call.keys), strict=True):
            rows = rows_of(gradient, spans, call.number)
            if into is not None or call.merged:
                rows.add_(share)
            else:
                rows.copy_(share)
    assert result is not None
    return result


CPU_KERNEL = CascadeKernel(_forward, _backward)
"""The CPU's flash kernel."""
