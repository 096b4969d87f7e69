"""What another busy process does to a training step on the CPU, with each way that OpenMP threads may wait.

    python benchmarks/threads.py --competitors 1

Each variant is a process of its own (the settings are read when torch is loaded), all in turn; medians over rounds.
`--competitors 0` measures beside whatever else the machine has to do, and says how much that was.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from common import median_ratio, save, table

VARIANTS: dict[str, dict[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "all threads, as torch comes": {},
    "all threads, OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "all threads, as the command line sets it": {"GOMP_SPINCOUNT": "1000", "KMP_BLOCKTIME": "0"},
}
CLEARED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
CHILD = """
import json, sys, time, torch
layer = torch.nn.TransformerEncoderLayer(256, 8, 688, dropout=0.0, batch_first=True)
model = torch.nn.Sequential(*[torch.nn.TransformerEncoder(layer, 6)])
batch = torch.randn(8, 128, 256)
steps, end = -2, None
while end is None or time.perf_counter() < end:
    if steps == 0:
        started, cpu = time.perf_counter(), time.process_time()
        end = started + float(sys.argv[1])
    model(batch).square().mean().backward()
    steps += 1
print(json.dumps([(time.perf_counter() - started) / steps, (time.process_time() - cpu) / steps]))
"""
BUSY = "while True: pass"


def measure(variant: dict[str, str], seconds: float) -> tuple[float, float]:
    """Seconds and processor seconds of a step in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in CLEARED} | variant
    command = [sys.executable, "-c", CHILD, str(seconds)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    wall, cpu = json.loads(done.stdout)
    return wall, cpu


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per variant and number of competitors."""
    plain = "all threads, as torch comes"
    return [
        {
            "busy processes beside it": str(each["competitors"]),
            "threads": name,
            "ms a step": 1e3 * statistics.median(wall for wall, _ in times),
            "processor ms a step": 1e3 * statistics.median(cpu for _, cpu in times),
            "times faster than torch comes": median_ratio(
                [wall for wall, _ in each["steps"][plain]], [wall for wall, _ in times]
            ),
        }
        for each in results
        for name, times in each["steps"].items()
    ]


def main() -> None:
    """Measure all variants in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--competitors", type=int, default=1, help="busy processes beside the measured one")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save-as", default="threads", help="start of names in benchmarks/results; empty: not saved")
    chosen = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(chosen.competitors)]
    try:
        time.sleep(1.0)
        for _ in range(chosen.rounds):
            for name, variant in VARIANTS.items():
                found[name].append(measure(variant, chosen.seconds))
    finally:
        for process in busy:
            process.kill()
            process.wait()
    results = [{"competitors": chosen.competitors, "steps": found}]
    print(table(rows(results)))
    if chosen.save_as:
        command = f"python benchmarks/threads.py --competitors {chosen.competitors}"
        command += f" --seconds {chosen.seconds:g} --rounds {chosen.rounds}"
        save(f"{chosen.save_as}-{chosen.competitors}", command, results)


if __name__ == "__main__":
    main()
