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
BESIDE = "ppo-loo"
"""The run that every other one of the same seed is compared with."""
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
    beside = runs.get(BESIDE, {})
    paired = [one["end"]["gold"] - beside[seed]["end"]["gold"] for seed, one in own.items() if seed in beside]
    return {
        "name": name,
        "seeds": sorted(own),
        "gain": interval([one["end"]["gold"] - starts[seed] for seed, one in own.items()]),
        "beside": interval(paired) if len(paired) > 1 and name != BESIDE else None,
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


def shown(pair: tuple[float, float] | None, sign: str = "+") -> str:
    """A mean with half its interval; nothing where there is none."""
    if pair is None:
        return ""
    return f"{pair[0]:{sign}.2f}" + ("" if math.isnan(pair[1]) else f" ± {pair[1]:.2f}")


def fill(page: Path, name: str, table: str) -> None:
    """Put a table between its marks on a page; a page without them stays as it is."""
    mark, end = f"<!-- table: {name} -->", "<!-- end of table -->"
    if page.exists() and mark in (text := page.read_text(encoding="utf-8")):
        before, _, rest = text.partition(mark)
        page.write_text(f"{before}{mark}\n\n{table}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def markdown(rows: Sequence[Mapping[str, Any]], *, accuracy: bool) -> str:
    """The rows as a table."""
    head = ["", "seeds", *(["held-out accuracy"] if accuracy else []), "gain in gold at the end", "KL at the end"]
    head += [
        f"beside {label_of(BESIDE)}",
        f"gain at KL {EQUAL_KL:g}",
        "runs that come so far",
        "processor seconds a run",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        first = accuracy and row["name"] == BESIDE
        cells = [REWARD_MODELS["pairs"][0] if first else label_of(row["name"]), str(len(row["seeds"]))]
        if accuracy:
            mean, half = row["accuracy"]
            cells.append(f"{100 * mean:.1f} % ± {100 * half:.1f}")
        cells += [shown(row["gain"]), shown(row["kl"], ""), shown(row["beside"]), shown(row["gain_at_equal_kl"])]
        lines.append("| " + " | ".join([*cells, str(row["seeds_that_come_so_far"]), f"{row['seconds']:.0f}"]) + " |")
    return "\n".join(lines)


def frontier(runs: Runs, names: Sequence[str], path: Path, labels: Mapping[str, str] | None = None) -> None:
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
        label = (labels or {}).get(name, label_of(name))
        colour = {} if name == "best-of-n" else {"color": colours[(number - 1) % len(colours)]}
        panel.plot(points[:, 0], points[:, 1], style, markersize=3, linewidth=1.4, label=label, **colour)
        panel.plot(*points[-1], marker="s", markersize=5, color=colour.get("color", "k"))
    panel.set(xlabel="KL from the start, nats per answer", ylabel="gain in gold reward")
    panel.set_xlim(left=0)
    panel.grid(alpha=0.25)
    panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def foretold(rows: Sequence[Mapping[str, Any]], runs: Runs) -> dict[str, dict[str, float]]:
    """Spearman's ρ between the held-out accuracy of a reward model and what a policy gains under it.

    Returns:
        `ρ`, `p` and `n`: over reward models (means over seeds) at the end and at equal KL; and over single runs, both
        sides counted from the mean of their seed. `p` takes runs for independent, which one seed's are not.
    """
    starts = {seed: one["path"][0]["gold"] for seed, one in runs["best-of-n"].items()}
    pairs: dict[str, list[tuple[float, float]]] = {
        "gain": [(row["accuracy"][0], row["gain"][0]) for row in rows],
        "gain_at_equal_kl": [
            (row["accuracy"][0], row["gain_at_equal_kl"][0]) for row in rows if row["gain_at_equal_kl"] is not None
        ],
        "gain_of_single_runs": [],
        "gain_of_single_runs_at_equal_kl": [],
    }
    names = [row["name"] for row in rows]
    for seed in sorted({seed for name in names for seed in runs[name]}):
        own = [runs[name][seed] for name in names if seed in runs[name]]
        at_end = [(one["accuracy"], one["end"]["gold"]) for one in own]
        at = [(one["accuracy"], g) for one in own if (g := gold_at(one, EQUAL_KL, starts[seed])) is not None]
        for key, both in (("gain_of_single_runs", at_end), ("gain_of_single_runs_at_equal_kl", at)):
            if len(both) > 1:
                pairs[key] += list(map(tuple, np.array(both) - np.mean(both, 0)))
    found = {}
    for key, kept in pairs.items():
        if len(kept) > 2:
            result = spearmanr(*zip(*kept, strict=True))
            found[key] = {"rho": float(result.statistic), "p": float(result.pvalue), "n": len(kept)}
    return found


def machine(output: Path) -> dict[str, str]:
    """Where the runs were made: `machine.json` beside them, where they were brought here, or this machine."""
    if (known := output / "machine.json").exists():
        return dict(json.loads(known.read_text()))
    return {"python": sys.version.split()[0], "torch": torch.__version__}


def critics(runs: Runs) -> dict[str, dict[str, list[float]]]:
    """Of the arms with a critic, by iteration and as means over seeds: value, return, explained variance, length."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in ("ppo", *(name for name, arm in ARMS.items() if arm.part == "critic")):
        ways = [one["path"] for one in runs.get(name, {}).values() if "value" in one["path"][0]]
        for key in ("value", "return", "explained", "length"):
            if ways:
                table = [[point[key] for point in way] for way in ways]
                found.setdefault(name, {})[key] = [round(float(mean), 3) for mean in np.mean(table, 0)]
    return found


def draw_critics(found: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """What the critic says beside what comes, and how long answers grow, by iteration."""
    figure, (values, lengths) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for number, (name, table) in enumerate(found.items()):
        steps = range(1, len(table["value"]) + 1)
        values.plot(steps, table["value"], color=colours[number], label=label_of(name))
        lengths.plot(steps, table["length"], color=colours[number])
    if found:
        values.plot(steps, next(iter(found.values()))["return"], "k:", label="mean return, first row")
        values.legend(fontsize=7)
    values.set(xlabel="iteration", ylabel="mean value")
    lengths.set(xlabel="iteration", ylabel="tokens an answer")
    for panel in (values, lengths):
        panel.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def shared_seeds(runs: Runs, names: Sequence[str]) -> Runs:
    """The runs of the seeds that any arm beside the first has: means of a table are then over the same worlds."""
    seeds = {seed for name in names[1:] for seed in runs[name]}
    return {name: {seed: one for seed, one in own.items() if seed in seeds} for name, own in runs.items()}


def draw_foretold(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A point per reward model: how well it orders held-out rankings, and what a policy gains under it at equal KL."""
    figure, panel = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    for row in rows:
        if row["gain_at_equal_kl"] is None:
            continue
        place = (100 * row["accuracy"][0], row["gain_at_equal_kl"][0])
        panel.plot(*place, "o", color="tab:blue", markersize=5)
        name = "all pairs, last token" if row["name"] == BESIDE else label_of(row["name"])
        panel.annotate(name, place, fontsize=7, xytext=(4, 3), textcoords="offset points")
    panel.set(xlabel="held-out accuracy, %", ylabel=f"gain in gold reward at KL {EQUAL_KL:g}")
    panel.margins(x=0.3)
    panel.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_second(output: Path, say: Callable[[str], object] = print) -> None:
    """The ablations of another folder as a table of their own: made on another machine, in worlds made there."""
    runs = load(output)
    found = {"command": "python studies/alignment.py --output FOLDER second", "machine": machine(output)}
    names = ["ppo", "ppo-loo", *(name for name, arm in ARMS.items() if arm.part in ("ablations", "reward-models"))]
    rows = [row_of(name, runs) for name in ("best-of-n", *names) if name in runs]
    table = markdown(rows, accuracy=False)
    say(table)
    fill(PAGES / "alignment.md", "second", table)
    (PAGES / "alignment-second.json").write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")


def write_report(output: Path, say: Callable[[str], object] = print) -> None:
    """Print the tables, draw the plots and write `docs/studies/alignment.json`."""
    runs = load(output)
    answers = ITERATIONS * PROMPTS * SAMPLES
    described: dict[str, Any] = {
        "command": "python studies/alignment.py table",
        "machine": machine(output),
        "answers": answers,
        "learning_rate": RATE,
    }
    parts = {
        "algorithms": [name for name in ARMS if ARMS[name].part == "algorithms"],
        "critic": ["ppo", *(name for name in ARMS if ARMS[name].part == "critic"), "ppo-loo"],
        "ablations": ["ppo", "ppo-loo", *(name for name in ARMS if ARMS[name].part == "ablations")],
        "reward-models": ["ppo-loo", *(name for name in ARMS if ARMS[name].part == "reward-models")],
    }
    for part, names in parts.items():
        present = [name for name in names if name in runs]
        if part != "algorithms" and len(present) < 3:
            continue
        own = shared_seeds(runs, present) if part == "reward-models" else runs
        rows = [row_of(name, own) for name in (["best-of-n"] if part == "algorithms" else []) + present]
        table = markdown(rows, accuracy=part == "reward-models")
        say(f"\n### {part}, {answers} answers a run\n\n{table}")
        fill(PAGES / "alignment.md", part, table)
        described[part] = rows
        if part != "critic":
            labels = {BESIDE: REWARD_MODELS["pairs"][0]} if part == "reward-models" else None
            frontier(own, present, IMAGES / f"alignment-{part}.png", labels)
        if part == "reward-models":
            described["accuracy_foretells"] = foretold(rows, own)
            draw_foretold(rows, IMAGES / "alignment-foretold.png")
            say(f"\nSpearman's ρ between accuracy and gain: {described['accuracy_foretells']}")
    described["critic_by_iteration"] = critics(runs)
    draw_critics(described["critic_by_iteration"], IMAGES / "alignment-critic.png")
    (PAGES / "alignment.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
