"""Plots of reward models, each with the numbers that it shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plaudit.data.pages import COLOURS, GRID, INK, csv_text, figure_as_svg, new_figure
from plaudit.evaluation.evaluate import BreakdownRow, RewardEvaluation
from plaudit.evaluation.intervals import Estimate
from plaudit.evaluation.metrics import FloatArray


@dataclass(frozen=True)
class Plot:
    """A figure, what it shows in a sentence, and the same as a table.

    Attributes:
        name: file name without ending.
        caption: how to read it.
        figure: the drawing.
        columns: names of the table's columns.
        rows: the table.
    """

    name: str
    caption: str
    figure: Figure
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    @cached_property
    def svg(self) -> str:
        """The figure as inline SVG in the page's ink; drawn once, however often it is shown."""
        return figure_as_svg(self.figure)


def write_plots(plots: Sequence[Plot], folder: Path) -> None:
    """Write every plot as `name.svg` and its numbers as `name.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    for plot in plots:
        (folder / f"{plot.name}.svg").write_text(plot.svg.replace("currentColor", INK), "utf-8")
        (folder / f"{plot.name}.csv").write_text(csv_text(plot.columns, plot.rows), "utf-8")


def forest_plot(evaluations: Sequence[RewardEvaluation], floors: Sequence[RewardEvaluation] = ()) -> Plot:
    """Pair accuracy of every model and floor with its interval, one under the other."""
    everything = [*evaluations, *floors]
    figure, (axes,) = new_figure(9.2, 0.8 + 0.4 * len(everything))
    axes.axvline(50, color=GRID, linestyle="--", linewidth=1)
    for place, evaluation in enumerate(everything):
        found = evaluation.metrics["accuracy"]
        is_floor = place >= len(evaluations)
        error_bar(axes, [found], [place], GRID if is_floor else colour(place), hollow=is_floor)
        end = found.high if np.isfinite(found.high) else found.value
        axes.annotate(
            f"{100 * found.value:.1f} %", (100 * end, place), xytext=(8, 0), textcoords="offset points", va="center",
            color=INK,
        )  # fmt: skip
    labels = [
        e.name if place < len(evaluations) else f"floor: {e.name.replace('_', ' ')}"
        for place, e in enumerate(everything)
    ]
    axes.set_yticks(range(len(everything)), labels)
    axes.set_ylim(len(everything) - 0.4, -0.6)
    ends = [bound for e in everything for bound in _bounds(e.metrics["accuracy"])]
    low, high = 100 * min([*ends, 0.5]), 100 * max([*ends, 0.5])
    axes.set_xlim(low - 2, high + 0.14 * (high - low) + 4)
    axes.set_xlabel("pairs ordered as people did, %")
    axes.grid(axis="y", visible=False)
    rows = [(label, *_row(e.metrics["accuracy"])) for label, e in zip(labels, everything, strict=True)]
    return Plot(
        "accuracy",
        "Pair accuracy with its interval; the dashed line is guessing, hollow marks are floors.",
        figure,
        ("model", "accuracy", "low", "high", "pairs"),
        rows,
    )


def reliability_plot(evaluations: Sequence[RewardEvaluation]) -> Plot:
    """The reliability diagram: what each model promised against what came true."""
    figure, (axes,) = new_figure(4.8, 4.3)
    axes.plot([0, 1], [0, 1], color=GRID, linestyle="--", linewidth=1)
    rows: list[tuple[Any, ...]] = []
    for place, evaluation in enumerate(evaluations):
        curve = evaluation.reliability
        axes.plot(curve.predicted, curve.observed, color=colour(place), linewidth=1.6, label=evaluation.name)
        axes.scatter(curve.predicted, curve.observed, color=colour(place), s=26, zorder=3, clip_on=False)
        values = zip(curve.predicted.tolist(), curve.observed.tolist(), curve.weight.tolist(), strict=True)
        rows.extend((evaluation.name, *row) for row in values)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xlabel("the model's probability that people prefer it")
    axes.set_ylabel("how often people did")
    legend(axes, len(evaluations))
    return Plot(
        "reliability",
        "Reliability, bins of equal mass, both orders of each pair. On the dashed line the model means what it says; "
        "a curve flatter than the line is overconfident, a steeper one too timid.",
        figure,
        ("model", "predicted", "observed", "weight"),
        rows,
    )


def breakdown_plot(evaluations: Sequence[RewardEvaluation], kind: str) -> Plot | None:
    """Accuracy by margin, K, annotator, subset or kind of judgement; None where the data does not differ in it."""
    labels = [row.label for row in evaluations[0].breakdowns.get(kind, [])]
    if not labels:
        return None
    figure, (axes,) = new_figure(
        9.2 if len(labels) > 8 else 6.0, 1.0 + max(0.34, 0.15 * len(evaluations) + 0.1) * len(labels)
    )
    axes.axvline(50, color=GRID, linestyle="--", linewidth=1)
    rows: list[tuple[Any, ...]] = []
    for place, evaluation in enumerate(evaluations):
        parts: list[BreakdownRow] = evaluation.breakdowns[kind]
        offset = (place - (len(evaluations) - 1) / 2) * min(0.22, 0.7 / len(evaluations))
        positions = [index + offset for index in range(len(parts))]
        error_bar(axes, [p.accuracy for p in parts], positions, colour(place), label=evaluation.name)
        rows.extend((evaluation.name, part.label, *_row(part.accuracy)) for part in parts)
    counts = [part.accuracy.count for part in evaluations[0].breakdowns[kind]]
    prefix = "K = " if kind == "K" else ""
    axes.set_yticks(
        range(len(labels)), [f"{prefix}{label}  ({count:,})" for label, count in zip(labels, counts, strict=True)]
    )
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("pairs ordered as people did, %")
    axes.grid(axis="y", visible=False)
    legend(axes, len(evaluations), outside=True)
    return Plot(
        f"accuracy_by_{kind.lower()}",
        f"Accuracy by {_KINDS[kind]}; the number of pairs stands in brackets.",
        figure,
        ("model", kind, "accuracy", "low", "high", "pairs"),
        rows,
    )


def reward_plot(evaluation: RewardEvaluation) -> Plot:
    """Rewards of preferred and other completions, and their differences."""
    figure, (left, right) = new_figure(8.6, 3.0, columns=2)
    both = np.concatenate([evaluation.chosen, evaluation.rejected])
    edges = _edges(both)
    rows: list[tuple[Any, ...]] = []
    for label, values, colour in (
        ("people preferred it", evaluation.chosen, COLOURS[2]),
        ("people preferred another", evaluation.rejected, COLOURS[3]),
    ):
        heights, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges, density=True)
        left.stairs(heights, edges, color=colour, fill=True, alpha=0.35)
        left.stairs(heights, edges, color=colour, linewidth=1.4, label=label)
        rows.extend((label, low, high, h) for low, high, h in _triples(edges, heights))
    left.set_xlabel(f"reward by {evaluation.name}")
    left.set_yticks([])
    legend(left, 2)
    left.set_ylim(0, left.get_ylim()[1] * 1.25)
    difference = evaluation.chosen - evaluation.rejected
    edges = _edges(difference, around_zero=True)
    heights, _ = np.histogram(np.clip(difference, edges[0], edges[-1]), edges)
    colours = [COLOURS[0] if low >= -1e-12 else COLOURS[3] for low in edges[:-1]]
    right.bar(edges[:-1], heights, np.diff(edges), align="edge", color=colours, alpha=0.75)
    right.axvline(0, color=INK, linewidth=1)
    right.set_xlabel("preferred minus other")
    right.set_ylabel("pairs")
    rows.extend(("difference", low, high, h) for low, high, h in _triples(edges, heights))
    return Plot(
        f"rewards_{slug(evaluation.name)}",
        "Left: rewards on both sides of the judged pairs. Right: their differences; left of the line the model "
        "disagrees with people. The outermost bars hold what lies beyond.",
        figure,
        ("series", "from", "to", "height"),
        rows,
    )


def length_plot(evaluations: Sequence[RewardEvaluation], bins: int = 5) -> Plot:
    """Reward difference against length difference within pairs: points of the first model, means of all of them."""
    figure, (axes,) = new_figure(5.4, 3.6)
    axes.axhline(0, color=GRID, linewidth=1)
    axes.axvline(0, color=GRID, linewidth=1)
    rows: list[tuple[Any, ...]] = []
    reach = float(np.quantile(np.abs(evaluations[0].length_change), 0.98)) or 1.0
    for place, evaluation in enumerate(evaluations):
        # Seen from the longer completion and mirrored: the curve shows what length does, not who is named first.
        sign = np.where(evaluation.length_change < 0, -1.0, 1.0)
        longer = sign * evaluation.length_change
        reward = sign * (evaluation.chosen - evaluation.rejected)
        if place == 0:
            shown = np.unique(np.linspace(0, longer.size - 1, min(600, longer.size)).astype(int))
            for mirror in (1, -1):
                axes.scatter(
                    mirror * longer[shown], mirror * reward[shown], s=7, color=colour(0), alpha=0.16, linewidths=0
                )
        index = np.searchsorted(np.unique(np.quantile(longer, np.linspace(0, 1, bins + 1)[1:-1])), longer, "right")
        inside = [(index == b) & (longer > 0) for b in range(int(index.max()) + 1)]
        half = [
            (float(longer[part].mean()), float(reward[part].mean()), int(part.sum())) for part in inside if part.any()
        ]
        means = [(-x, -y, count) for x, y, count in reversed(half)] + half
        axes.plot(
            [x for x, _, _ in means], [y for _, y, _ in means], color=colour(place), marker="o", markersize=4.5,
            linewidth=1.8, label=evaluation.name,
        )  # fmt: skip
        rows.extend((evaluation.name, *mean) for mean in means)
    axes.set_xlim(-reach, reach)
    spread = float(np.quantile(np.abs(evaluations[0].chosen - evaluations[0].rejected), 0.98)) or 1.0
    axes.set_ylim(-spread, spread)
    axes.set_xlabel("how many characters longer")
    axes.set_ylabel("how much higher the reward")
    legend(axes, len(evaluations))
    return Plot(
        "length",
        "Within judged pairs: does the longer completion get the higher reward? Lines are means; a level line at 0 "
        f"means that length does not matter. Points: {evaluations[0].name}.",
        figure,
        ("model", "characters_longer", "reward_higher", "pairs"),
        rows,
    )


_KINDS = {
    "margin": "how far apart people put the two",
    "K": "the number of completions per prompt",
    "annotator": "annotator",
    "subset": "subset",
    "judgement": "kind of judgement",
}


def colour(place: int) -> str:
    """The colour of the `place`-th model."""
    return COLOURS[place % len(COLOURS)]


def _row(found: Estimate) -> tuple[float, float, float, int]:
    return found.value, found.low, found.high, found.count


def _bounds(found: Estimate) -> list[float]:
    return [bound for bound in (found.low, found.value, found.high) if np.isfinite(bound)]


def error_bar(
    axes: Axes,
    estimates: Sequence[Estimate],
    positions: Sequence[float],
    colour: str,
    *,
    hollow: bool = False,
    label: str | None = None,
) -> None:
    """Shares with their intervals as horizontal bars in percent."""
    values = 100 * np.array([found.value for found in estimates])
    low = np.nan_to_num(values - 100 * np.array([found.low for found in estimates]))
    high = np.nan_to_num(100 * np.array([found.high for found in estimates]) - values)
    axes.errorbar(
        values, positions, xerr=[np.maximum(low, 0), np.maximum(high, 0)], fmt="o", color=colour,
        markerfacecolor="none" if hollow else colour, markersize=6, linewidth=2, capsize=0, label=label,
    )  # fmt: skip


def legend(axes: Axes, entries: int, *, outside: bool = False) -> None:
    """A legend, where there is more than one thing to tell apart."""
    if entries < 2:
        return
    more: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 3} if outside else {}
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, **more)


def _edges(values: FloatArray, *, around_zero: bool = False, bins: int = 36) -> FloatArray:
    """Equal-width edges over all but the outermost percent; with 0 among them where asked for."""
    low, high = np.quantile(values, [0.005, 0.995])
    if around_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    if not around_zero:
        return np.linspace(low, high, bins + 1)
    width = (high - low) / bins
    return np.asarray(width * np.arange(np.floor(low / width), np.ceil(high / width) + 1))


def _triples(edges: FloatArray, heights: FloatArray) -> list[tuple[float, float, float]]:
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), heights.tolist(), strict=True))


def slug(name: str) -> str:
    """The name with everything that does not belong into a file name replaced."""
    return "".join(mark if mark.isalnum() or mark in "-_." else "_" for mark in name)
