"""The demo's page: what PPO brought, the reward model beside the optimum, one ranking to read, both evaluations."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from plaudit.data.pages import (
    COLOURS,
    GRID,
    INK,
    Section,
    Tile,
    new_figure,
    page,
    percent,
    plot,
    quote,
    table,
    tiles,
)
from plaudit.data.records import prompt_text
from plaudit.demo.world_gold import gold_reward
from plaudit.evaluation.intervals import Estimate
from plaudit.evaluation.policy_compare import BEST_OF_N
from plaudit.evaluation.policy_report import policy_sections
from plaudit.evaluation.report import reward_sections

if TYPE_CHECKING:
    from plaudit.demo.pipeline import DemoRun


def write_demo_report(run: "DemoRun") -> Path:
    """Write `report.html`, two pictures and `summary.json` into the demo's folder; returns the page's path."""
    assert run.report is not None
    assert run.comparison is not None
    bars, rows = accuracy_figure(run)
    bars.savefig(run.file("accuracy.png"), dpi=160, facecolor="white")
    run.comparison.plots["frontier"].figure.savefig(run.file("frontier.png"), dpi=160, facecolor="white")
    policies, rewards = policy_sections(run.comparison), reward_sections(run.report)
    twice = {section.title for section in policies} & {section.title for section in rewards}
    sections = [
        outcome_section(run),
        *_retitled(policies, twice, "the policies"),
        headline_section(run, bars, rows),
        gold_section(run),
        example_section(run),
        time_section(run),
        *_retitled(rewards, twice, "the reward model"),
    ]
    subtitle = "Letters to the shop of Puddle & Finch, ranked by five simulated annotators, one of them careless"
    path = run.file("report.html")
    path.write_text(page("From rankings to a better policy", sections, subtitle=subtitle), encoding="utf-8")
    run.file("summary.json").write_text(json.dumps(summary(run), indent=1) + "\n", encoding="utf-8")
    return path


def closing_lines(run: "DemoRun") -> list[str]:
    """What the demo prints in the end: accuracy beside the optimum, gold before and after, win rate, KL, the page."""
    assert run.report is not None
    assert run.optimum is not None
    accuracy = run.report.models[0].metrics["accuracy"]
    floors = ", ".join(
        f"{f.name.replace('_', ' ')} {100 * f.metrics['accuracy'].value:.1f} %" for f in run.report.floors
    )
    before, after, gain, wins, kl = _outcome(run)
    chosen = _best_of(run)
    return [
        f"reward model: held-out pair accuracy {100 * accuracy.value:.1f} % ({100 * accuracy.low:.1f} to "
        f"{100 * accuracy.high:.1f}); Bayes optimum of the noisy annotators {100 * run.optimum.drawn_accuracy:.1f} %; "
        f"floors: {floors}",
        f"gold reward: {before.value:+.2f} before, {after.value:+.2f} after PPO (gain {gain.value:+.2f}, "
        f"{gain.low:+.2f} to {gain.high:+.2f}); best of 4 {chosen[4]:+.2f}, best of 16 {chosen[16]:+.2f}",
        f"win rate against the fine-tuned model by gold: {100 * wins.value:.1f} % ({100 * wins.low:.1f} to "
        f"{100 * wins.high:.1f}); KL {kl.value:.1f} nats per answer",
        f"demo: {sum(run.seconds.values()):.0f} s; open {run.page}",
    ]


def outcome_section(run: "DemoRun") -> Section:
    """What the whole chain brought, in four numbers."""
    before, after, gain, wins, kl = _outcome(run)
    chosen = _best_of(run)
    body = tiles(
        [
            Tile(
                f"{before.value:+.2f} → {after.value:+.2f}", "gold reward", f"gain {gain.low:+.2f} to {gain.high:+.2f}"
            ),
            Tile(percent(wins.value), "answers better by gold", f"{percent(wins.low)} to {percent(wins.high)}"),
            Tile(f"{kl.value:.1f}", "nats per answer from the start", "KL divergence, estimated from samples"),
            Tile(
                f"{chosen[4]:+.2f}", "best of 4 of the start", f"best of 16: {chosen[16]:+.2f}, sixteen times the work"
            ),
        ]
    )
    intro = (
        "A small decoder learned to answer letters, people ranked some answers, a reward model learned from the "
        "rankings, and PPO improved the decoder by that reward model alone. Gold is what an answer is really worth in "
        "this made-up world; nobody learned from it."
    )
    return Section("Did it help?", body, intro=intro)


def summary(run: "DemoRun") -> dict[str, object]:
    """The demo's main numbers: the reward model beside the optimum and the floors, the policies, and times."""
    assert run.report is not None
    assert run.optimum is not None
    assert run.reward_model is not None
    model = run.report.models[0]
    rewards, gold = _rewards_and_gold(run)
    normalisation = run.reward_model.normalisation
    before, after, gain, wins, kl = _outcome(run)
    return {
        "accuracy": model.metrics["accuracy"].value,
        "log_loss": model.metrics["log_loss"].value,
        "bayes_optimal_accuracy": run.optimum.accuracy,
        "bayes_optimal_accuracy_on_these_labels": run.optimum.drawn_accuracy,
        "gold_accuracy_on_these_labels": run.optimum.drawn_gold_accuracy,
        "bayes_optimal_log_loss": run.optimum.log_loss,
        "floors": {floor.name: floor.metrics["accuracy"].value for floor in run.report.floors},
        "rank_correlation_with_gold": float(spearmanr(rewards, gold).statistic),
        "normalisation": None if normalisation is None else {"mean": normalisation.mean, "std": normalisation.std},
        "gold_reward": {
            "before": before.value,
            "after": after.value,
            "gain": [gain.value, gain.low, gain.high],
            **{f"best_of_{n}": value for n, value in _best_of(run).items()},
        },
        "win_rate": [wins.value, wins.low, wins.high],
        "kl": [kl.value, kl.low, kl.high],
        "seconds": run.seconds,
    }


def accuracy_figure(run: "DemoRun") -> tuple[Figure, list[tuple[str, float]]]:
    """Bars of held-out pair accuracy: floors, reward model, and the most that noise allows; the numbers beside it."""
    assert run.report is not None
    assert run.optimum is not None
    model = run.report.models[0].metrics["accuracy"]
    rows = [(f"floor: {f.name.replace('_', ' ')}", f.metrics["accuracy"].value) for f in reversed(run.report.floors)]
    rows += [("reward model", model.value), ("best possible", run.optimum.drawn_accuracy)]
    figure, (axes,) = new_figure(7.2, 0.7 + 0.42 * len(rows))
    colours = [GRID] * (len(rows) - 2) + [COLOURS[0], COLOURS[2]]
    axes.barh(range(len(rows)), [100 * value for _, value in rows], color=colours, height=0.62)
    error = np.array([[100 * (model.value - model.low)], [100 * (model.high - model.value)]])
    axes.errorbar([100 * model.value], [len(rows) - 2], xerr=error, color=INK, capsize=3, linewidth=1)
    for place, (_, value) in enumerate(rows):
        axes.text(51, place, f"{100 * value:.1f} %", va="center", color=INK)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_xlim(50, 100)
    axes.set_xlabel("pairs of replies ordered as the annotators did, % (50 is guessing)")
    return figure, rows


def headline_section(run: "DemoRun", bars: Figure, rows: list[tuple[str, float]]) -> Section:
    """Accuracy beside the optimum and the floors."""
    assert run.report is not None
    assert run.optimum is not None
    model, floors = run.report.models[0], {f.name: f for f in run.report.floors}
    accuracy, loss = model.metrics["accuracy"], model.metrics["log_loss"]
    words = floors["bag_of_words"].metrics["accuracy"].value
    body = tiles(
        [
            Tile(percent(accuracy.value), "pair accuracy", f"{percent(accuracy.low)} to {percent(accuracy.high)}"),
            Tile(
                percent(run.optimum.drawn_accuracy), "best possible here", "the annotators disagree and one is careless"
            ),
            Tile(
                percent(words),
                "bag-of-words floor",
                f"length alone: {percent(floors['length'].metrics['accuracy'].value)}",
            ),
            Tile(f"{loss.value:.3f}", "log-loss, nats", f"best possible {run.optimum.log_loss:.3f}; guessing 0.693"),
        ]
    )
    caption = (
        "Held-out pairs from prompts that were never seen. “Best possible” knows the annotators' tastes and noise."
    )
    body += plot(bars, caption, name="accuracy", columns=("who", "accuracy"), rows=rows)
    intro = (
        "A small decoder was trained from nothing on the shop's letter book, where every other reply is a good one, "
        "then on how people ranked 4 to 9 replies a letter. "
        "Because this world is made up, it is known how well any reward model could foretell its noisy annotators."
    )
    return Section("How good is the reward model?", body, intro=intro)


def gold_section(run: "DemoRun") -> Section:
    """Rewards against the gold reward that the model never saw."""
    rewards, gold = _rewards_and_gold(run)
    figure, (axes,) = new_figure(6.4, 3.6)
    axes.scatter(gold, rewards, s=6, alpha=0.35, color=COLOURS[0], linewidths=0)
    axes.axhline(0, color=GRID, linewidth=1)
    axes.set_xlabel("gold reward, which the model never saw")
    axes.set_ylabel("reward of the model")
    caption = (
        f"Every reply of the test rankings. Spearman's ρ = {spearmanr(rewards, gold).statistic:.3f}. "
        "The line at 0 is an average demonstration."
    )
    rows = zip(gold.tolist(), rewards.tolist(), strict=True)
    return Section(
        "Does it see what matters?", plot(figure, caption, name="gold", columns=("gold", "reward"), rows=rows)
    )


def example_section(run: "DemoRun") -> Section:
    """The first test ranking with five or more replies, best reward first."""
    comparison = next((c for c in run.test if len(c.completions) >= 5), run.test[0])
    rewards = _score(run, [str(comparison.prompt)], [list(comparison.completions)])[0]
    places: dict[int, int] = {}
    for tier, members in enumerate(getattr(comparison.judgement, "tiers", ())):
        places |= dict.fromkeys(members, tier + 1)
    order = sorted(range(len(rewards)), key=lambda k: -rewards[k])
    rows = [
        (
            rewards[k],
            gold_reward(comparison.prompt, comparison.completions[k]),
            places.get(k),
            comparison.completions[k],
        )
        for k in order
    ]
    columns = ("reward", "gold", f"{comparison.annotator}'s place", "reply")
    return Section("One letter and its replies", quote(prompt_text(comparison.prompt)) + table(columns, rows))


def time_section(run: "DemoRun") -> Section:
    """Seconds by stage, and the sizes behind them."""
    assert run.policy is not None
    assert run.reward_model is not None
    rows: list[tuple[str, object]] = [(name.replace("_", " "), f"{s:.1f} s") for name, s in run.seconds.items()]
    parameters = sum(p.numel() for p in run.reward_model.model.parameters())
    rows += [
        ("parameters of the reward model", f"{parameters:,}"),
        ("tokens seen in fine-tuning", f"{run.policy.tokens:,}"),
        ("tokens seen in reward training", f"{run.reward_model.tokens:,}"),
        ("command", f"plaudit demo --seed {run.config.seed}"),
    ]
    return Section("What it took", table(("what", "value"), rows))


def _retitled(sections: Sequence[Section], twice: set[str], about: str) -> list[Section]:
    """Sections of what could be a page of its own; a title that another page has too says what it is about."""
    return [replace(each, title=f"{each.title}: {about}") if each.title in twice else each for each in sections]


def _outcome(run: "DemoRun") -> tuple[Estimate, Estimate, Estimate, Estimate, Estimate]:
    """Gold reward before and after, its gain, the win rate by gold, and the divergence per answer."""
    assert run.comparison is not None
    start, aligned = run.comparison.comparison.start, run.comparison.comparison.policies[0]
    return (
        start.metrics["reward/gold"],
        aligned.metrics["reward/gold"],
        aligned.differences["reward/gold"],
        aligned.metrics["win_rate/gold"],
        aligned.metrics["kl"],
    )


def _best_of(run: "DemoRun") -> dict[int, float]:
    """Gold reward of the reward model's favourite of n answers of the fine-tuned model, by n."""
    assert run.comparison is not None
    points = [point for point in run.comparison.comparison.points if point.run == BEST_OF_N]
    return {int(point.label.partition("= ")[2]): point.values["gold"].value for point in points}


def _score(run: "DemoRun", prompts: list[str], completions: list[list[str]]) -> list[list[float]]:
    assert run.reward_model is not None
    return [result.normalised.tolist() for result in run.reward_model.model.score(prompts, completions)]


def _rewards_and_gold(run: "DemoRun") -> tuple[np.ndarray, np.ndarray]:
    """`[n]` normalised rewards and gold rewards of every reply of the test rankings."""
    prompts = [str(comparison.prompt) for comparison in run.test]
    scored = _score(run, prompts, [list(comparison.completions) for comparison in run.test])
    gold = [gold_reward(c.prompt, text) for c in run.test for text in c.completions]
    return np.array([value for row in scored for value in row]), np.array(gold)
