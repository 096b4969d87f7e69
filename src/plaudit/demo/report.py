"""The demo's page: the headline beside the optimum, rewards against gold, one ranking to read, the whole evaluation."""

import json
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
    paragraph,
    percent,
    plot,
    quote,
    table,
    tiles,
)
from plaudit.data.records import prompt_text
from plaudit.demo.world_gold import gold_reward
from plaudit.evaluation.report import reward_sections

if TYPE_CHECKING:
    from plaudit.demo.pipeline import DemoRun


def write_demo_report(run: "DemoRun") -> Path:
    """Write `report.html`, `accuracy.png` and `summary.json` into the demo's folder; returns the page's path."""
    assert run.report is not None
    bars, rows = accuracy_figure(run)
    bars.savefig(run.file("accuracy.png"), dpi=160, facecolor="white")
    sections = [
        headline_section(run, bars, rows),
        gold_section(run),
        example_section(run),
        best_of_section(run),
        time_section(run),
        *reward_sections(run.report),
    ]
    subtitle = "Letters to the shop of Puddle & Finch, ranked by five simulated annotators, one of them careless"
    path = run.file("report.html")
    path.write_text(page("From rankings to a reward model", sections, subtitle=subtitle), encoding="utf-8")
    run.file("summary.json").write_text(json.dumps(summary(run), indent=1) + "\n", encoding="utf-8")
    return path


def summary(run: "DemoRun") -> dict[str, object]:
    """The demo's main numbers: held-out pair accuracy and log-loss beside the optimum and the floors, and times."""
    assert run.report is not None
    assert run.optimum is not None
    assert run.best_of is not None
    assert run.reward_model is not None
    model = run.report.models[0]
    rewards, gold = _rewards_and_gold(run)
    normalisation = run.reward_model.normalisation
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
            "policy": run.best_of.mean_gold,
            "chosen_by_reward_model": run.best_of.chosen_gold,
            "best_available": run.best_of.best_gold,
        },
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
        "A small decoder was trained from nothing on good replies, then on how people ranked 4 to 9 replies a letter. "
        "Because this world is made up, it is known how well any reward model could foretell its noisy annotators."
    )
    return Section("How good is it?", body, intro=intro)


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


def best_of_section(run: "DemoRun") -> Section:
    """Gold reward of the policy's answers, and of the one that the reward model likes best."""
    found = run.best_of
    assert found is not None
    n = len(found.gold[0])
    rows = [
        ("a random answer of the fine-tuned model", found.mean_gold),
        (f"the reward model's favourite of {n}", found.chosen_gold),
        (f"the best of {n} by gold", found.best_gold),
    ]
    place = max(range(len(found.prompts)), key=lambda p: max(found.rewards[p]) - min(found.rewards[p]))
    order = sorted(range(n), key=lambda k: -found.rewards[place][k])
    answers = [(found.rewards[place][k], found.gold[place][k], found.answers[place][k]) for k in order]
    body = table(("answer", "mean gold reward"), rows) + paragraph("The letter on which the rewards differ most:")
    body += quote(found.prompts[place]) + table(("reward", "gold", "answer of the fine-tuned model"), answers)
    intro = f"The fine-tuned model answered {len(found.prompts)} letters {n} times each; gold was not used to choose."
    return Section("Does it pick better answers?", body, intro=intro)


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


def _score(run: "DemoRun", prompts: list[str], completions: list[list[str]]) -> list[list[float]]:
    assert run.reward_model is not None
    return [result.normalised.tolist() for result in run.reward_model.model.score(prompts, completions)]


def _rewards_and_gold(run: "DemoRun") -> tuple[np.ndarray, np.ndarray]:
    """`[n]` normalised rewards and gold rewards of every reply of the test rankings."""
    prompts = [str(comparison.prompt) for comparison in run.test]
    scored = _score(run, prompts, [list(comparison.completions) for comparison in run.test])
    gold = [gold_reward(c.prompt, text) for c in run.test for text in c.completions]
    return np.array([value for row in scored for value in row]), np.array(gold)
