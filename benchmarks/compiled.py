"""The training step with `compile: true` beside the same without, one step in turn.

    python benchmarks/compiled.py [WORKLOAD …] [--steps 5] [--data FOLDER] [--processor-time]

The first step, in which everything is compiled, is not measured. The benchmark fails if losses disagree.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from common import ROOT, median_ratio, save, table
from lockstep import Worker, take_turns
from workloads import CACHE, DATA, WORKLOADS, Workload, prepare

HERE = Path(__file__).parent
CHOSEN = ("hh-64", "wmt_mqm-k9")
LOSS_TOLERANCE = 1e-4


def measure(workload: Workload, steps: int, data: Path, clock: str = "seconds") -> dict[str, Any]:
    """Times of both, and how far their losses are apart."""
    starts = {}
    for name, compiled in (("plain", False), ("compiled", True)):
        changes = {"device": "cpu", "compile": compiled}
        folder = prepare(workload, steps + 1, data, changes=changes, cache=CACHE / f"compile-{name}")
        command = [sys.executable, str(HERE / "work_plaudit.py"), str(folder), str(folder / "gradient.pt")]
        starts[name] = partial(Worker, name, command)
    workers = take_turns(starts, steps)
    losses = {name: worker.result["losses"] for name, worker in workers.items()}
    apart = max(abs(a - b) / abs(a) for a, b in zip(losses["plain"], losses["compiled"], strict=True))
    if apart > LOSS_TOLERANCE:
        raise RuntimeError(f"{workload.name}: losses differ by {apart:.1e}: {losses}")
    times = {n: worker.times if clock == "seconds" else worker.processor_times for n, worker in workers.items()}
    return {"workload": workload.name, "seconds": times, "clock": clock, "loss_difference": apart}


def rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per workload."""
    return [
        {
            "data and batch": each["workload"],
            "s/step": statistics.median(each["seconds"]["plain"]),
            "compiled, s/step": statistics.median(each["seconds"]["compiled"]),
            "times faster": median_ratio(each["seconds"]["plain"], each["seconds"]["compiled"]),
            "largest difference of a loss": each["loss_difference"],
        }
        for each in results
    ]


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=[], metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--steps", type=int, default=5, help="measured steps of each")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the preference data")
    parser.add_argument("--processor-time", action="store_true", help="by the processor's clock: for a busy machine")
    parser.add_argument("--save-as", default="compiled", help="start of names in results; empty: not saved")
    arguments = parser.parse_args()
    clock = "processor_seconds" if arguments.processor_time else "seconds"
    for name in arguments.workloads or CHOSEN:
        found = measure(WORKLOADS[name], arguments.steps, arguments.data, clock)
        print(table(rows([found])), flush=True)
        if arguments.save_as:
            command = f"python benchmarks/compiled.py {name} --steps {arguments.steps}"
            command += " --processor-time" * arguments.processor_time
            print(save(f"{arguments.save_as}-{name}", command, [found]).relative_to(ROOT))


if __name__ == "__main__":
    main()
