"""How much arithmetic a training step needs at least, and how fast this machine multiplies matrices of these shapes."""

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from plaudit.core.layout import PackedLayout


def linear_layers(backbone: nn.Module) -> list[tuple[int, int]]:
    """(inputs, outputs) of every linear layer; embeddings are looked up, not multiplied."""
    return [(m.in_features, m.out_features) for m in backbone.modules() if isinstance(m, nn.Linear)]


def attended_pairs(prefix: int, completions: Sequence[int], *, causal: bool) -> int:
    """(query, key) pairs of one prompt and its completions.

    Causal: `p(p+1)/2 + Σ_i (c_i p + c_i (c_i + 1)/2)` with the prompt once; bidirectional: `Σ_i (p + c_i)²`.
    """
    if causal:
        return prefix * (prefix + 1) // 2 + sum(c * prefix + c * (c + 1) // 2 for c in completions)
    return sum((prefix + c) ** 2 for c in completions)


def layout_pairs(layout: PackedLayout) -> int:
    """`attended_pairs` of everything in a packed row."""
    blocks: dict[int, tuple[int, list[int]]] = {}
    spans = (layout.prefix_starts, layout.prefix_ends, layout.completion_starts, layout.completion_ends)
    for prefix_start, prefix_end, start, end in zip(*(span.tolist() for span in spans), strict=True):
        blocks.setdefault(prefix_start, (prefix_end - prefix_start, []))[1].append(end - start)
    # Empty prefixes of neighbouring blocks start in different places, because completions are never empty.
    return sum(attended_pairs(prefix, lengths, causal=layout.causal) for prefix, lengths in blocks.values())


def step_flops(backbone: nn.Module, config: Any, tokens: int, pairs: int) -> float:
    """Floating-point operations of forward and backward, recomputation not counted.

    `3 · (2 N Σ_linear in·out + 4 · layers · heads · d · pairs)`: a multiplication and an addition per weight and token,
    the same for `q·k` and for `weights·v`, and twice as much again in the backward pass (towards inputs and weights).

    Args:
        backbone: its linear layers are counted.
        config: its transformers configuration.
        tokens: `N`, unique tokens.
        pairs: (query, key) pairs of one layer, see `attended_pairs`.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head * pairs
    return 3.0 * (2 * tokens * sum(a * b for a, b in linear_layers(backbone)) + attention)


def matmul_rate(
    shapes: Iterable[tuple[int, int]],
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    clock: Callable[[], float] = perf_counter,
) -> float:
    """Floating-point operations per second of the products of linear layers, forward and both backward ones.

    Args:
        shapes: (inputs, outputs) of every layer.
        tokens: rows that go through at once.
        dtype: number format.
        device: where.
        clock: that it goes by.
    """
    unique = sorted(set(shapes))
    operands: list[tuple[Tensor, Tensor, Tensor]] = []
    for inputs, outputs in unique:
        x, w, y = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        operands.append(tuple(torch.randn(size, dtype=dtype, device=device) for size in (x, w, y)))  # type: ignore[arg-type]

    def once() -> None:
        for x, w, y in operands:
            torch.mm(x, w.t())
            torch.mm(y, w)
            torch.mm(y.t(), x)

    work = sum(3 * 2 * tokens * inputs * outputs for inputs, outputs in unique)
    best = float("inf")
    for _ in range(6):
        started = clock()
        once()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return work / best
