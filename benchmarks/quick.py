"""A guard against getting slower: a few ratios in less than three minutes, beside those recorded last.

    python benchmarks/quick.py [--record] [--data FOLDER]

Everything runs on one thread and is timed by the processor's clock, so that other work on the machine hardly matters;
the steps are half as large as those of the other tables, whose ratios are therefore others. Ends with an error when a
ratio fell by more than a quarter.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import process_time

# Before torch is loaded, which reads it once.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import scoring
from against_trl import measure
from common import ROOT, load, median_ratio, save, table
from workloads import CACHE, DATA, WORKLOADS

ALLOWED_FALL = 0.25
STEPS = 3
COMPARISONS = (
    (replace(WORKLOADS["hh-8"], name="hh-4", prompts=4, pairs=4, peer_pairs=4), "trl"),
    (replace(WORKLOADS["wmt_mqm-k9"], name="wmt_mqm-k9 (4)", prompts=4, pairs=108), "loop"),
)
SCORED_PROMPTS = 12


def ratios(data: Path) -> dict[str, float]:
    """How many times faster Plaudit is than each peer, by name of the comparison."""
    found: dict[str, float] = {}
    for workload, peer in COMPARISONS:
        measured = measure(
            workload, STEPS, data, names=(peer, "plaudit"), clock="processor_seconds", cache=CACHE / "quick"
        )
        seconds = measured["processor_seconds"]
        found[f"{workload.name}, {peer}"] = median_ratio(seconds[peer], seconds["plaudit"])
    seconds = scoring.measure(
        "wmt_mqm", STEPS, data, clock=process_time, ways=("sorted loop", "plaudit"), prompts=SCORED_PROMPTS
    )["seconds"]
    found["scoring wmt_mqm, sorted loop"] = median_ratio(seconds["sorted loop"], seconds["plaudit"])
    return found


def compare(now: dict[str, float], recorded: dict[str, float]) -> tuple[list[dict[str, object]], list[str]]:
    """A table of ratios now and then, and the names of those that fell too far."""
    rows: list[dict[str, object]] = [
        {
            "times faster than": name,
            "now": value,
            "recorded": recorded.get(name, "–"),
            "change": f"{value / recorded[name] - 1:+.0%}" if name in recorded else "new",
        }
        for name, value in now.items()
    ]
    return rows, [name for name, value in now.items() if value < (1 - ALLOWED_FALL) * recorded.get(name, 0.0)]


def rows(results: Sequence[tuple[str, float]]) -> list[dict[str, object]]:
    """The recorded ratios, one row each."""
    return [{"times faster than": name, "ratio": ratio} for name, ratio in results]


def main() -> None:
    """Measure, compare, and record where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="keep these ratios as those to compare with")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the preference data")
    arguments = parser.parse_args()
    now = ratios(arguments.data)
    recorded = load("quick")
    compared, fallen = compare(now, dict(recorded["results"]) if recorded else {})
    print(table(compared))
    if arguments.record:
        print(save("quick", "python benchmarks/quick.py --record", list(now.items())).relative_to(ROOT))
    elif fallen:
        sys.exit(f"slower than recorded by more than {ALLOWED_FALL:.0%}: {', '.join(fallen)}")


if __name__ == "__main__":
    main()
