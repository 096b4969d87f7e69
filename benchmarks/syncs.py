"""How often a training step of a reward model waits for the GPU: every wait that torch sees, by the line that asks.

    python benchmarks/syncs.py [--steps 4] [--data FOLDER]

Plaudit's own loop on `hh-64` with the decoder of 100 million weights in bf16, torch's `set_sync_debug_mode("warn")` on
from the third step to the last. Waits of the step's end (the loss that is logged) are listed as all others are.
"""

import argparse
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import ROOT, save, table
from torch.optim.optimizer import register_optimizer_step_post_hook
from work_plaudit import open_run
from workloads import CACHE, DATA, LLAMA_100M, WORKLOADS, prepare

from plaudit.training.reward import run_steps

WARM_UP = 2
MARK = "synchronizing CUDA operation"


def measure(steps: int, data: Path) -> dict[str, Any]:
    """Waits per step by file and line."""
    changes = {"device": "cuda", "precision": "bf16"}
    folder = prepare(
        WORKLOADS["hh-64"], steps + WARM_UP, data, sizes=LLAMA_100M, changes=changes, cache=CACHE / "syncs"
    )
    trainer, session = open_run(folder)
    counts: Counter[str] = Counter()
    done = 0

    def behind_step(*_: object) -> None:
        nonlocal done
        done += 1
        # Off behind the last step: what follows (the last checkpoint) belongs to no step.
        torch.cuda.set_sync_debug_mode("warn" if WARM_UP <= done < steps + WARM_UP else "default")

    handle = register_optimizer_step_post_hook(behind_step)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_steps(trainer, session)
    handle.remove()
    for each in caught:
        if MARK in str(each.message):
            path = Path(each.filename)
            inside = "plaudit" in path.parts
            counts[f"{'/'.join(path.parts[-3:] if inside else path.parts[-2:])}:{each.lineno}"] += 1
    return {"steps": steps, "waits": dict(counts.most_common())}


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per line of code that waits."""
    return [
        {"line": line, "waits per step": count / each["steps"]}
        for each in results
        for line, count in (each["waits"] or {"none": 0}).items()
    ]


def main() -> None:
    """Count, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4, help="watched steps")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the preference data")
    parser.add_argument("--save-as", default="syncs", help="name under benchmarks/results; empty: not saved")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device is visible: the rows for GPUs stay as they are")
        return
    results = [measure(arguments.steps, arguments.data)]
    print(table(rows(results)))
    if arguments.save_as:
        command = f"python benchmarks/syncs.py --steps {arguments.steps}"
        print(save(arguments.save_as, command, results).relative_to(ROOT))


if __name__ == "__main__":
    main()
