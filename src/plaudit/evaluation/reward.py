"""The job `plaudit evaluate reward`: load models and data, measure, compare with floors, write the report."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from plaudit.configs.evaluate import EvaluateRewardConfig
from plaudit.data.io import read_comparisons
from plaudit.data.records import Comparison, tiers_of
from plaudit.evaluation.evaluate import EvaluationOptions, compare, evaluate_models
from plaudit.evaluation.intervals import Estimate
from plaudit.evaluation.judged import JudgedSet, judge
from plaudit.evaluation.probes import ENGLISH_PROBES, Probe, ProbeResult, run_probes
from plaudit.evaluation.report import RewardReport, write_report
from plaudit.evaluation.report_sections import interval, number, verdict
from plaudit.evaluation.reward_floors import Floors, reward_floors
from plaudit.evaluation.reward_statistics import METRICS
from plaudit.evaluation.rewardbench import RewardBenchResult, rewardbench
from plaudit.evaluation.running import Progress, pick_device, say
from plaudit.evaluation.scoring import ModelScorer, read_scores, write_scores

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel

Rows = list[list[float | None]]


def evaluate_reward(config: EvaluateRewardConfig, *, dry_run: bool = False) -> RewardReport | None:
    """Measure reward models and write `report.html`, `report.json`, CSV tables, plots and scores.

    Args:
        config: which models, which data, how.
        dry_run: read the data, say what would be measured, and stop; returns None.

    Returns:
        The report, with every evaluation, as Python objects.

    Raises:
        ValueError: for data, scores or models that do not fit, with what to change.
    """
    comparisons, read = _read(config.data, config)
    options = EvaluationOptions(
        cluster_by=config.cluster_by, tie_threshold=config.tie_threshold, bins=config.bins,
        resamples=config.resamples, confidence=config.confidence, seed=config.seed, examples=config.examples,
    )  # fmt: skip
    judged = judge(comparisons, cluster_by=config.cluster_by, tie_threshold=config.tie_threshold)
    if dry_run:
        counts = judged.counts()
        say("; ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in {**read, **counts}.items()))
        say(f"would score {counts['completions']:,} completions with each of {len(config.models)} models")
        return None
    _require_answerable(judged, comparisons, config)
    config.output.mkdir(parents=True, exist_ok=True)  # a place that cannot be written to shows before the work
    notes: list[str] = []
    scores: dict[str, Rows] = {}
    probes: dict[str, list[ProbeResult]] = {}
    for name, place in config.named_sources()[: len(config.models)]:
        scores[name], probes[name], unscored = _score_with_model(name, place, comparisons, config)
        notes.extend(f"{name} could not score {count:,} completions: {why}." for why, count in unscored.items())
    for name, place in config.named_sources()[len(config.models) :]:
        scores[name] = read_scores(Path(place), comparisons)
    floors = _floors(comparisons, config)
    notes.append(floors.note)
    found = evaluate_models(comparisons, {**scores, **floors.scores}, options=options)
    report = RewardReport(
        title="How good is the reward model?" if len(scores) == 1 else "Which reward model is better?",
        models=found[: len(scores)],
        floors=found[len(scores) :],
        differences=compare(found, confidence=config.confidence),
        probes={name: results for name, results in probes.items() if results},
        rewardbench=_benchmarks(config, comparisons, scores),
        data={
            "data": ", ".join(config.data),
            **read,
            "intervals redraw each": judged.cluster_by,
        },
        notes=[note for note in notes if note],
        confidence=config.confidence,
    )
    path = write_report(report, config.output)
    say(summary_text(report))
    say(f"report: {path}")
    return report


def summary_text(report: RewardReport) -> str:
    """The report as a table for the terminal: every metric with its interval, models and floors side by side."""
    everything = [*report.models, *report.floors]
    names = [e.name for e in report.models] + [f"floor: {e.name}" for e in report.floors]
    lines = [["metric", *names]]
    for metric in METRICS:
        if any(e.metrics[metric].count for e in everything):
            cells = [e.metrics[metric] for e in everything]
            bounds = [interval(found, metric) for found in cells]
            values = [number(found.value, metric) for found in cells]
            lines.append([metric, *(f"{v} ({b})" if b else v for v, b in zip(values, bounds, strict=True))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    for name, result in report.rewardbench.items():
        score = "incomplete" if result.score is None else with_interval(result, "score", result.score)
        parts = ", ".join(f"{name} {with_interval(result, name, value)}" for name, value in result.sections.items())
        text.append(f"RewardBench {result.version}, {name}: {score} ({parts})")
    text.extend(report.notes)
    text.extend(verdict(model, report.floors, report.differences, report.confidence) for model in report.models)
    return "\n".join(text)


def with_interval(result: RewardBenchResult, name: str, value: float) -> str:
    """A score of the benchmark in words, with its interval where there is one."""
    low, high = result.intervals.get(name, (math.nan, math.nan))
    bounds = interval(Estimate(value, low, high, 1), "accuracy")
    return number(value, "accuracy") + (f" ({bounds})" if bounds else "")


def load_model(place: str, config: EvaluateRewardConfig) -> "RewardModel":
    """Open a reward model in evaluation mode on the configured device."""
    from plaudit.models.reward_model import RewardModel

    device = pick_device(config.device)
    model = RewardModel.from_pretrained(place, dtype=config.dtype)
    if config.too_long is not None:
        model.text_tokeniser.too_long = config.too_long
    return model.to(device).eval()


def read_probes(path: Path | None) -> tuple[Probe, ...]:
    """The English probes, or those of a YAML list of `{name, change, text}`.

    Raises:
        ValueError: naming the file and the entry, if one is not of that form.
    """
    if path is None:
        return ENGLISH_PROBES
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"probe_file: {path}: no such file") from None
    except yaml.YAMLError as error:
        raise ValueError(f"probe_file: {path} is not YAML: {' '.join(str(error).split())}") from error
    changes = ("prefix", "suffix", "replace", "repeat", "repeat_last_sentence", "other_prompt")
    probes = []
    for place, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        known = isinstance(entry, dict) and set(entry) <= {"name", "change", "text"}
        if not known or not entry.get("name") or entry.get("change") not in changes:
            raise ValueError(
                f"{path}: entry {place + 1} is {entry!r}; expected name, change ({', '.join(changes)}), text"
            )
        probes.append(Probe(str(entry["name"]), entry["change"], str(entry.get("text") or "")))
    return tuple(probes)


def _require_answerable(judged: JudgedSet, comparisons: Sequence[Comparison], config: EvaluateRewardConfig) -> None:
    """Find what would end the job after the models have scored everything, before they do."""
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"output: {config.output} is a file; name a folder")
    counts = judged.counts()
    if not counts["pairs"]:
        raise ValueError(
            f"data: none of the {counts['records']:,} comparisons says that one completion is better than another "
            f"({counts['human_ties']:,} pairs are tied); give comparisons with a preference"
        )
    if config.probes and config.models:
        read_probes(config.probe_file)
    for _, place in config.named_sources()[len(config.models) :]:
        read_scores(Path(place), comparisons)
    if config.models:
        from plaudit.models.backbone import require_folder_or_hub_name

        pick_device(config.device)
        for _, place in config.named_sources()[: len(config.models)]:
            require_folder_or_hub_name(place)


def _score_with_model(
    name: str, place: str, comparisons: Sequence[Comparison], config: EvaluateRewardConfig
) -> tuple[Rows, list[ProbeResult], Counter[str]]:
    """Scores of one model, written to the output folder, and its probes; the model is let go of afterwards."""
    scorer = ModelScorer(
        load_model(place, config),
        token_budget=config.token_budget,
        progress=Progress(name, len(comparisons), "prompts scored"),
    )
    scores = scorer([c.prompt for c in comparisons], [c.completions for c in comparisons])
    unscored = Counter(scorer.unscored)
    if sum(unscored.values()) == sum(len(row) for row in scores):
        raise ValueError(f"{name} could not score a single completion: {'; '.join(unscored)}")
    write_scores(config.output / "scores" / f"{name}.jsonl", comparisons, scores)
    if not config.probes:
        return scores, [], unscored
    scorer.progress = None
    results = run_probes(
        comparisons, scorer, probes=read_probes(config.probe_file), limit=config.probe_limit,
        cluster_by=config.cluster_by, tie_threshold=config.tie_threshold, resamples=config.resamples,
        confidence=config.confidence, seed=config.seed,
    )  # fmt: skip
    return scores, results, unscored


def _read(sources: Sequence[str], config: EvaluateRewardConfig) -> tuple[list[Comparison], dict[str, int]]:
    """All comparisons of the sources, and how many rows were read, used and refused."""
    records: list[Comparison] = []
    tally: Counter[str] = Counter()
    for source in sources:
        result = read_comparisons(
            source, format=config.format, on_error=config.on_error, annotators=config.annotators,
            limit=config.limit, group_key=config.group_key, subset_key=config.subset_key,
        )  # fmt: skip
        records.extend(result.records)
        tally.update({"rows_read": result.read, "rows_used": result.used})
        tally.update({f"rows_refused_{reason.replace(' ', '_')}": count for reason, count in result.refused.items()})
    return records, dict(tally)


def _floors(comparisons: Sequence[Comparison], config: EvaluateRewardConfig) -> Floors:
    train = _read(config.train_data, config)[0] if config.train_data else None
    return reward_floors(comparisons, train, names=config.floors, folds=config.floor_folds, seed=config.seed)


def _benchmarks(
    config: EvaluateRewardConfig, comparisons: Sequence[Comparison], scores: dict[str, Rows]
) -> dict[str, RewardBenchResult]:
    if config.rewardbench is None:
        return {}
    found = {}
    for name, rows in scores.items():
        whole = [_complete(comparison, row) for comparison, row in zip(comparisons, rows, strict=True)]
        found[name] = rewardbench(
            config.rewardbench, comparisons, whole, cluster_by=config.cluster_by, resamples=config.resamples,
            confidence=config.confidence, seed=config.seed,
        )  # fmt: skip
    return found


def _complete(comparison: Comparison, row: Sequence[float | None]) -> list[float]:
    """The scores of a record; one that the model could not read in full counts as lost: chosen 0, rejected 1."""
    if None not in row:
        return [float(value) for value in row if value is not None]
    chosen = tiers_of(comparison.judgement, len(comparison.completions))[0]
    return [0.0 if slot in chosen else 1.0 for slot in range(len(row))]
