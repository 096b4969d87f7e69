"""The report of an evaluation of policies: JSON, CSV and one self-contained HTML page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from plaudit.configs.evaluate_policy import START
from plaudit.data.native import prompt_to_json
from plaudit.data.pages import Section, csv_text, page
from plaudit.data.records import PromptRecord
from plaudit.evaluation.plots import Plot, write_plots
from plaudit.evaluation.policy_compare import BEST_OF_N, TILT, PolicyComparison, PolicyEvaluation, Scored
from plaudit.evaluation.policy_plots import draw_plots
from plaudit.evaluation.policy_sections import (
    SideBySide,
    distribution_section,
    example_section,
    frontier_section,
    method_section,
    metric_section,
    summary_section,
    unit,
    verdict,
)
from plaudit.evaluation.policy_statistics import METRICS
from plaudit.evaluation.report import bounds_of, plain_values
from plaudit.evaluation.report_sections import interval, number


@dataclass(frozen=True)
class PolicyReport:
    """What a report shows.

    Attributes:
        title: of the page.
        comparison: every number.
        scored: answers and rewards by name, the starting model first.
        examples: answers side by side.
        data: what was read, in words and numbers.
        notes: what a reader should know, one sentence each.
        confidence: of every interval.
    """

    title: str
    comparison: PolicyComparison
    scored: Mapping[str, Scored] = field(repr=False)
    examples: Sequence[SideBySide] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    confidence: float = 0.95

    @property
    def start(self) -> PolicyEvaluation:
        """The starting model."""
        return self.comparison.start

    @property
    def policies(self) -> dict[str, PolicyEvaluation]:
        """The policies by name."""
        return {policy.name: policy for policy in self.comparison.policies}

    @cached_property
    def plots(self) -> dict[str, Plot]:
        """Every plot by name, drawn at the first call."""
        return draw_plots(self.comparison, self.scored)


def pick_examples(
    start: Scored, policies: Mapping[str, Scored], prompts: Sequence[PromptRecord], judge: str | None, count: int
) -> list[SideBySide]:
    """The first answers of every model to `count` prompts, evenly from the most improved to the most worsened.

    Improvement is that of the first policy's first answer by the reward `judge`; without one, or where it is invalid,
    prompts are taken evenly in their order.
    """
    models = {START: start, **policies}
    order = np.arange(len(prompts))
    if judge is not None:
        gain = next(iter(policies.values())).rewards[judge][:, 0] - start.rewards[judge][:, 0]
        known = np.flatnonzero(~np.isnan(gain))
        order = known[np.argsort(-gain[known], kind="stable")] if known.size else order
    places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    found = []
    for row in (int(order[place]) for place in places):
        rewards = {}
        for name in start.rewards:
            values = [float(scored.rewards[name][row, 0]) for scored in models.values()]
            rewards[name] = tuple(None if value != value else value for value in values)
        found.append(
            SideBySide(
                prompt=prompts[row].prompt,
                models=tuple(models),
                texts=tuple(scored.answers.completions[row][0] for scored in models.values()),
                finished=tuple(scored.answers.finished[row][0] for scored in models.values()),
                rewards=rewards,
            )
        )
    return found


def policy_sections(report: PolicyReport) -> list[Section]:
    """The report as sections of a page, for this page or another one (the demo joins them with its own)."""
    found = report.comparison
    sections = [
        summary_section(found, report.plots, report.confidence),
        example_section(report.examples, found.judge),
        frontier_section(found, report.plots),
        metric_section(found),
        distribution_section(report.plots),
        method_section(report.data, report.notes, report.confidence),
    ]
    return [section for section in sections if section is not None]


def write_policy_report(report: PolicyReport, folder: Path) -> Path:
    """Write `report.html`, `report.json`, CSV tables and `plots/` (SVG and CSV of each plot) into a folder.

    Args:
        report: what to show.
        folder: made where it is absent; files of an earlier report are overwritten.

    Returns:
        The path of the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_plots(list(report.plots.values()), folder / "plots")
    for name, (columns, rows) in policy_tables(report).items():
        (folder / f"{name}.csv").write_text(csv_text(columns, rows), encoding="utf-8")
    text = json.dumps(policy_dictionary(report), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    path = folder / "report.html"
    subtitle = f"{', '.join(report.policies)} against the starting model"
    path.write_text(page(report.title, policy_sections(report), subtitle=subtitle), encoding="utf-8")
    return path


def policy_dictionary(report: PolicyReport) -> dict[str, Any]:
    """The report as plain values for JSON: nan becomes null, infinity the string `"inf"`."""
    found = report.comparison
    plain: dict[str, Any] = plain_values(
        {
            "title": report.title,
            "confidence": report.confidence,
            "data": dict(report.data),
            "notes": list(report.notes),
            "proxy": found.proxy,
            "gold": found.gold,
            "models": {
                evaluation.name: {
                    "metrics": {name: asdict(value) for name, value in evaluation.metrics.items()},
                    "differences": {name: asdict(value) for name, value in evaluation.differences.items()},
                }
                for evaluation in (found.start, *found.policies)
            },
            "frontier": [
                {
                    "run": point.run,
                    "point": point.label,
                    "kl": asdict(point.kl),
                    "values": {name: asdict(value) for name, value in point.values.items()},
                    "gains": {name: asdict(value) for name, value in point.gains.items()},
                }
                for point in found.points
            ],
            "fits": [{"run": run, "reward": reward, **asdict(fit)} for (run, reward), fit in found.fits.items()],
            "examples": [{**vars(each), "prompt": prompt_to_json(each.prompt)} for each in report.examples],
        }
    )
    return plain


def policy_tables(report: PolicyReport) -> dict[str, tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
    """Every table of a report as columns and rows, one long table per kind of number."""
    found = report.comparison
    everything = (found.start, *found.policies)
    bounds = ("value", "low", "high", "count")
    return {
        "metrics": (
            ("model", "metric", *bounds),
            [(e.name, name, *bounds_of(value)) for e in everything for name, value in e.metrics.items()],
        ),
        "differences": (
            ("model", "metric", *bounds),
            [(e.name, name, *bounds_of(value)) for e in found.policies for name, value in e.differences.items()],
        ),
        "fits": (
            ("run", "reward", "curve", "coefficient", *bounds),
            [
                (run, reward, fit.kind, name, *bounds_of(getattr(fit, name)))
                for (run, reward), fit in found.fits.items()
                for name in ("alpha", "beta", "peak")
            ],
        ),
        "examples": (
            ("example", "model", "finished", *next(iter(report.scored.values())).rewards, "prompt", "answer"),
            [
                (number_of, model, each.finished[place], *(values[place] for values in each.rewards.values()),
                 json.dumps(prompt_to_json(each.prompt), ensure_ascii=False), each.texts[place])
                for number_of, each in enumerate(report.examples)
                for place, model in enumerate(each.models)
            ],
        ),
    }  # fmt: skip


def summary_text(report: PolicyReport) -> str:
    """The report as a table for the terminal: every number with its interval, models side by side, and the verdict."""
    everything = [report.start, *report.comparison.policies]
    names = list(dict.fromkeys(name for evaluation in everything for name in evaluation.metrics))
    names.sort(key=lambda name: list(METRICS).index(name.partition("/")[0]))
    lines = [["", *(evaluation.name for evaluation in everything)]]
    for name in names:
        cells = [evaluation.metrics.get(name) for evaluation in everything]
        if not any(found is not None and found.count for found in cells):
            continue
        kind = unit(name)
        texts = ["" if found is None else number(found.value, kind) for found in cells]
        bounds = ["" if found is None else interval(found, kind) for found in cells]
        lines.append(
            [name, *(f"{text} ({bound})" if bound else text for text, bound in zip(texts, bounds, strict=True))]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    for point in report.comparison.points:
        gains = "".join(f", {name} {number(value.value, signed=True)}" for name, value in point.gains.items())
        where = f"{point.run}, {point.label}" if point.run in (BEST_OF_N, TILT) else point.label
        text.append(f"{where}: KL {number(point.kl.value)}{gains}")
    text.extend(report.notes)
    text.extend(verdict(policy, report.comparison, report.confidence) for policy in report.comparison.policies)
    return "\n".join(text)
