"""Tables, plots and JSON of the study of alignment, from the runs that it left."""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from alignment import ARMS, EQUAL_KL, ITERATIONS, PROMPTS, RATE, REWARD_MODELS, ROOT, SAMPLES
from scipy.stats import spearmanr, t

PAGES = ROOT / "docs" / "studies"
IMAGES = ROOT / "docs" / "images" / "studies"
WINDOW = 4
"""Iterations of a run that make one point of its path."""
Runs = dict[str, dict[int, dict[str, Any]]]
"""By name and seed, at the study's own learning rate."""


def load(output: Path, rate: float = RATE) -> Runs:
    """Every run that was made at this learning rate."""
    found: Runs = defaultdict(dict)
    for file in sorted((output / "results").glob("*/*.json")):
        one = json.loads(file.read_text())
        if one["rate"] in (rate, 0.0):
            found[one["name"]][one["seed"]] = one
    return dict(found)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95 % interval by Student's t; nan for a single seed."""
    if len(values) < 2:
        return statistics.fmean(values), float("nan")
    spread = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), spread


def path_of(run: Mapping[str, Any]) -> list[tuple[float, float]]:
    """`(KL, gold)` along a run: windows of its iterations, and its end; the points of best of n as they are."""
    points = [(point["kl"], point["gold"]) for point in run["path"]]
    if "n" in run["path"][0]:
        return points
    windows = [points[start : start + WINDOW] for start in range(0, len(points) - WINDOW + 1, WINDOW)]
    means = [tuple(float(np.mean(column)) for column in zip(*window, strict=True)) for window in windows]
    return [*means, (run["end"]["kl"], run["end"]["gold"])]  # type: ignore[list-item]


def gold_at(run: Mapping[str, Any], kl: float, start: float) -> float | None:
    """Gold reward where a run's way first comes this far, on straight lines from the start; None if it never does."""
    before = (0.0, start)
    for point in path_of(run):
        if point[0] >= kl:
            share = (kl - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point if point[0] > before[0] else before
    return None


def row_of(name: str, runs: Runs) -> dict[str, Any]:
    """What the table says of an arm, gold as the gain over the start of the same seed."""
    starts = {seed: one["path"][0]["gold"] for seed, one in runs["best-of-n"].items()}
    own = {seed: one for seed, one in runs[name].items() if seed in starts}
    measured = "accuracy" in next(iter(own.values()))
    at = [g - starts[s] for s, one in own.items() if (g := gold_at(one, EQUAL_KL, starts[s])) is not None]
    return {
        "name": name,
        "seeds": sorted(own),
        "gain": interval([one["end"]["gold"] - starts[seed] for seed, one in own.items()]),
        "kl": interval([one["end"]["kl"] for one in own.values()]),
        "gain_at_equal_kl": interval(at) if at else None,
        "seeds_that_come_so_far": len(at),
        "accuracy": interval([one["accuracy"] for one in own.values()]) if measured else None,
        "seconds": statistics.fmean([one.get("seconds", 0.0) for one in own.values()]),
    }


def label_of(name: str) -> str:
    if name == "best-of-n":
        return "best of 16 (no training)"
    return ARMS[name].label


def markdown(rows: Sequence[Mapping[str, Any]], *, accuracy: bool) -> str:
    """The rows as a table."""
    head = ["", "seeds", *(["held-out accuracy"] if accuracy else []), "gain in gold at the end", "KL at the end"]
    head += [f"gain at KL {EQUAL_KL:g}", "runs that come so far", "processor seconds a run"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def shown(pair: tuple[float, float] | None, sign: str = "+") -> str:
        if pair is None:
            return ""
        return f"{pair[0]:{sign}.2f}" + ("" if math.isnan(pair[1]) else f" ± {pair[1]:.2f}")

    for row in rows:
        cells = [label_of(row["name"]), str(len(row["seeds"]))]
        if accuracy:
            mean, half = row["accuracy"]
            cells.append(f"{100 * mean:.1f} % ± {100 * half:.1f}")
        cells += [shown(row["gain"]), shown(row["kl"], ""), shown(row["gain_at_equal_kl"])]
        lines.append("| " + " | ".join([*cells, str(row["seeds_that_come_so_far"]), f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def frontier(runs: Runs, names: Sequence[str], path: Path) -> None:
    """Gain in gold over the divergence, a line per arm: the mean over seeds of every point of the way."""
    figure, panel = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    starts = {seed: one["path"][0]["gold"] for seed, one in runs["best-of-n"].items()}
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for number, name in enumerate(["best-of-n", *names]):
        ways = [[(kl, gold - starts[s]) for kl, gold in path_of(one)] for s, one in runs[name].items() if s in starts]
        if name != "best-of-n":
            ways = [[(0.0, 0.0), *way] for way in ways]
        points = np.mean([way[: min(map(len, ways))] for way in ways], axis=0)
        style = "k--" if name == "best-of-n" else "o-"
        colour = {} if name == "best-of-n" else {"color": colours[(number - 1) % len(colours)]}
        panel.plot(points[:, 0], points[:, 1], style, markersize=3, linewidth=1.4, label=label_of(name), **colour)
        panel.plot(*points[-1], marker="s", markersize=5, color=colour.get("color", "k"))
    panel.set(xlabel="KL from the start, nats per answer", ylabel="gain in gold reward")
    panel.set_xlim(left=0)
    panel.grid(alpha=0.25)
    panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def foretold(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Spearman's ρ over reward models between mean accuracy and mean gain, at the end and at equal KL."""
    found = {}
    for key in ("gain", "gain_at_equal_kl"):
        kept = [row for row in rows if row[key] is not None]
        if len(kept) > 2:
            result = spearmanr([row["accuracy"][0] for row in kept], [row[key][0] for row in kept])
            found[key] = float(result.statistic)
    return found


def write_report(output: Path, say: Callable[[str], object] = print) -> None:
    """Print the tables, draw the plots and write `docs/studies/alignment.json`."""
    runs = load(output)
    answers = ITERATIONS * PROMPTS * SAMPLES
    described: dict[str, Any] = {
        "command": "python studies/alignment.py table",
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "answers": answers,
        "learning_rate": RATE,
    }
    parts = {
        "algorithms": [name for name in ARMS if ARMS[name].part == "algorithms"],
        "ablations": ["ppo", "ppo-loo", *(name for name in ARMS if ARMS[name].part == "ablations")],
        "reward-models": ["ppo-loo", *(name for name in ARMS if ARMS[name].part == "reward-models")],
    }
    for part, names in parts.items():
        present = [name for name in names if name in runs]
        if part != "algorithms" and len(present) < 3:
            continue
        rows = [row_of(name, runs) for name in (["best-of-n"] if part == "algorithms" else []) + present]
        say(f"\n### {part}, {answers} answers a run\n\n{markdown(rows, accuracy=part == 'reward-models')}")
        described[part] = rows
        frontier(runs, present, IMAGES / f"alignment-{part}.png")
        if part == "reward-models":
            described["accuracy_foretells"] = foretold(rows)
            say(f"\nSpearman's ρ between accuracy and gain over {len(rows)} reward models: {foretold(rows)}")
            say(f"the first row's reward model: {REWARD_MODELS['pairs'][0]}")
    (PAGES / "alignment.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
