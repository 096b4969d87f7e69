"""Packed attention on a GPU, every backend: how far from float64, and how fast, forward and backward of one layer.

    python benchmarks/attention_gpu.py [--repeats 20] [--save-as attention_gpu]

14 heads of 64 over 2 heads of keys, as in the decoder of half a billion parameters of `benchmarks/gpu.py`. The first
call of a backend (`flex` compiles there) is timed by itself. The reference is one mask over the whole row in float64.
"""

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch
from attention import layout_of
from common import save, table
from torch import Tensor

from plaudit.core.layout import PackedLayout
from plaudit.models.attention_backends import BACKENDS, missing_part, unsupported
from plaudit.models.attention_layout import AttentionOptions, PackedAttention

HEADS, GROUPS, SIZE = 14, 2, 64
SHAPES: dict[str, list[tuple[int, list[int]]]] = {
    "K = 2, prompt 145": [(145, [70, 60])] * 24,
    "K = 4, prompt 860": [(860, [126, 110, 140, 128])] * 5,
    "K = 9, prompt 60": [(60, [60, 58, 62, 60, 55, 65, 60, 61, 59])] * 10,
}
TYPES = {"bf16": torch.bfloat16, "float32": torch.float32}
WAYS = ("varlen", "flex", "blocks", "reference")


def inputs_of(layout: PackedLayout, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values `[1, heads, N, d]` that want gradients, and the factors of the sum that is derived."""
    generator = torch.Generator().manual_seed(0)
    tokens = layout.num_tokens
    sizes = [(1, tokens, heads, SIZE) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    made = [torch.randn(size, generator=generator).transpose(1, 2) for size in sizes]
    *base, mix = (tensor.to(device, dtype) for tensor in made)
    return [tensor.detach().requires_grad_() for tensor in base], mix


def once(name: str, layout: PackedLayout, window: int | None, base: list[Tensor], mix: Tensor) -> list[Tensor]:
    """Output and gradients by one backend."""
    options = AttentionOptions(scaling=SIZE**-0.5, window=window)
    out = BACKENDS[name](base[0], base[1], base[2], PackedAttention(layout), options)
    return [out, *torch.autograd.grad((out * mix).sum(), base)]


def measure(label: str, kind: str, window: int | None, device: torch.device, repeats: int) -> list[dict[str, Any]]:
    """One row per backend that can do it; one that fails says why."""
    layout = layout_of(SHAPES[label]).to(device)
    base, mix = inputs_of(layout, TYPES[kind], device)
    exact = [tensor.detach().double().requires_grad_() for tensor in base]
    wanted = once("reference", layout, window, exact, mix.double())
    rows = []
    for name in WAYS:
        options = AttentionOptions(scaling=SIZE**-0.5, window=window)
        why = missing_part(name, device) or unsupported(name, base[0], base[1], base[2], options)
        row: dict[str, Any] = {"row": label, "type": kind, "window": window or "–", "backend": name}
        row |= {"tokens": layout.num_tokens, "first call s": "–", "ms": "–", "error": "–", "note": why or ""}
        if why is None:
            try:
                row |= timed(partial(once, name, layout, window, base, mix), wanted, repeats)
            except Exception as error:  # a row says what a kernel cannot do; the others go on
                row["note"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        rows.append(row)
    return rows


def timed(run: Any, wanted: list[Tensor], repeats: int) -> dict[str, Any]:
    """Seconds of the first call, median milliseconds of later ones, the largest relative distance from `wanted`."""
    started = time.perf_counter()
    found = run()
    synchronise()
    first = time.perf_counter() - started
    error = max(
        float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in zip(found, wanted, strict=True)
    )
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        synchronise()
        times.append(1e3 * (time.perf_counter() - started))
    return {"first call s": first, "ms": statistics.median(times), "error": error}


def synchronise() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of the page: what was measured, as it is."""
    return results


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="where; the CPU only to try the script")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each backend behind the first")
    parser.add_argument("--save-as", default="attention_gpu", help="name under benchmarks/results; empty: not saved")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device is visible: the rows for GPUs stay as they are")
        return
    device = torch.device(arguments.device)
    results: list[dict[str, Any]] = []
    cases = [(label, kind, None) for label in SHAPES for kind in TYPES] + [("K = 4, prompt 860", "bf16", 256)]
    for case in cases:
        found = measure(*case, device=device, repeats=arguments.repeats)
        print(table(found), flush=True)
        results += found
        if arguments.save_as:
            save(arguments.save_as, f"python benchmarks/attention_gpu.py --repeats {arguments.repeats}", results)
    if arguments.save_as:
        print(f"benchmarks/results/{arguments.save_as}.json")


if __name__ == "__main__":
    main()
