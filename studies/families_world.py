"""Every family that `plaudit align` has on the built-in world: at equal answers and at equal compute.

    python studies/families_world.py run [--names ppo acer …] [--seeds 0 1 2 3 4]
    python studies/families_world.py table

`run` makes the runs of `alignment.py` that are named here, each in a process of its own with one thread, so that its
seconds and its memory are its own, and adds a line for each to `docs/studies/families-world.jsonl`; what is there is
not run again. Worlds are made once, in `runs/studies/families`. `table` writes the table and the plot of the section
"On the built-in world" of `docs/studies/families.md`.

The gap is `(best - earned) / (best - start)`: the best is what the best answer to a letter earns, whose sides are all
at their bounds, and which half of the demonstrations reach; the start is the fine-tuned model.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from alignment import ARMS, RATE, ROOT
from alignment_report import IMAGES, PAGES, fill, interval, label_of, shown

from plaudit.demo.world_gold import GOLD_WEIGHTS

OUTPUT = ROOT / "runs" / "studies" / "families"
RESULTS = PAGES / "families-world.jsonl"
START = "best-of-n"
"""Whose first point is the start, and whose last is best of 16."""
NAMES = [START, *(name for name, arm in ARMS.items() if arm.part in ("algorithms", "families"))]
BEST_GOLD = sum(weight for weight in GOLD_WEIGHTS.values() if weight > 0)
WINDOW = 4
"""Iterations of a run that make one point of its way."""
Row = Mapping[str, Any]


def kept(file: Path) -> list[dict[str, Any]]:
    """The results that there are."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def condensed(result: Row) -> dict[str, Any]:
    """What the table needs of a run of `alignment.py`; of best of n no seconds, since nothing is learned."""
    way = [{key: round(point[key], 3) for key in ("kl", "gold", "seconds") if key in point} for point in result["path"]]
    costs = {key: round(result[key], 1) for key in ("seconds", "wall", "memory") if key in result}
    end = {key: result["end"][key] for key in ("kl", "gold")}
    return {"name": result["name"], "seed": result["seed"], **end, **costs, "path": way}


def run(names: Sequence[str], seeds: Sequence[int]) -> None:
    """Make what is missing, seed by seed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = str(Path(__file__).with_name("alignment.py"))
    for seed in seeds:
        for name in names:
            if any((row["name"], row["seed"]) == (name, seed) for row in kept(RESULTS)):
                continue
            words = ["--output", str(OUTPUT), "run", name, "--seeds", str(seed)]
            subprocess.run([sys.executable, script, *words], check=True, env=environment)
            rate = 0.0 if name == START else RATE
            result = json.loads((OUTPUT / "results" / name / f"{seed}-{rate:g}.json").read_text())
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(condensed(result)) + "\n")


def gold_after(run: Row, seconds: float, start: float) -> float | None:
    """Gold reward after so much processor time, on straight lines through the windows of a run; None if it has no way.

    A window's point is the mean of its iterations in both; the end of the run is its own point.
    """
    way = [(point["seconds"], point["gold"]) for point in run["path"] if "seconds" in point]
    if len(way) < WINDOW:
        return None
    windows = [np.mean(way[first : first + WINDOW], 0) for first in range(0, len(way) - WINDOW + 1, WINDOW)]
    points = [(0.0, start), *map(tuple, windows), (run["seconds"], run["gold"])]
    return float(np.interp(seconds, *zip(*points, strict=True)))


def summaries(rows: Sequence[Row]) -> tuple[float, list[dict[str, Any]]]:
    """The seconds of equal compute, which are those of the cheapest run, and a row for each family.

    Raises:
        SystemExit: where best of n, whose first point is the start of a seed, is missing.
    """
    starts = {row["seed"]: row["path"][0]["gold"] for row in rows if row["name"] == START}
    missing = sorted({row["seed"] for row in rows} - set(starts))
    if missing or not starts:
        raise SystemExit(f"no {START} of the seeds {missing} in {RESULTS}: run it first. The page was not changed.")
    seconds = float(int(min(row["seconds"] for row in rows if row["name"] != START)))
    found = []
    for name in NAMES:
        own = [row for row in rows if row["name"] == name]
        if not own:
            continue
        summary: dict[str, Any] = {"name": name, "seeds": len(own)}
        summary["gain"] = interval([row["gold"] - starts[row["seed"]] for row in own])
        summary["gap"] = interval([100 * (BEST_GOLD - r["gold"]) / (BEST_GOLD - starts[r["seed"]]) for r in own])
        summary["kl"] = interval([row["kl"] for row in own])
        summary |= {
            key: statistics.median(row[key] for row in own) for key in ("seconds", "wall", "memory") if key in own[0]
        }
        after = [(row, gold_after(row, seconds, starts[row["seed"]])) for row in own]
        timed = [gold - starts[row["seed"]] for row, gold in after if gold is not None]
        summary["gain_at_equal_time"] = interval(timed) if timed else None
        found.append(summary)
    return seconds, found


def table(rows: Sequence[Row], seconds: float) -> str:
    """Every family at equal answers and at equal processor time, the largest gain first."""
    head = ["", "seeds", "gain in gold, equal answers", "gap", "KL", f"gain after {seconds:.0f} s"]
    head += ["processor seconds", "seconds", "MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in sorted(rows, key=lambda each: -each["gain"][0]):
        gap = f"{row['gap'][0]:.0f} % ± {row['gap'][1]:.0f}"
        cells = [label_of(row["name"]), str(row["seeds"]), shown(row["gain"]), gap, shown(row["kl"], "")]
        cells += [shown(row["gain_at_equal_time"])]
        cells += [f"{row[key]:.0f}" if key in row else "" for key in ("seconds", "wall", "memory")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_page() -> None:
    """The table into the page, between its marks, and the plot beside it."""
    seconds, rows = summaries(kept(RESULTS))
    text = table(rows, seconds)
    print(text)
    fill(PAGES / "families.md", "world", text)
    draw(rows, IMAGES / "families-world.png")


def draw(rows: Sequence[Row], path: Path) -> None:
    """Gains at equal answers and at equal processor time, with intervals, the largest on top."""
    figure, panel = plt.subplots(figsize=(7.5, 5), layout="constrained")
    ordered = sorted(rows, key=lambda each: each["gain"][0])
    for key, label, shift, marker in (
        ("gain", "equal answers", 0.12, "o"),
        ("gain_at_equal_time", "equal processor time", -0.12, "s"),
    ):
        points = [(place + shift, *row[key]) for place, row in enumerate(ordered) if row[key] is not None]
        if not points:
            continue
        places, means, halves = (np.array(column) for column in zip(*points, strict=True))
        panel.errorbar(means, places, xerr=np.nan_to_num(halves), fmt=marker, markersize=4, capsize=2, label=label)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(ordered)), [label_of(row["name"]) for row in ordered], fontsize=8)
    panel.set_xlabel("gain in gold reward, mean over seeds and 95 % interval")
    panel.grid(alpha=0.25, axis="x")
    panel.legend(fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--names", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    if arguments.action == "table":
        write_page()
    else:
        run(arguments.names, arguments.seeds)


if __name__ == "__main__":
    main()
