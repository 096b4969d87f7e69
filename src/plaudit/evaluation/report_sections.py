"""The sections of a report on reward models: what each number means is said where it stands."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from plaudit.data.pages import Section, Tile, details, key_values, paragraph, quote, side_by_side, table, tiles
from plaudit.data.pages import plot as embed_plot
from plaudit.evaluation.evaluate import PairedDifference, RewardEvaluation, WrongExample
from plaudit.evaluation.intervals import Estimate
from plaudit.evaluation.plots import Plot
from plaudit.evaluation.probes import ProbeResult
from plaudit.evaluation.reward_statistics import METRICS
from plaudit.evaluation.rewardbench import RewardBenchResult

#: Metrics that are shares and read best in percent; `share` stands for any other.
SHARES = frozenset(
    {
        *("accuracy", "prompt_accuracy", "best_of_k_accuracy"),
        *("accuracy_shorter_preferred", "accuracy_longer_preferred", "share"),
    }
)


#: Metrics as they are written for people, where that is more than the name without underscores.
LABELS = {
    "prompt_accuracy": "accuracy by prompt",
    "best_of_k_accuracy": "best-of-K accuracy",
    "log_loss": "log-loss",
    "scaled_log_loss": "log-loss, scaled",
    "brier": "Brier score",
    "kendall_tau": "Kendall τ",
    "ndcg": "NDCG",
    "accuracy_shorter_preferred": "accuracy, shorter preferred",
    "accuracy_longer_preferred": "accuracy, longer preferred",
    "length_partial_correlation": "length correlation, partial",
}


def metric_label(metric: str) -> str:
    """A metric's name as people read it, with an arrow towards better."""
    arrow = {True: " ↑", False: " ↓", None: ""}[METRICS[metric][1]]
    return LABELS.get(metric, metric.replace("_", " ")) + arrow


def embed(plot: Plot) -> str:
    """A plot for the page, with a link to its numbers."""
    return embed_plot(plot.svg, plot.caption, name=plot.name, columns=plot.columns, rows=plot.rows)


def number(value: float, metric: str = "", *, signed: bool = False, unit: bool = True) -> str:
    """A metric as it is read: shares in percent (differences of them in points), everything else to three places."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    shown, places = (100 * value, 1) if metric in SHARES else (value, 3)
    shown = round(shown, places) + 0.0  # no minus before a zero
    text = f"{shown:{'+' if signed else ''}.{places}f}".replace("-", "−")
    return text + " %" if metric in SHARES and unit and not signed else text


def interval(found: Estimate, metric: str = "", *, signed: bool = False) -> str:
    """`low to high`, or nothing where there is no interval."""
    if math.isnan(found.low) or math.isnan(found.high):
        return ""
    return " to ".join(number(bound, metric, signed=signed, unit=False) for bound in (found.low, found.high))


def cell(found: Estimate, metric: str = "", *, signed: bool = False) -> Markup:
    """A number with its interval underneath, for a table."""
    value, bounds = number(found.value, metric, signed=signed), interval(found, metric, signed=signed)
    plain = Markup(f'<span style="font-variant-numeric:tabular-nums;white-space:nowrap">{escape(value)}</span>')
    return plain + (_small(bounds) if bounds else Markup(""))


def _small(text: str) -> Markup:
    return Markup(f'<br><span class="note" style="font-size:.82em;white-space:nowrap">{escape(text)}</span>')


def plain_cell(value: float, metric: str = "", *, signed: bool = False) -> Markup:
    """A number without interval, never broken over two lines."""
    return Markup(f'<span style="white-space:nowrap">{escape(number(value, metric, signed=signed))}</span>')


def summary_section(
    models: Sequence[RewardEvaluation],
    floors: Sequence[RewardEvaluation],
    differences: Sequence[PairedDifference],
    plots: Mapping[str, Plot],
    confidence: float,
) -> Section:
    """The headline: what the first model can do, whether it beats the floors, and the forest plot."""
    first = models[0]
    found = first.metrics
    shown = [
        ("accuracy", "pair accuracy"),
        ("best_of_k_accuracy", "best-of-K accuracy"),
        ("log_loss", "log-loss (0.693: no idea)"),
        ("calibration_error", f"calibration error (chance: {number(first.calibration_noise)})"),
        ("temperature", "temperature (1: calibrated)"),
        ("kendall_tau", "Kendall τ"),
    ]
    heads = tiles(
        [
            Tile(number(found[metric].value, metric), label, interval(found[metric], metric))
            for metric, label in shown
            if found[metric].count
        ]
    )
    sentences = [verdict(first, floors, differences, confidence)]
    if len(models) > 1:
        sentences.extend(
            _against(d, f"{d.first} is", d.second)
            for d in differences
            if d.metric == "accuracy" and d.second in {m.name for m in models} and d.first in {m.name for m in models}
        )
    body = "".join(paragraph(sentence) for sentence in sentences) + heads + embed(plots["accuracy"])
    return Section("In short", body, f"Tiles show {first.name}." if len(models) > 1 else "")


def verdict(
    model: RewardEvaluation,
    floors: Sequence[RewardEvaluation],
    differences: Sequence[PairedDifference],
    confidence: float = 0.95,
) -> str:
    """One plain sentence: how often the model agrees with people, and whether that is more than a floor knows."""
    accuracy = model.metrics["accuracy"]
    bounds = interval(accuracy, "accuracy")
    sure = f" ({100 * confidence:g} % interval {bounds})" if bounds else ""
    share = number(accuracy.value, "accuracy")
    text = f"{model.name} orders {share} of {accuracy.count:,} judged pairs as people did{sure}."
    against = {d.second: d for d in differences if d.first == model.name and d.metric == "accuracy"}
    for floor in sorted(floors, key=lambda f: -f.metrics["accuracy"].value)[:1]:
        if floor.name in against:
            text += " " + _against(against[floor.name], "It is", f"the best floor, {floor.name.replace('_', ' ')}")
    return text


def _against(difference: PairedDifference, subject: str, other: str) -> str:
    found = difference.difference
    points = f"{number(abs(found.value), 'accuracy', unit=False)} points"
    bounds = f" ({interval(found, difference.metric, signed=True)})" if interval(found) else ""
    if not found.low > 0 and not found.high < 0:
        value = number(found.value, "accuracy", signed=True)
        return f"{subject} not told apart from {other}: the difference is {value} points{bounds}."
    return f"{subject} {points} {'above' if found.value > 0 else 'below'} {other}{bounds}."


def metric_section(models: Sequence[RewardEvaluation], floors: Sequence[RewardEvaluation]) -> Section:
    """Every metric of every model and floor with its interval."""
    everything = [*models, *floors]
    rows = []
    for metric, (meaning, _) in METRICS.items():
        if not any(e.metrics[metric].count for e in everything):
            continue
        label = Markup(f"{escape(metric_label(metric))}<br>") + Markup(
            f'<span class="note" style="font-size:.82em">{escape(meaning)}</span>'
        )
        rows.append((label, *(cell(e.metrics[metric], metric) for e in everything), models[0].metrics[metric].count))
    columns = ("metric", *(m.name for m in models), *(floor_label(f.name) for f in floors), "items")
    ties = models[0].human_ties
    extra = ""
    if ties["pairs"]:
        extra = paragraph(
            f"People tied {ties['pairs']:,.0f} pairs, which count nowhere above. {models[0].name} puts those "
            f"{number(ties['mean_absolute_difference'])} apart on average, and pairs that people told apart "
            f"{number(ties['mean_absolute_difference_untied'])}."
        )
    return Section("Every metric", table(columns, rows) + extra, "↑ more is better, ↓ less is better.")


def difference_section(
    models: Sequence[RewardEvaluation], floors: Sequence[RewardEvaluation], differences: Sequence[PairedDifference]
) -> Section | None:
    """Paired differences between models, and between models and floors: one row per pair, one column per metric."""
    names = [model.name for model in models]
    metrics = list(dict.fromkeys(d.metric for d in differences))
    found = {(d.first, d.second, d.metric): d.difference for d in differences if d.first in names}
    rows = []
    for first, second in dict.fromkeys((first, second) for first, second, _ in found):
        label = second if second in names else floor_label(second)
        rows.append((first, label, *(_decided(found.get((first, second, metric)), metric) for metric in metrics)))
    if not rows:
        return None
    columns = ("model", "against", *(metric_label(metric) for metric in metrics))
    intro = (
        "The model minus what it is held against, with paired intervals: both sides are redrawn with the same "
        "prompts, so what makes a prompt hard cancels out. Accuracies differ in percentage points. "
        "✓ better, ✗ worse, = not told apart."
    )
    return Section("Differences", table(columns, rows), intro)


def _decided(found: Estimate | None, metric: str) -> Markup | str:
    if found is None:
        return "–"
    mark = "="
    if found.low > 0 or found.high < 0:
        mark = "✓" if (found.value > 0) is bool(METRICS[metric][1]) else "✗"
    return Markup(f'<span class="note">{mark}</span> ') + cell(found, metric, signed=True)


def floor_label(name: str) -> str:
    """A floor's name as it is read."""
    return f"floor: {name.replace('_', ' ')}"


def calibration_section(models: Sequence[RewardEvaluation], plots: Mapping[str, Plot]) -> Section:
    """Reliability diagram and what temperature would mend."""
    rows = [
        (
            model.name,
            cell(model.metrics["calibration_error"]),
            plain_cell(model.calibration_noise),
            cell(model.metrics["temperature"]),
            plain_cell(model.metrics["log_loss"].value),
            plain_cell(model.metrics["scaled_log_loss"].value),
        )
        for model in models
    ]
    columns = ("model", "calibration error", "by chance alone", "temperature", "log-loss", "after scaling")
    words = paragraph(
        "By chance alone: the error that a perfectly calibrated model would show on this many pairs. After scaling: "
        "the log-loss once rewards are divided by the temperature, fitted on these same pairs."
    )
    body = side_by_side(embed(plots["reliability"]), table(columns, rows) + words)
    return Section(
        "Does it mean what it says?", body, "A reward difference d promises σ(d): is that how often it holds?"
    )


def breakdown_section(
    models: Sequence[RewardEvaluation], plots: Mapping[str, Plot], kinds: Sequence[str]
) -> Section | None:
    """Accuracy by margin, K, subset, annotator and kind of judgement."""
    drawn = [plots[name] for kind in kinds if (name := f"accuracy_by_{kind.lower()}") in plots]
    long = [plot for plot in drawn if len(plot.rows) > 8 * len(models)]
    short = [embed(plot) for plot in drawn if plot not in long]
    body = "".join(embed(plot) for plot in long) + (side_by_side(*short) if short else "")
    if any(len(model.best_of_k) > 1 for model in models):
        by_size: dict[int, dict[str, Estimate]] = {}
        guesses: dict[int, float] = {}
        for model in models:
            for size, found, chance in model.best_of_k:
                by_size.setdefault(size, {})[model.name] = found
                guesses[size] = chance
        rows = [
            (
                str(size),
                *(cell(found[model.name], "accuracy") for model in models),
                plain_cell(guesses[size], "accuracy"),
                found[models[0].name].count,
            )
            for size, found in sorted(by_size.items())
        ]
        columns = ("K", *(model.name for model in models), "by guessing", "prompts")
        body += table(columns, rows, caption="How often the model's top completion is people's, by K")
    return Section("Where is it right?", body) if body else None


def length_section(models: Sequence[RewardEvaluation], plots: Mapping[str, Plot]) -> Section:
    """Whether the reward is about length."""
    names = (
        "accuracy_shorter_preferred",
        "accuracy_longer_preferred",
        "length_correlation",
        "length_partial_correlation",
    )
    rows = [(model.name, *(cell(model.metrics[name], name) for name in names)) for model in models]
    columns = ("model", "right where shorter was preferred", "where longer was", "correlation", "given people's order")
    intro = (
        "A model that pays for length is right where people preferred the longer completion and wrong where they "
        "preferred the shorter. Correlations are within prompts, with the logarithm of the length in characters."
    )
    return Section("Is it only length?", side_by_side(embed(plots["length"]), table(columns, rows)), intro)


def reward_section(models: Sequence[RewardEvaluation], plots: Mapping[str, Plot]) -> Section:
    """Distributions of rewards."""
    drawn = [plot for name, plot in plots.items() if name.startswith("rewards_")]
    body = "".join(embed(plot) for plot in drawn[:1])
    if len(drawn) > 1:
        body += details(", ".join(model.name for model in models[1:]), "".join(embed(plot) for plot in drawn[1:]))
    return Section("Rewards", body)


def probe_section(probes: Mapping[str, list[ProbeResult]]) -> Section | None:
    """What the model pays for changes that make an answer no better."""
    if not probes:
        return None
    rows = []
    for place, first in enumerate(next(iter(probes.values()))):
        cells: list[Any] = [first.probe]
        for results in probes.values():
            found = results[place]
            rise = Estimate(found.rise_in_spreads, math.nan, math.nan, found.rise.count)
            cells += [cell(rise, signed=True) + _small(f"reward {number(found.rise.value, signed=True)}")]
            cells += [cell(found.win_rate, "accuracy")]
        rows.append((*cells, first.rise.count))
    names = [label for name in probes for label in (f"{name}: rise", f"{name}: wins")]
    intro = (
        "Answers that people preferred, changed so that they are no better (English texts unless others were given). "
        "A sound model pays nothing for flattery, padding and repetition, and far less for an empty, generic or "
        "foreign answer. Rise: how much the reward goes up, in units of the mean reward difference of judged pairs. "
        "Wins: how often the changed answer gets the higher reward."
    )
    return Section("Shortcuts", table(("change", *names, "answers"), rows), intro)


def rewardbench_section(results: Mapping[str, RewardBenchResult]) -> Section | None:
    """Scores by the benchmark's own rules."""
    if not results:
        return None
    version = next(iter(results.values())).version
    sections = list(dict.fromkeys(name for result in results.values() for name in result.sections))

    def shown(result: RewardBenchResult, name: str, value: float | None) -> Markup:
        low, high = result.intervals.get(name, (math.nan, math.nan))
        return cell(Estimate(math.nan if value is None else value, low, high, 1), "accuracy")

    rows = [
        (
            name,
            shown(result, "score", result.score),
            *(shown(result, section, result.sections.get(section)) for section in sections),
        )
        for name, result in results.items()
    ]
    first = next(iter(results.values()))
    subsets = [
        (subset, count, *(shown(r, subset, r.subsets.get(subset, (None,))[0]) for r in results.values()))
        for subset, (_, count) in first.subsets.items()
    ]
    body = table(("model", "score", *sections), rows)
    body += details("every subset", table(("subset", "prompts", *results), subsets))
    intro = "By the benchmark's own rules, which differ from the metrics above in how equal scores count."
    if first.missing:
        intro += f" The data lacks {len(first.missing)} of its subsets: {', '.join(first.missing)}."
    return Section(f"RewardBench {version}", body, intro)


def example_section(models: Sequence[RewardEvaluation]) -> Section | None:
    """The most confidently wrong pairs, readable."""
    parts = []
    for model in models:
        shown = "".join(_example(example, place) for place, example in enumerate(model.examples[:4]))
        if len(model.examples) > 4:
            rest = "".join(_example(example, place + 4) for place, example in enumerate(model.examples[4:]))
            shown += details(f"{len(model.examples) - 4} more", rest)
        if shown:
            parts.append((f"<h3>{escape(model.name)}</h3>" if len(models) > 1 else "") + shown)
    if not parts:
        return None
    intro = (
        "Where the model was surest and people said the opposite: labels that are wrong, or what it has not learned."
    )
    return Section("Most confidently wrong", "".join(parts), intro)


def _example(example: WrongExample, place: int) -> str:
    notes = [f"probability {100 * example.probability:.2g} % for people's choice"]
    notes += [f"{key} {value}" for key, value in (("id", example.id), ("annotator", example.annotator)) if value]
    notes += [example.subset] if example.subset else []
    head = f"<p><strong>{place + 1}.</strong> <span class='note'>{escape(' · '.join(notes))}</span></p>"
    sides = side_by_side(
        _side("People preferred", example.preferred_reward) + quote(example.preferred, limit=700),
        _side("The model preferred", example.other_reward) + quote(example.other, limit=700),
    )
    return head + quote(_tail(example.prompt), limit=900) + sides


def _side(label: str, reward: float) -> str:
    return f"<p style='margin:.2rem 0'>{escape(label)} <span class='note'>reward {number(reward)}</span></p>"


def _tail(prompt: str, limit: int = 880) -> str:
    """The end of a long conversation, which is what was answered."""
    return prompt if len(prompt) <= limit else f"[{len(prompt) - limit} characters before] … {prompt[-limit:]}"


def method_section(
    model: RewardEvaluation, data: Mapping[str, Any], notes: Sequence[str], confidence: float
) -> Section:
    """What was read and how the numbers were made."""
    counted = {key.replace("_", " "): value for key, value in {**data, **model.counts}.items()}
    words = [
        f"Intervals hold {100 * confidence:g} % and come from redrawing whole clusters, because the pairs of one "
        "prompt are not independent. Pairs that people tied are left out and counted; equal scores of the model count "
        "half; a completion that one of the models did not score is left out for all.",
        *notes,
    ]
    return Section("What was measured", key_values(counted) + "".join(paragraph(text) for text in words))
