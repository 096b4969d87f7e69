"""How full packed rows are, and how evenly micro-batches are dealt over processes. Arithmetic alone: a second or two.

    python benchmarks/packing.py

Lengths are words times 4/3, which is near what subword tokenizers give; no tokenizer is loaded. Real data is read from
the folder `shared/data` beside the checkout where it is there.
"""

import gzip
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plaudit.data.batching import BatchSchedule, StepSchedule
from plaudit.demo.world import World

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BUDGET = 8192


def tokens(text: str) -> int:
    """About as many tokens as a subword tokenizer gives."""
    return len(text.split()) * 4 // 3 + 1


def shared(prompt: str, completions: Iterable[str]) -> tuple[int, int, int]:
    """Tokens of a packed group, of its longest text, and its completions."""
    lengths = [tokens(text) for text in completions]
    return tokens(prompt) + sum(lengths), tokens(prompt) + max(lengths), len(lengths)


def pairs(row: dict[str, Any]) -> tuple[str, list[str]]:
    """Prompt and answers of a transcript pair."""
    prompt, _, chosen = row["chosen"].rpartition("\n\nAssistant:")
    return prompt, [chosen, row["rejected"].rpartition("\n\nAssistant:")[2]]


def groups() -> dict[str, list[tuple[int, int, int]]]:
    """The built-in world, and what is beside the checkout."""
    found = {"built-in world, K = 4": [shared(str(c.prompt), c.completions) for c in World(0).comparisons(2000)]}
    sources = {
        "HH, K = 2": "hh_harmless_base/train.jsonl.gz",
        "fgrlhf_qa, K = 4": "fgrlhf_qa/train.jsonl.gz",
        "wmt_mqm, K = 4..9": "wmt_mqm/rankings_ende.jsonl.gz",
    }
    for name, place in sources.items():
        if not (DATA / place).is_file():
            continue
        with gzip.open(DATA / place, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        texts = [
            pairs(row) if "chosen" in row else (row["prompt"], [each["text"] for each in row["completions"]])
            for row in rows
        ]
        found[name] = [shared(prompt, completions) for prompt, completions in texts if prompt and all(completions)]
    return found


def unused(sizes: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of the budget that stays empty."""
    return 1 - sum(sizes) / (BUDGET * len(batches))


def imbalance(sizes: Sequence[int], world: int, prompts: int) -> float:
    """How much longer the busiest process works than the mean, over all steps."""
    options: dict[str, Any] = {"prompts_per_step": prompts, "token_budget": BUDGET, "world_size": world}
    ranks = [list(StepSchedule(sizes, **options, rank=rank).steps(0, len(sizes) // prompts)) for rank in range(world)]
    work = [[sum(sizes[i] for batch in step.micro_batches for i in batch) for step in steps] for steps in ranks]
    return sum(map(max, zip(*work, strict=True))) / (sum(map(sum, work)) / world) - 1


def main() -> None:
    """Print a table."""
    sys.stdout.write(
        "| data | budget unused, packed | the same in arrival order | padded rows: places beyond these | "
        "2 processes: busiest over mean | 8 processes |\n|---|---|---|---|---|---|\n"
    )
    for name, found in groups().items():
        sizes, widths, rows = (list(column) for column in zip(*found, strict=True))
        packed = unused(sizes, BatchSchedule(sizes, BUDGET).epoch(0))
        naive, room = 1, BUDGET
        for size in sizes:
            naive, room = (naive, room - size) if size <= room else (naive + 1, BUDGET - size)
        padded = BatchSchedule(widths, BUDGET, rows=rows).epoch(0)
        places = sum(sum(rows[i] for i in batch) * max(widths[i] for i in batch) for batch in padded)
        shares = [
            packed,
            1 - sum(sizes) / (BUDGET * naive),
            places / sum(sizes) - 1,
            imbalance(sizes, 2, 32),
            imbalance(sizes, 8, 64),
        ]
        sys.stdout.write(f"| {name} | " + " | ".join(f"{100 * share:.1f} %" for share in shares) + " |\n")


if __name__ == "__main__":
    main()
