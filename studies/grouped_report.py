"""Tables, plots and JSON of the study of grouped against shuffled comparisons, from the curves that it left."""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from grouped_vs_shuffled import ARMS, NAMES, ROOT
from matplotlib.ticker import NullFormatter

PAGES = ROOT / "docs" / "studies"
IMAGES = ROOT / "docs" / "images" / "studies"
LABELS = {
    "grouped": "grouped",
    "shuffled-equal-pairs": "shuffled, as many steps",
    "shuffled-equal-completions": "shuffled, as many completions a step",
    "shuffled-equal-elements": "shuffled, as many elements a step",
}
COLOURS = dict(zip(ARMS, ("#1b6ca8", "#d1495b", "#edae49", "#8d6a9f"), strict=True))
Curves = dict[tuple[str, int], dict[str, dict[float, list[dict[str, Any]]]]]
"""By (data, K), arm and learning rate: one curve per seed, in the order of the seeds."""


def load(output: Path) -> Curves:
    """All curves that were made."""
    found: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name in NAMES:
        for file in sorted((output / name).glob("K*/*/*.json"), key=lambda each: (each.parent, each.name)):
            one = json.loads(file.read_text())
            found[name, one["completions"]][one["arm"]][one["rate"]].append(one)
    for arms in found.values():
        for rates in arms.values():
            for curves in rates.values():
                curves.sort(key=lambda each: each["seed"])
    return found


def best(curve: Sequence[dict[str, float]]) -> float:
    """The lowest held-out log-loss of a curve: what stopping at the right moment would give."""
    return min(point["log_loss"] for point in curve)


def at(curve: Sequence[dict[str, float]], clock: str, value: float) -> dict[str, float]:
    """Held-out values where one of a curve's clocks shows `value`, on straight lines between its points."""
    later = next((number for number, point in enumerate(curve) if point[clock] >= value), len(curve) - 1)
    after, before = curve[later], curve[max(0, later - 1)]
    width = after[clock] - before[clock]
    share = min(1.0, max(0.0, (value - before[clock]) / width)) if width else 1.0
    return {key: before[key] + share * (after[key] - before[key]) for key in after}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over seeds."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def best_rate(rates: dict[float, list[dict[str, Any]]]) -> float:
    """The learning rate whose best held-out log-loss is lowest on average, of those that most seeds have."""
    most = max(len(curves) for curves in rates.values())
    tried = {rate: curves for rate, curves in rates.items() if len(curves) == most}
    return min(tried, key=lambda rate: statistics.fmean(best(one["curve"]) for one in tried[rate]))


def table_rows(arms: dict[str, dict[float, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """One row per arm at the rate that suits the grouped arm best, with the paired difference to that arm."""
    rate = best_rate(arms["grouped"])
    grouped = {one["seed"]: one["curve"] for one in arms["grouped"][rate]}
    rows = []
    for name in ARMS:
        if rate not in arms.get(name, {}):
            continue
        chosen = [one for one in arms[name][rate] if one["seed"] in grouped]
        curves = {one["seed"]: one["curve"] for one in chosen}
        lowest = {seed: min(curve, key=lambda point: point["log_loss"]) for seed, curve in curves.items()}
        visited = {seed: at(curve, "visits", 1) for seed, curve in curves.items()}
        rows.append(
            {
                "arm": name,
                "rate": rate,
                "seeds": len(curves),
                "elements_per_step": statistics.fmean(one["plan"]["elements"] for one in chosen),
                "steps_per_epoch": statistics.fmean(one["plan"]["steps_per_epoch"] for one in chosen),
                "tokens_per_epoch": statistics.fmean(c[-1]["tokens"] / c[-1]["epoch"] for c in curves.values()),
                "visits_per_epoch": statistics.fmean(c[-1]["visits"] / c[-1]["epoch"] for c in curves.values()),
                "best_log_loss": mean_and_error([point["log_loss"] for point in lowest.values()]),
                "best_accuracy": mean_and_error([point["accuracy"] for point in lowest.values()]),
                "best_minus_grouped": mean_and_error([lowest[s]["log_loss"] - best(grouped[s]) for s in lowest]),
                "best_epoch": statistics.median(point["epoch"] for point in lowest.values()),
                "best_visits": statistics.median(point["visits"] for point in lowest.values()),
                "equal_completions": mean_and_error([point["log_loss"] for point in visited.values()]),
                "equal_completions_minus_grouped": mean_and_error(
                    [visited[s]["log_loss"] - at(grouped[s], "visits", 1)["log_loss"] for s in visited]
                ),
                "equal_steps_minus_grouped": mean_and_error(
                    [
                        at(curve, "step", steps_of(arms, seed))["log_loss"]
                        - at(grouped[seed], "step", steps_of(arms, seed))["log_loss"]
                        for seed, curve in curves.items()
                    ]
                ),
                "epochs": {
                    epoch: mean_and_error([at(curve, "epoch", epoch)["log_loss"] for curve in curves.values()])
                    for epoch in range(1, 5)
                    if all(curve[-1]["epoch"] > epoch - 0.25 for curve in curves.values())
                },
                "accuracies": {
                    epoch: mean_and_error([at(curve, "epoch", epoch)["accuracy"] for curve in curves.values()])
                    for epoch in range(1, 5)
                    if all(curve[-1]["epoch"] > epoch - 0.25 for curve in curves.values())
                },
            }
        )
    return rows


def steps_of(arms: dict[str, dict[float, list[dict[str, Any]]]], seed: int) -> int:
    """Steps of one grouped epoch: where the control of equal steps is read."""
    curves = next(iter(arms["grouped"].values()))
    return int(next(one for one in curves if one["seed"] == seed)["plan"]["steps_per_epoch"])


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a table."""

    def both(value: tuple[float, float], sign: str = "") -> str:
        return f"{value[0]:{sign}.3f} ± {value[1]:.3f}"

    lines = [
        "| arm | rate | elements a step | steps, tokens (thousand), visits of an epoch | best log-loss | its accuracy "
        "| minus grouped | at epoch | after one visit, minus grouped | after a grouped epoch's steps, minus grouped "
        "| log-loss after 1, 2, 3, 4 epochs |",
        "|---|---:|---:|---:|---|---|---|---:|---|---|---|",
    ]
    for row in rows:
        other = row["arm"] != "grouped"
        cells = [
            LABELS[row["arm"]],
            f"{row['rate']:g}",
            f"{row['elements_per_step']:.0f}",
            f"{row['steps_per_epoch']:.0f}, {row['tokens_per_epoch'] / 1e3:.0f}, {row['visits_per_epoch']:.1f}",
            both(row["best_log_loss"]),
            both(row["best_accuracy"]),
            both(row["best_minus_grouped"], "+") if other else "",
            f"{row['best_epoch']:.2f}",
            both(row["equal_completions_minus_grouped"], "+") if other else "",
            both(row["equal_steps_minus_grouped"], "+") if other else "",
            ", ".join(f"{mean:.3f}" for mean, _ in row["epochs"].values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def averaged(curves: Sequence[dict[str, Any]], clock: str, value: str) -> tuple[list[float], list[float], list[float]]:
    """Places of a clock, the mean of a value there over seeds, and its standard error."""
    longest = min(curves, key=lambda one: len(one["curve"]))["curve"]
    columns = [[one["curve"][number][value] for one in curves] for number in range(len(longest))]
    summary = [mean_and_error(column) for column in columns]
    places = [statistics.fmean(one["curve"][number][clock] for one in curves) for number in range(len(longest))]
    return places, [mean for mean, _ in summary], [error for _, error in summary]


def plot(name: str, found: Curves) -> Path | None:
    """Held-out log-loss and accuracy by visits, by steps and by epochs: a row per K."""
    counts = sorted(count for key, count in found if key == name and count > 2)
    if not counts:
        return None
    clocks = (("visits", "times each completion was seen"), ("step", "optimizer steps"), ("epoch", "epochs"))
    figure, panels = plt.subplots(len(counts), 4, figsize=(14, 3.3 * len(counts)), layout="constrained", squeeze=False)
    for row, count in zip(panels, counts, strict=True):
        arms = found[name, count]
        views: list[tuple[str, str, str]] = [(clock, label, "log_loss") for clock, label in clocks]
        for panel, (clock, label, value) in zip(row, [*views, ("epoch", "epochs", "accuracy")], strict=True):
            rate = best_rate(arms["grouped"])
            for arm in (each for each in ARMS if rate in arms.get(each, {})):
                curves = arms[arm][rate]
                places, means, errors = averaged(curves, clock, value)
                panel.plot(places, means, color=COLOURS[arm], label=LABELS[arm], linewidth=1.6)
                low = [mean - error for mean, error in zip(means, errors, strict=True)]
                high = [mean + error for mean, error in zip(means, errors, strict=True)]
                panel.fill_between(places, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
            if value == "log_loss":
                bottom = min(best(one["curve"]) for rates in arms.values() for c in rates.values() for one in c)
                panel.axhline(math.log(2), color="#888888", linestyle=":", linewidth=1)
                panel.set_ylim(bottom - 0.02, 0.9)
            panel.set_xscale("linear" if clock == "epoch" else "log")
            if clock != "epoch":
                panel.xaxis.set_minor_formatter(NullFormatter())  # on short axes they run into each other
            panel.set(xlabel=label, title=f"K = {count}: {'log-loss' if value == 'log_loss' else 'accuracy'}")
            panel.grid(alpha=0.25)
    panels[0][0].legend(fontsize=7)
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / f"grouped-vs-shuffled-{name}.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def write_report(output: Path, say: Callable[[str], object] = print) -> None:
    """Print the tables, draw the plots and write `docs/studies/grouped-vs-shuffled.json`."""
    found = load(output)
    results = []
    for (name, count), arms in found.items():
        rows = table_rows(arms)
        say(f"\n### {name}, K = {count}\n\n{markdown(rows)}")
        rates = {
            arm: {rate: mean_and_error([best(one["curve"]) for one in curves]) for rate, curves in rates.items()}
            for arm, rates in arms.items()
        }
        results.append({"data": name, "completions": count, "rows": rows, "best_by_rate": rates})
    for name in dict.fromkeys(name for name, _ in found):
        say(str(plot(name, found)))
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    described = {"command": "python studies/grouped_vs_shuffled.py table", "versions": versions, "results": results}
    (PAGES / "grouped-vs-shuffled.json").write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
