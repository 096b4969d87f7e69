"""Plots of policies against their starting model, each with the numbers that it shows."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from plaudit.data.pages import COLOURS, GRID, INK, new_figure
from plaudit.evaluation.metrics import FloatArray
from plaudit.evaluation.overoptimisation import curve, distance_of
from plaudit.evaluation.plots import Plot, colour, error_bar, legend
from plaudit.evaluation.policy_compare import BEST_OF_N, TILT, FrontierPoint, PolicyComparison, Scored
from plaudit.rewards.text import length

START_COLOUR = GRID
"""The starting model's colour, everywhere."""


def draw_plots(comparison: PolicyComparison, scored: Mapping[str, Scored]) -> dict[str, Plot]:
    """Every plot that the measurements allow, by name."""
    judge = comparison.judge
    plots = [
        win_rate_plot(comparison) if judge else None,
        frontier_plot(comparison) if judge and len(comparison.points) > 1 else None,
        best_of_n_plot(comparison) if sum(point.run == BEST_OF_N for point in comparison.points) > 1 else None,
        reward_plot(scored, judge) if judge else None,
        length_plot(scored),
    ]
    return {plot.name: plot for plot in plots if plot is not None}


def win_rate_plot(comparison: PolicyComparison) -> Plot:
    """Win rates against the starting model by every reward, one under the other."""
    rewards = [name.partition("/")[2] for name in comparison.start.metrics if name.startswith("reward/")]
    entries = [(policy, reward) for policy in comparison.policies for reward in rewards]
    figure, (axes,) = new_figure(9.2, 0.9 + 0.38 * len(entries))
    axes.axvline(50, color=GRID, linestyle="--", linewidth=1)
    rows: list[tuple[Any, ...]] = []
    for place, (policy, reward) in enumerate(entries):
        found = policy.metrics[f"win_rate/{reward}"]
        shade = colour(rewards.index(reward))
        error_bar(axes, [found], [place], shade, hollow=reward != comparison.judge)
        if np.isfinite(found.value):
            end = found.high if np.isfinite(found.high) else found.value
            text = f"{100 * found.value:.1f} %"
            axes.annotate(
                text, (100 * end, place), xytext=(8, 0), textcoords="offset points", va="center", color=INK
            )  # fmt: skip
        rows.append((policy.name, reward, found.value, found.low, found.high, found.count))
    axes.set_yticks(range(len(entries)), [f"{policy.name}, by {reward}" for policy, reward in entries])
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 25))
    axes.set_xlabel("answers that beat one of the starting model, %")
    axes.grid(axis="y", visible=False)
    return Plot(
        "win_rate",
        "Win rate against the starting model with its interval, ties as half; the dashed line is no difference. Filled "
        f"marks: {comparison.judge}, by which the verdict is spoken.",
        figure,
        ("policy", "reward", "win_rate", "low", "high", "pairs"),
        rows,
    )


def frontier_plot(comparison: PolicyComparison) -> Plot:
    """Gain over `√KL` for best of n and for every run, gold and proxy, with the fitted curves."""
    shown = list(dict.fromkeys(name for name in (comparison.gold, comparison.proxy) if name))
    figure, panels = new_figure(9.2 if len(shown) == 2 else 6.4, 4.2, columns=len(shown))
    runs = list(dict.fromkeys(point.run for point in comparison.points))
    policies = [each for each in runs if each not in (BEST_OF_N, TILT)]
    rows: list[tuple[Any, ...]] = []
    for axes, reward in zip(panels, shown, strict=True):
        axes.axhline(0, color=GRID, linewidth=1)
        for run in runs:
            points = [point for point in comparison.points if point.run == run and reward in point.gains]
            shade = {BEST_OF_N: START_COLOUR, TILT: INK}.get(run) or colour(policies.index(run))
            _draw_run(axes, comparison, run, reward, points, shade)
            rows.extend(_frontier_row(point, reward) for point in points)
        axes.set_xlabel("√KL from the starting model, √nats")
        axes.set_ylabel(f"gain in {reward}")
        role = "gold: what is wanted" if reward == comparison.gold else "proxy: what was optimised"
        axes.set_title(role if len(shown) == 2 else "", loc="left")
        legend(axes, len(runs) + 1)
    fitted = " Lines are the published curves (Gao et al. 2022)." if comparison.fits else ""
    tilted = (
        " The exact tilt, π_ref exp(r/β), gains the most proxy that any policy can at its distance; it is estimated "
        "from the starting model's answers, as far as these reach."
        if TILT in runs
        else ""
    )
    return Plot(
        "frontier",
        "What is gained at which distance. Gold that falls while the proxy rises is over-optimisation; best of n "
        f"stands at the upper bound of its divergence, log n − (n−1)/n.{tilted}{fitted}",
        figure,
        ("run", "point", "kl", "kl_low", "kl_high", "distance", "reward", "gain", "low", "high"),
        rows,
    )


def _draw_run(
    axes: Axes, comparison: PolicyComparison, run: str, reward: str, points: Sequence[FrontierPoint], shade: str
) -> None:
    if not points:
        return
    distance = np.array([point.distance for point in points])
    if run == TILT:
        reached = [point.gains[reward].value for point in points]
        axes.plot([0, *distance], [0, *reached], color=shade, linewidth=1, linestyle=":", marker=".", label=run)
        return
    gains = [point.gains[reward] for point in points]
    values = np.array([gain.value for gain in gains])
    spread = [np.array([getattr(gain, end) for gain in gains]) for end in ("low", "high")]
    bars = [np.nan_to_num(np.maximum(values - spread[0], 0)), np.nan_to_num(np.maximum(spread[1] - values, 0))]
    ends = [distance_of(np.array([getattr(point.kl, end) for point in points])) for end in ("low", "high")]
    reach = [np.nan_to_num(np.maximum(distance - ends[0], 0)), np.nan_to_num(np.maximum(ends[1] - distance, 0))]
    mark = "s" if run == BEST_OF_N else "o"
    axes.errorbar(
        distance,
        values,
        yerr=bars,
        xerr=None if run == BEST_OF_N else reach,
        fmt=mark,
        color=shade,
        markersize=5,
        linewidth=1.4,
        label=run,
    )
    # A legend looks for a place without lines, and does not see bars.
    axes.plot(np.stack([distance, distance]), np.stack([values - bars[0], values + bars[1]]), alpha=0)
    fitted = comparison.fits.get((run, reward))
    if fitted is None:
        if run == BEST_OF_N:
            axes.plot(distance, values, color=shade, linewidth=1)
        return
    # Over the points alone: the curve begins at 0 by its form, not because anything was measured there.
    line = np.linspace(0.9 * float(distance.min()), 1.05 * float(distance.max()), 120)
    axes.plot(line, curve(fitted.kind, line, fitted.alpha.value, fitted.beta.value), color=shade, linewidth=1.4)


def _frontier_row(point: FrontierPoint, reward: str) -> tuple[Any, ...]:
    gain, kl = point.gains[reward], point.kl
    return point.run, point.label, kl.value, kl.low, kl.high, point.distance, reward, gain.value, gain.low, gain.high


def best_of_n_plot(comparison: PolicyComparison) -> Plot:
    """Reward of the favourite of n answers of the starting model, over n, with the policies as level lines."""
    points = [point for point in comparison.points if point.run == BEST_OF_N]
    names = list(points[0].values)
    sizes = [int(point.label.rpartition(" ")[2]) for point in points]
    figure, panels = new_figure(9.2 if len(names) == 2 else 6.4, 3.6, columns=len(names))
    rows: list[tuple[Any, ...]] = []
    for axes, name in zip(panels, names, strict=True):
        found = [point.values[name] for point in points]
        axes.plot(sizes, [each.value for each in found], color=START_COLOUR, marker="s", markersize=5, label=BEST_OF_N)
        axes.fill_between(
            sizes, [each.low for each in found], [each.high for each in found], color=START_COLOUR, alpha=0.22
        )  # fmt: skip
        for place, policy in enumerate(comparison.policies[:6]):
            level = policy.metrics[f"reward/{name}"]
            axes.axhline(level.value, color=colour(place), linewidth=1.4, label=policy.name)
            axes.axhspan(level.low, level.high, color=colour(place), alpha=0.12, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel(f"n, the favourite by {comparison.proxy}")
        axes.set_ylabel(f"mean {name}")
        legend(axes, 1 + len(comparison.policies))
        rows.extend(
            (size, name, point.kl.value, each.value, each.low, each.high, each.count)
            for size, point, each in zip(sizes, points, found, strict=True)
        )
    return Plot(
        "best_of_n",
        "The favourite of n answers of the starting model, estimated without a bias from all of them; level lines are "
        "the policies.",
        figure,
        ("n", "reward", "kl_bound", "mean", "low", "high", "prompts"),
        rows,
    )


def reward_plot(scored: Mapping[str, Scored], reward: str) -> Plot:
    """The distribution of a reward over all answers of each model."""
    values = {name: each.rewards[reward][~np.isnan(each.rewards[reward])] for name, each in scored.items()}
    return _histogram(
        "reward_distribution", {name: v for name, v in values.items() if v.size}, f"{reward} of single answers",
        f"How {reward} is spread over single answers.",
    )  # fmt: skip


def length_plot(scored: Mapping[str, Scored]) -> Plot:
    """The distribution of lengths in words of each model."""
    values = {name: each.answers.table(lambda text: float(length(text, "words"))) for name, each in scored.items()}
    return _histogram(
        "lengths", {name: table[~np.isnan(table)] for name, table in values.items()},
        "words of an answer (characters in scripts without spaces)",
        "Lengths of the answers: a reward that is paid for length shows here first.",
    )  # fmt: skip


def _histogram(name: str, values: Mapping[str, FloatArray], label: str, caption: str, bins: int = 30) -> Plot:
    figure, (axes,) = new_figure(6.4, 3.0)
    rows: list[tuple[Any, ...]] = []
    everything = np.concatenate([*values.values(), np.zeros(0)])
    low, high = (float(everything.min()), float(everything.max())) if everything.size else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    for place, (model, found) in enumerate(values.items()):
        heights = np.histogram(found, edges)[0] / max(found.size, 1)
        shade = START_COLOUR if place == 0 else COLOURS[(place - 1) % len(COLOURS)]
        axes.stairs(heights, edges, color=shade, fill=True, alpha=0.2)
        axes.stairs(heights, edges, color=shade, linewidth=1.4, label=model)
        rows.extend(
            (model, *row) for row in zip(edges[:-1].tolist(), edges[1:].tolist(), heights.tolist(), strict=True)
        )
    axes.set_xlabel(label)
    axes.set_ylabel("share of answers")
    legend(axes, len(values))
    return Plot(name, caption, figure, ("model", "from", "to", "share"), rows)
