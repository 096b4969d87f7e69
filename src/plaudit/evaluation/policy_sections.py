"""The sections of a report on policies: what each number means is said where it stands."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from plaudit.data.pages import Section, Tile, details, key_values, paragraph, quote, side_by_side, table, tiles
from plaudit.data.records import Prompt, prompt_text
from plaudit.evaluation.intervals import Estimate
from plaudit.evaluation.plots import Plot
from plaudit.evaluation.policy_compare import BEST_OF_N, PolicyComparison, PolicyEvaluation
from plaudit.evaluation.policy_statistics import METRICS, SHARES
from plaudit.evaluation.report_sections import cell, embed, interval, number


@dataclass(frozen=True)
class SideBySide:
    """One prompt and the first answer of every model to it.

    Attributes:
        prompt: the prompt.
        models: names, the starting model first.
        texts: their answers.
        finished: whether each ended by itself; None where nobody knows.
        rewards: by reward's name one number per model; None where it has nothing to say.
    """

    prompt: Prompt
    models: tuple[str, ...]
    texts: tuple[str, ...]
    finished: tuple[bool | None, ...]
    rewards: Mapping[str, tuple[float | None, ...]]


LABELS = {
    "win_rate_same_length": "win rate at equal length",
    "kl": "KL",
    "kl_k3": "KL by k3",
    "kl_per_token": "KL per token",
    "kl_k3_per_token": "KL per token by k3",
    "self_bleu": "self-BLEU",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
}
"""Metrics as they are written for people, where that is more than the name without underscores."""


def unit(metric: str) -> str:
    """The kind of number that a metric is, for `number`, `interval` and `cell`: shares are read in percent."""
    return "share" if metric.partition("/")[0] in SHARES else ""


def verdict(policy: PolicyEvaluation, comparison: PolicyComparison, confidence: float = 0.95) -> str:
    """One plain sentence: does it win, what does the reward say, at which distance."""
    judge = comparison.judge
    if judge is None:
        return f"{policy.name}: no reward was given, so nothing is said about better or worse."
    win, gain = policy.metrics[f"win_rate/{judge}"], policy.differences[f"reward/{judge}"]
    before, after = comparison.start.metrics[f"reward/{judge}"], policy.metrics[f"reward/{judge}"]
    if not win.count:
        return f"{policy.name}: {judge} has nothing to say about its answers, so there is no verdict."
    sure = f" ({100 * confidence:g} % interval {interval(win, 'share')})" if interval(win) else ""
    bounds = f", {interval(gain, signed=True)}" if interval(gain) else ""
    text = (
        f"{policy.name} wins {number(win.value, 'share')} against the starting model by {judge}{sure}; "
        f"{judge} {number(before.value)} → {number(after.value)} ({number(gain.value, signed=True)}{bounds})"
    )
    kl = policy.metrics.get("kl")
    text += f"; KL {number(kl.value)} nats per answer" if kl is not None else ""
    if win.low > 0.5 and gain.low > 0:
        return text + ": it is better."
    if win.high < 0.5 and gain.high < 0:
        return text + ": it is worse."
    return text + ": not told apart with certainty."


def summary_section(comparison: PolicyComparison, plots: Mapping[str, Plot], confidence: float) -> Section:
    """Headline numbers, the verdicts and the win rates."""
    first, judge = comparison.policies[0], comparison.judge
    wanted: list[tuple[Estimate | None, str, str, bool]] = []
    if judge is not None:
        wanted = [
            (first.metrics[f"win_rate/{judge}"], "share", f"win rate by {judge}", False),
            (first.differences[f"reward/{judge}"], "", f"gain in {judge}", True),
        ]
    wanted += [
        (first.metrics.get("kl"), "", "KL per answer, nats", False),
        (first.differences.get("words"), "", "more words", True),
        (first.metrics.get("unfinished"), "share", "without end of text", False),
    ]
    if judge is not None and comparison.proxy not in (None, judge):
        gain = first.differences[f"reward/{comparison.proxy}"]
        wanted.insert(2, (gain, "", f"gain in {comparison.proxy}", True))
    heads = tiles(
        [
            Tile(number(found.value, kind, signed=sign), label, interval(found, kind, signed=sign))
            for found, kind, label, sign in wanted
            if found is not None
        ]
    )
    body = "".join(paragraph(verdict(policy, comparison, confidence)) for policy in comparison.policies) + heads
    if "win_rate" in plots:
        body += embed(plots["win_rate"])
    return Section("In short", body, f"Tiles show {first.name}." if len(comparison.policies) > 1 else "")


def frontier_section(comparison: PolicyComparison, plots: Mapping[str, Plot]) -> Section | None:
    """Gold against proxy over the distance, the fits, and the best-of-n curve."""
    if "frontier" not in plots:
        return None
    body = embed(plots["frontier"])
    if comparison.fits:
        formulas = {"best_of_n": "d (α − β d)", "reinforcement": "d (α − β log d)"}
        rows = [
            (run, reward, formulas[fit.kind], cell(fit.alpha), cell(fit.beta), cell(fit.peak), fit.error, fit.points)
            for (run, reward), fit in comparison.fits.items()
        ]
        columns = ("run", "reward", "curve", "α", "β", "turns down at d =", "root mean squared error", "points")
        body += table(columns, rows, caption="Least squares through the points of a run; d = √KL.")
    if "best_of_n" in plots:
        body += embed(plots["best_of_n"])
        points = [point for point in comparison.points if point.run == BEST_OF_N]
        names = list(points[0].values)
        lines: list[tuple[Any, ...]] = []
        for point in points:
            values = [cell(point.values[name]) for name in names]
            gains = [cell(point.gains[name], signed=True) for name in names]
            lines.append((point.label, point.kl.value, *values, *gains))
        heads = ("favourite of", "KL, at most", *names, *(f"gain in {name}" for name in names))
        body += details("best of n as a table", table(heads, lines))
    intro = (
        "Whoever optimises a proxy gains at first what is wanted, and later only the proxy. Best of n is what can be "
        "had without training: it lies near the best that is possible at its distance."
    )
    return Section("Was the proxy over-optimised?", body, intro)


def metric_section(comparison: PolicyComparison) -> Section:
    """Every number of every model with its interval, and how it differs from the starting model's."""
    everything = [comparison.start, *comparison.policies]
    names = list(dict.fromkeys(name for evaluation in everything for name in evaluation.metrics))
    names = [name for name in names if any(e.metrics[name].count for e in everything if name in e.metrics)]
    order = list(METRICS)
    names.sort(key=lambda name: order.index(name.partition("/")[0]))
    rows = []
    for name in names:
        kind, _, reward = name.partition("/")
        meaning, better = METRICS[kind]
        arrow = {True: " ↑", False: " ↓", None: ""}[better]
        label = f"{LABELS.get(kind, kind.replace('_', ' '))}{f' by {reward}' if reward else ''}{arrow}"
        head = Markup('{}<br><span class="note" style="font-size:.82em">{}</span>').format(label, meaning)
        rows.append((head, *(_both(evaluation, name) for evaluation in everything)))
    columns = ("", *(evaluation.name for evaluation in everything))
    intro = (
        "With the difference from the starting model, paired by prompt, below each number. ↑ more is better, ↓ less is "
        "better, other things being equal; diversity is measured on the same number of answers for every model."
    )
    return Section("Every number", table(columns, rows), intro)


def _both(evaluation: PolicyEvaluation, name: str) -> Markup | str:
    """A number with its interval, and its difference where there is one."""
    found = evaluation.metrics.get(name)
    if found is None or not found.count:
        return "–"
    kind = unit(name)
    shown = cell(found, kind)
    gap = evaluation.differences.get(name)
    if gap is None or math.isnan(gap.value) or gap.value == gap.low == gap.high == 0:
        return shown
    bounds = interval(gap, kind, signed=True)
    text = f"{number(gap.value, kind, signed=True)}{f' ({bounds})' if bounds else ''}"
    return shown + Markup('<br><span class="note" style="font-size:.82em">Δ {}</span>').format(text)


def distribution_section(plots: Mapping[str, Plot]) -> Section:
    """Rewards and lengths of single answers."""
    drawn = [embed(plots[name]) for name in ("reward_distribution", "lengths") if name in plots]
    return Section("How are they spread?", side_by_side(*drawn))


def example_section(examples: Sequence[SideBySide], judge: str | None) -> Section | None:
    """Answers before and after, side by side."""
    if not examples:
        return None
    parts: list[str] = []
    for example in examples:
        columns = []
        for place, model in enumerate(example.models):
            rewards = [
                f"{name} {'–' if values[place] is None else number(float(values[place] or 0.0))}"
                for name, values in example.rewards.items()
            ]
            cut = ["no end of text"] if example.finished[place] is False else []
            note = escape(" · ".join(rewards + cut))
            head = f"<p style='margin:.2rem 0'>{escape(model)} <span class='note'>{note}</span></p>"
            columns.append(head + quote(example.texts[place] or "(nothing)", limit=900))
        parts.append(
            "<hr>" * bool(parts) + quote(_tail(prompt_text(example.prompt)), limit=900) + side_by_side(*columns)
        )
    chosen = f"evenly from the most improved to the most worsened by {judge}" if judge else "evenly from all prompts"
    intro = f"The first answer of every model to the same prompt, chosen {chosen}, not by hand."
    return Section("Before and after", "".join(parts), intro)


def _tail(prompt: str, limit: int = 880) -> str:
    """The end of a long conversation, which is what was answered."""
    return prompt if len(prompt) <= limit else f"[{len(prompt) - limit} characters before] … {prompt[-limit:]}"


def method_section(data: Mapping[str, Any], notes: Sequence[str], confidence: float) -> Section:
    """What was measured and how."""
    words = [
        f"Intervals hold {100 * confidence:g} % and come from redrawing prompts (or their groups) as a whole, the same "
        "ones for every model. A win rate meets every answer with every answer of the starting model to the same "
        "prompt, ties counting half. The models' draws are independent of each other. An answer that a reward has "
        "nothing to say about is left out and counted. Divergences are sums over tokens of log π − log π_ref (k1) on "
        "the policy's own answers at the sampling temperature.",
        *notes,
    ]
    return Section("What was measured", key_values(data) + "".join(paragraph(text) for text in words))
