"""The report of an evaluation: JSON, CSV and one self-contained HTML page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from plaudit.data.pages import Section, csv_text, page
from plaudit.evaluation.evaluate import PairedDifference, RewardEvaluation
from plaudit.evaluation.intervals import Estimate
from plaudit.evaluation.plots import Plot, breakdown_plot, forest_plot, length_plot, reliability_plot, reward_plot
from plaudit.evaluation.plots import write_plots as write_plot_files
from plaudit.evaluation.probes import ProbeResult
from plaudit.evaluation.report_sections import (
    breakdown_section,
    calibration_section,
    difference_section,
    example_section,
    length_section,
    method_section,
    metric_section,
    probe_section,
    reward_section,
    rewardbench_section,
    summary_section,
)
from plaudit.evaluation.rewardbench import RewardBenchResult, as_dictionary

#: Which plots are drawn by part of the pairs, in this order.
BREAKDOWNS = ("margin", "K", "subset", "annotator", "judgement")


@dataclass(frozen=True)
class RewardReport:
    """What a report shows.

    Attributes:
        title: of the page.
        models: evaluations of the models, from one call of `evaluate_models` together with the floors.
        floors: evaluations of the floors.
        differences: paired differences among all of them.
        probes: per model the results of its probes.
        rewardbench: per model its score by the benchmark's rules.
        data: what was read, in words and numbers.
        notes: what a reader should know, one sentence each.
        confidence: of every interval.
    """

    title: str
    models: list[RewardEvaluation]
    floors: list[RewardEvaluation] = field(default_factory=list)
    differences: list[PairedDifference] = field(default_factory=list)
    probes: Mapping[str, list[ProbeResult]] = field(default_factory=dict)
    rewardbench: Mapping[str, RewardBenchResult] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    confidence: float = 0.95

    @cached_property
    def plots(self) -> dict[str, Plot]:
        """Every plot by name, drawn at the first call."""
        plots = [forest_plot(self.models, self.floors), reliability_plot(self.models), length_plot(self.models)]
        plots.extend(plot for kind in BREAKDOWNS if (plot := breakdown_plot(self.models, kind)) is not None)
        plots.extend(reward_plot(evaluation) for evaluation in self.models)
        return {plot.name: plot for plot in plots}


def reward_sections(report: RewardReport) -> list[Section]:
    """The report as sections of a page, for this page or another one (the demo joins them with its own)."""
    sections = [
        summary_section(report.models, report.floors, report.differences, report.plots, report.confidence),
        metric_section(report.models, report.floors),
        difference_section(report.models, report.floors, report.differences),
        calibration_section(report.models, report.plots),
        breakdown_section(report.models, report.plots, BREAKDOWNS),
        length_section(report.models, report.plots),
        reward_section(report.models, report.plots),
        probe_section(report.probes),
        rewardbench_section(report.rewardbench),
        example_section(report.models),
        method_section(report.models[0], report.data, report.notes, report.confidence),
    ]
    return [section for section in sections if section is not None]


def write_report(report: RewardReport, folder: Path) -> Path:
    """Write `report.html`, `report.json`, CSV tables and `plots/` (SVG and CSV of each plot) into a folder.

    Args:
        report: what to show, with at least one model.
        folder: made where it is absent; files of an earlier report are overwritten.

    Returns:
        The path of the page.
    """
    if not report.models:
        raise ValueError("a report needs at least one evaluated model")
    folder.mkdir(parents=True, exist_ok=True)
    write_plot_files(list(report.plots.values()), folder / "plots")
    for name, (columns, rows) in report_tables(report).items():
        (folder / f"{name}.csv").write_text(csv_text(columns, rows), encoding="utf-8")
    text = json.dumps(report_dictionary(report), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    names = ", ".join(evaluation.name for evaluation in report.models)
    html = page(report.title, reward_sections(report), subtitle=names)
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def report_dictionary(report: RewardReport) -> dict[str, Any]:
    """The report as plain values for JSON: nan becomes null, infinity the string `"inf"`."""
    plain: dict[str, Any] = plain_values(
        {
            "title": report.title,
            "confidence": report.confidence,
            "data": dict(report.data),
            "notes": list(report.notes),
            "models": {evaluation.name: evaluation_dictionary(evaluation) for evaluation in report.models},
            "floors": {evaluation.name: evaluation_dictionary(evaluation) for evaluation in report.floors},
            "differences": [
                {"first": d.first, "second": d.second, "metric": d.metric, **asdict(d.difference)}
                for d in report.differences
            ],
            "probes": {name: [asdict(result) for result in results] for name, results in report.probes.items()},
            "rewardbench": {name: as_dictionary(result) for name, result in report.rewardbench.items()},
        }
    )
    return plain


def evaluation_dictionary(evaluation: RewardEvaluation) -> dict[str, Any]:
    """One evaluation as plain values, without the arrays that only serve plots and pairing."""
    return {
        "metrics": {name: asdict(found) for name, found in evaluation.metrics.items()},
        "breakdowns": {kind: [asdict(row) for row in rows] for kind, rows in evaluation.breakdowns.items()},
        "best_of_k": [
            {"K": size, "accuracy": asdict(found), "chance": chance} for size, found, chance in evaluation.best_of_k
        ],
        "counts": evaluation.counts,
        "human_ties": evaluation.human_ties,
        "calibration_noise": evaluation.calibration_noise,
        "reliability": {
            "predicted": evaluation.reliability.predicted.tolist(),
            "observed": evaluation.reliability.observed.tolist(),
            "weight": evaluation.reliability.weight.tolist(),
        },
        "examples": [asdict(example) for example in evaluation.examples],
    }


def report_tables(report: RewardReport) -> dict[str, tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
    """Every table of a report as columns and rows, one long table per kind of number."""
    everything = [(e, "model") for e in report.models] + [(e, "floor") for e in report.floors]
    bounds = ("value", "low", "high", "count")
    return {
        "metrics": (
            ("model", "kind", "metric", *bounds),
            [(e.name, kind, name, *bounds_of(found)) for e, kind in everything for name, found in e.metrics.items()],
        ),
        "breakdowns": (
            ("model", "by", "part", "metric", *bounds),
            [
                (e.name, kind, row.label, metric, *bounds_of(found))
                for e, _ in everything
                for kind, rows in e.breakdowns.items()
                for row in rows
                for metric, found in (("accuracy", row.accuracy), ("log_loss", row.log_loss))
            ],
        ),
        "best_of_k": (
            ("model", "K", *bounds, "chance"),
            [(e.name, size, *bounds_of(found), chance) for e, _ in everything for size, found, chance in e.best_of_k],
        ),
        "differences": (
            ("first", "second", "metric", *bounds),
            [(d.first, d.second, d.metric, *bounds_of(d.difference)) for d in report.differences],
        ),
        "probes": (
            ("model", "probe", "rise", "low", "high", "answers", "rise_in_spreads", "win_rate", "skipped"),
            [
                (name, r.probe, *bounds_of(r.rise), r.rise_in_spreads, r.win_rate.value, r.skipped)
                for name, results in report.probes.items()
                for r in results
            ],
        ),
        "examples": (
            ("model", "probability", "prompt", "preferred", "other", "preferred_reward", "other_reward", "id"),
            [
                (e.name, x.probability, x.prompt, x.preferred, x.other, x.preferred_reward, x.other_reward, x.id)
                for e in report.models
                for x in e.examples
            ],
        ),
    }


def bounds_of(found: Estimate) -> tuple[float, float, float, int]:
    """Value, low, high and count: a row of a table."""
    return found.value, found.low, found.high, found.count


def plain_values(value: Any) -> Any:
    """The value as JSON knows it: nan becomes null, infinity the string `"inf"`, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
