"""Packed attention on this machine: `blocks` beside one masked call per block and beside one mask over the row.

Forward and backward of one layer's attention (8 heads of 32, float32), alternating, medians of thread time.

    python benchmarks/attention.py [--repeats 5] [--json FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from plaudit.core.layout import PackedLayout
from plaudit.data.packing import pack_groups
from plaudit.data.tokenising import TokenisedBlock, TokenisedGroup
from plaudit.models.attention_backends import BACKENDS
from plaudit.models.attention_layout import AttentionOptions, PackedAttention, allowed_pairs

HEADS, SIZE = 8, 32
SHAPES = {
    "K = 2, prompt 145": [(145, [70, 60])] * 4,
    "K = 4, prompt 860": [(860, [126, 110, 140, 128])],
    "K = 9, prompt 60": [(60, [60, 58, 62, 60, 55, 65, 60, 61, 59])] * 4,
}
Attend = Callable[[Tensor, Tensor, Tensor, PackedAttention], Tensor]


def layout_of(shapes: list[tuple[int, list[int]]]) -> PackedLayout:
    """The layout of prompts and completions of these lengths."""
    blocks = [TokenisedBlock([3] * p, [[3] * c for c in lengths], list(range(len(lengths)))) for p, lengths in shapes]
    return pack_groups([TokenisedGroup((block,)) for block in blocks], causal=True).layout


def masked_blocks(query: Tensor, key: Tensor, value: Tensor, attention: PackedAttention) -> Tensor:
    """One call per block with a mask of its size squared."""
    spans = [(block.prefix[0], block.tail[1]) for block in attention.blocks]
    sizes = [end - start for start, end in spans]
    masks = attention.derived(
        "masks", lambda: [allowed_pairs(attention.layout)[None, None, a:b, a:b].contiguous() for a, b in spans]
    )
    parts = zip(*(t.split(sizes, 2) for t in (query, key, value)), masks, strict=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    return torch.cat([attend(q, k, v, attn_mask=mask) for q, k, v, mask in parts], 2)


def backend(name: str) -> Attend:
    """A backend of Plaudit with nothing but its tensors to choose."""
    options = AttentionOptions(scaling=SIZE**-0.5)
    return lambda q, k, v, attention: BACKENDS[name](q, k, v, attention, options)


WAYS: dict[str, Attend] = {
    "blocks": backend("blocks"),
    "masked blocks": masked_blocks,
    "reference": backend("reference"),
}


def measure(layout: PackedLayout, repeats: int) -> dict[str, float]:
    """Median milliseconds of forward and backward, for every way."""
    attention = PackedAttention(layout)
    inputs = [torch.randn(1, layout.num_tokens, HEADS, SIZE).transpose(1, 2).requires_grad_() for _ in range(3)]
    mix = torch.randn(1, HEADS, layout.num_tokens, SIZE)
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(repeats + 1):
        for name, attend in WAYS.items():
            start = time.thread_time()
            torch.autograd.grad((attend(*inputs, attention) * mix).sum(), inputs)
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main() -> None:
    """Measure, print a table, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5, help="measured repetitions of each way")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results = {label: measure(layout_of(shapes), arguments.repeats) for label, shapes in SHAPES.items()}
    print(f"milliseconds, forward and backward, one thread, torch {torch.__version__}")
    print(f"{'':20}" + "".join(f"{name:>16}" for name in WAYS))
    for label, found in results.items():
        print(f"{label:20}" + "".join(f"{found[name]:16.1f}" for name in WAYS))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
