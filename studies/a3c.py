"""CartPole-v1 by A3C: what workers without locks reach, how stale their gradients are, and how long it takes.

python studies/a3c.py run --workers 2 --seeds 0 1 2 3 4
python studies/a3c.py table

`run` adds to `docs/studies/a3c.jsonl`; what is there is not run again. Runs with more than one worker cannot be
repeated to the bit: which of two processes writes first is up to the machine.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from control_peer import bootstrap_interval, interquartile_mean

from plaudit.configs.gym import GymConfig
from plaudit.training.gym import GymResult, main
from plaudit.training.trackers import read_metrics

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "studies" / "a3c.jsonl"
EPISODES = 100
OPTIONS = ("workers", "rollout_steps", "discount", "gae_lambda", "learning_rate", "schedule")
KEY = (*OPTIONS, "total", "seed")


def processor_seconds() -> float:
    """Of this process and of those that it has waited for."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run(options: dict[str, Any], total: int, seed: int) -> dict[str, Any]:
    """One run of `plaudit gym`, as a row of the results; `options` are the algorithm's."""
    load, used = os.getloadavg()[0], processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        config = GymConfig.model_validate(
            {
                "algorithm": {"name": "a3c", **options},
                "env": "CartPole-v1",
                "total_steps": total,
                "seed": seed,
                "episodes": EPISODES,
                "evaluate_every": total,
                "save_every": total,
                "output": folder,
                "quiet": True,
            }
        )
        begun = time.perf_counter()
        result = main(config)
        seconds = time.perf_counter() - begun
        assert isinstance(result, GymResult)
        lines = [line for line in read_metrics(Path(folder) / "metrics.jsonl") if "workers/staleness" in line]
    staleness = [line["workers/staleness"] for line in lines]
    return {
        **options,
        "total": total,
        "seed": seed,
        "mean": result.metrics["return"],
        "deviation": round(result.metrics["return_deviation"], 1),
        "staleness": round(sum(staleness) / len(staleness), 2),
        "staleness_max": max(line["workers/staleness_max"] for line in lines),
        "seconds": round(seconds),
        "cpu_seconds": round(processor_seconds() - used),
        "load": round(load, 1),
        "cores": os.cpu_count(),
    }


def rows(results: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(results: Path) -> str:
    """The results as a Markdown table, a line for each number of workers, schedule and length."""
    lines = [
        "| workers | t_max | γ | λ | rate | falling | steps | mean return of each seed | interquartile mean "
        "| 95 % interval | mean (most) staleness | seconds a run | CPU seconds |",
        f"|{'---|' * 13}",
    ]
    found = rows(results)
    for case in sorted({tuple(row[name] for name in KEY[:-1]) for row in found}):
        chosen = [row for row in found if tuple(row[name] for name in KEY[:-1]) == case]
        chosen.sort(key=lambda row: row["seed"])
        means = [row["mean"] for row in chosen]
        interval = "{:.1f} to {:.1f}".format(*bootstrap_interval(means)) if len(means) > 2 else "too few seeds"
        each = ", ".join(f"{mean:.1f}" for mean in means)
        staleness = sum(row["staleness"] for row in chosen) / len(chosen)
        most = max(row["staleness_max"] for row in chosen)
        seconds, used = (sum(row[name] for row in chosen) / len(chosen) for name in ("seconds", "cpu_seconds"))
        middle, first = float(interquartile_mean(means)), " | ".join(map(str, case[:-1]))
        lines.append(
            f"| {first} | {case[-1]:,} | {each} | {middle:.1f} | {interval} | "
            f"{staleness:.2f} ({most:.0f}) | {seconds:.0f} | {used:.0f} |"
        )
    return "\n".join(lines)


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("run", "table"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rollout-steps", type=int, default=32, help="between two updates of a worker")
    parser.add_argument("--discount", type=float, default=0.98)
    parser.add_argument("--gae-lambda", type=float, default=0.8)
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    parser.add_argument("--schedule", choices=("constant", "linear"), default="linear")
    parser.add_argument("--total", type=int, default=100_000, help="environment steps of all workers together")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are kept")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = arguments_of()
    if chosen.task == "table":
        print(table(chosen.results))
    else:
        for number in chosen.seeds:
            options = {name: getattr(chosen, name) for name in OPTIONS}
            wanted = (*options.values(), chosen.total, number)
            if any(tuple(row[name] for name in KEY) == wanted for row in rows(chosen.results)):
                continue
            line = run(options, chosen.total, number)
            with chosen.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
