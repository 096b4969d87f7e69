"""Any algorithm of `plaudit gym` over several seeds: the returns of each, with a bootstrap interval over the seeds.

python studies/gym_seeds.py run --algorithm option_critic --total 100000 --seeds 0 1 2 3 4 5 6 7 8 9
python studies/gym_seeds.py run --algorithm dqn --total 50000 --set schedule=linear --results dqn-rate.jsonl
python studies/gym_seeds.py table

`run` adds to `docs/studies/gym-seeds.jsonl`, or to another file; a seed that is there is not run again. `--set` gives
options that are not the algorithm's defaults.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from control_peer import bootstrap_interval, interquartile_mean

from plaudit.configs.gym import GymConfig
from plaudit.training.gym import GymResult, main
from plaudit.training.trackers import read_metrics

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "studies" / "gym-seeds.jsonl"
KEY = ("algorithm", "env", "total", "seed")


def run(algorithm: str, env: str, total: int, seed: int, options: dict[str, str] | None = None) -> dict[str, Any]:
    """One run with the defaults of the algorithm but for `options`, as a row of the results."""
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        result = main(
            GymConfig.model_validate(
                {
                    "algorithm": {"name": algorithm} | (options or {}),
                    "env": env,
                    "total_steps": total,
                    "seed": seed,
                    "episodes": 100,
                    "evaluate_every": total,
                    "save_every": total,
                    "output": folder,
                    "quiet": True,
                }
            )
        )
        assert isinstance(result, GymResult)
        last = [line for line in read_metrics(Path(folder) / "metrics.jsonl") if "options/duration" in line][-1:]
    return {
        "algorithm": named(algorithm, options or {}),
        "env": env,
        "total": total,
        "seed": seed,
        "mean": result.metrics["return"],
        "deviation": round(result.metrics["return_deviation"], 1),
        "cpu_seconds": round(time.process_time() - begun),
        "cores": os.cpu_count(),
        **{name: value for line in last for name, value in line.items() if name.startswith("options/")},
    }


def named(algorithm: str, options: dict[str, str]) -> str:
    """The algorithm with its options, as it stands in the results."""
    return ", ".join([algorithm, *(f"{key}={value}" for key, value in options.items())])


def rows(results: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(results: Path) -> str:
    """The results as a Markdown table."""
    lines = [
        "| algorithm | environment | steps | mean return of each seed | interquartile mean | 95 % interval | CPU s |",
        "|---|---|---|---|---|---|---|",
    ]
    found = rows(results)
    for case in sorted({tuple(row[name] for name in KEY[:-1]) for row in found}):
        chosen = [row for row in found if tuple(row[name] for name in KEY[:-1]) == case]
        means = [row["mean"] for row in sorted(chosen, key=lambda row: row["seed"])]
        low, high = bootstrap_interval(means)
        each = ", ".join(f"{mean:.1f}" for mean in means)
        used = sum(row["cpu_seconds"] for row in chosen) / len(chosen)
        lines.append(
            f"| {case[0]} | {case[1]} | {case[2]:,} | {each} | {float(interquartile_mean(means)):.1f} | "
            f"{low:.1f} to {high:.1f} | {used:.0f} |"
        )
    return "\n".join(lines)


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("run", "table"))
    parser.add_argument("--algorithm", default="option_critic")
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--total", type=int, default=100_000, help="environment steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], help="options of the algorithm, such as schedule=linear")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where rows are kept")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = arguments_of()
    if chosen.task == "table":
        print(table(chosen.results))
    else:
        for number in chosen.seeds:
            options = dict(each.split("=", 1) for each in chosen.set)
            wanted = (named(chosen.algorithm, options), chosen.env, chosen.total, number)
            if any(tuple(row[name] for name in KEY) == wanted for row in rows(chosen.results)):
                continue
            line = run(chosen.algorithm, chosen.env, chosen.total, number, options)
            with chosen.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
