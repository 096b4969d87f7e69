"""The demo end to end at a small size: every stage's output is there and says what it should."""

import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from plaudit.configs.demo import DemoConfig
from plaudit.data.io import read_comparisons
from plaudit.data.packing import pack_groups
from plaudit.demo.pipeline import (
    MARKER,
    STAGES,
    DemoRun,
    _clear,
    fine_tune,
    fine_tune_settings,
    main,
    make_world,
    num_heads,
)
from plaudit.demo.report import closing_lines
from plaudit.demo.world import World
from plaudit.evaluation.policy_compare import TILT
from plaudit.models.policy import LanguagePolicy
from plaudit.models.reward_model import RewardModel
from plaudit.training.run import Run

SMALL = {
    "letter_book": 200,
    "demonstrations": 60,
    "rankings": 40,
    "test_rankings": 20,
    "vocabulary": 500,
    "hidden_size": 32,
    "layers": 1,
    "sft_epochs": 1.0,
    "reward_epochs": 1.0,
    "iterations": 3,
    "prompts_per_iteration": 4,
    "max_new_tokens": 12,
    "test_prompts": 6,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    found = main(DemoConfig(output=tmp_path_factory.mktemp("demo") / "run", **SMALL))
    assert found is not None
    return found


def test_every_stage_ran_and_the_summary_holds_the_numbers_of_the_report(run: DemoRun) -> None:
    assert list(run.seconds) == list(STAGES)
    summary = json.loads(run.file("summary.json").read_text())
    assert run.report is not None
    assert run.optimum is not None
    assert summary["accuracy"] == run.report.models[0].metrics["accuracy"].value
    assert summary["bayes_optimal_accuracy"] == run.optimum.accuracy
    assert set(summary["floors"]) == {"length", "bag_of_words"}
    assert 0.7 < summary["bayes_optimal_accuracy"] < 1


def test_the_page_is_whole_and_self_contained(run: DemoRun) -> None:
    assert run.page is not None
    page = run.page.read_text()
    for title in ("Did it help?", "How good is the reward model?", "One letter and its replies", "What it took"):
        assert title in page
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert {"In short: the policies", "In short: the reward model"} <= set(titles)
    assert len(set(titles)) == len(titles)
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//|@import|url\((?!#)""", page)
    assert run.file("accuracy.png").stat().st_size > 5_000


def test_demonstrations_score_zero_on_average_with_the_saved_model(run: DemoRun) -> None:
    assert run.reward_model is not None
    model = RewardModel.from_pretrained(run.reward_model.model_folder)  # type: ignore[arg-type]
    scored = model.score([d.prompt for d in run.demonstrations], [[d.completion] for d in run.demonstrations])
    assert sum(float(result.normalised[0]) for result in scored) / len(scored) == pytest.approx(0, abs=1e-4)
    assert math.sqrt(sum(float(r.raw[0]) ** 2 for r in scored) / len(scored)) > 1e-3


def test_no_prompt_is_on_both_sides(run: DemoRun) -> None:
    train, test = (read_comparisons(run.file(f"data/{name}.jsonl")).records for name in ("train", "test"))
    assert (len(train), len(test)) == (40, 20)
    assert not {c.prompt for c in train} & {c.prompt for c in test}


def test_the_last_lines_say_accuracy_gold_win_rate_divergence_and_the_page(run: DemoRun) -> None:
    assert run.report is not None
    assert run.optimum is not None
    assert run.comparison is not None
    model, floors = run.report.models[0].metrics["accuracy"], {f.name: f.metrics["accuracy"] for f in run.report.floors}
    accuracy, gold, wins, page = closing_lines(run)
    assert f"held-out pair accuracy {100 * model.value:.1f} %" in accuracy
    assert f"Bayes optimum of the noisy annotators {100 * run.optimum.drawn_accuracy:.1f} %" in accuracy
    assert f"bag of words {100 * floors['bag_of_words'].value:.1f} %" in accuracy
    before, after = run.comparison.start.metrics, run.comparison.policies["PPO/3"].metrics
    assert f"{before['reward/gold'].value:+.2f} before, {after['reward/gold'].value:+.2f} after PPO" in gold
    assert "best of 4" in gold
    assert "best of 16" in gold
    assert f"{100 * after['win_rate/gold'].value:.1f} %" in wins
    assert f"KL {after['kl'].value:.1f} nats" in wins
    assert str(run.page) in page


def test_half_of_the_ranked_replies_are_the_models_own(run: DemoRun) -> None:
    alone = run.world.comparisons(40)
    ours = {text for record in alone for text in record.completions}
    for record in run.train:
        assert 4 <= len(record.completions) <= 9
        assert sum(text not in ours for text in record.completions) >= 1
    assert [record.prompt for record in run.train] == run.world.comparison_prompts(40)


def test_the_frontier_holds_the_way_of_the_policy_best_of_n_and_the_tilt(run: DemoRun) -> None:
    assert run.comparison is not None
    points = run.comparison.comparison.points
    labels = [point.label for point in points if point.run != TILT]
    assert labels == ["n = 1", "n = 2", "n = 4", "n = 8", "n = 16", "PPO/3", "PPO/1", "PPO/2"]
    assert [round(point.kl.value, 3) for point in points if point.run == TILT][:3] == [0.1, 0.25, 0.5]
    assert run.file("frontier.png").stat().st_size > 5_000
    summary = json.loads(run.file("summary.json").read_text())
    assert summary["gold_reward"]["after"] == run.comparison.policies["PPO/3"].metrics["reward/gold"].value


def test_a_second_demo_replaces_the_first_and_other_folders_are_refused(run: DemoRun, tmp_path: Path) -> None:
    assert run.file(MARKER).exists()
    demo, own = tmp_path / "demo", tmp_path / "own"
    for folder in (demo, own):
        (folder / "data").mkdir(parents=True)
        (folder / "data" / "demonstrations.jsonl").write_text("{}")
    (demo / MARKER).touch()
    _clear(demo)
    assert sorted(path.name for path in demo.rglob("*")) == ["data", MARKER]
    with pytest.raises(ValueError, match="no demo"):
        main(DemoConfig(output=own, **SMALL))
    assert (own / "data" / "demonstrations.jsonl").exists()


@pytest.mark.parametrize(("width", "heads"), [(16, 1), (64, 1), (80, 1), (192, 3), (208, 2), (256, 4), (304, 4)])
def test_heads_divide_the_width(width: int, heads: int) -> None:
    assert num_heads(width) == heads


def test_random_weights_are_as_wide_as_the_width_asks_unless_said_otherwise(run: DemoRun, tmp_path: Path) -> None:
    def spread(**options: Any) -> float:
        other = DemoRun(DemoConfig(output=tmp_path / "run", **SMALL | options), run.world)
        folder = fine_tune_settings(other)["model"]["backbone_config"]
        return float(folder["initializer_range"])

    assert spread() == pytest.approx(32**-0.5)
    assert spread(hidden_size=64) == pytest.approx(1 / 8)
    assert spread(initial_spread=0.02) == 0.02
    assert run.policy is not None
    assert run.policy.model.model.config.initializer_range == pytest.approx(32**-0.5)


@pytest.mark.slow
def test_the_fine_tuned_model_answers_the_letter_that_it_was_sent(tmp_path: Path) -> None:
    """Letters with replies to others are much less likely: a minute. It was 0.05 nats a token with weights of 0.02."""
    demo = DemoRun(DemoConfig(output=tmp_path / "run", seed=10), World(10))
    (tmp_path / "run/data").mkdir(parents=True)
    make_world(demo)
    fine_tune(demo)
    assert demo.policy is not None
    book = demo.world.letter_book(60, "test")
    model = demo.policy.model

    def loss(shift: int) -> float:
        prompts = [book[(place + shift) % len(book)].prompt for place in range(len(book))]
        tokeniser = model.text_tokeniser()
        groups = [tokeniser.group(prompt, [each.completion]) for prompt, each in zip(prompts, book, strict=True)]
        with torch.no_grad():
            return -float(LanguagePolicy(model).evaluate(pack_groups(groups, causal=True)).logprobs.mean())

    assert loss(1) - loss(0) > 0.2


def test_a_stopped_stage_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def update_and_strike(self: Run, *arguments: Any, **options: Any) -> None:
        update(self, *arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)

    update = Run.update
    monkeypatch.setattr(Run, "update", update_and_strike)
    with pytest.raises(SystemExit, match="130"):
        main(DemoConfig(output=tmp_path / "run", **SMALL))
    assert not (tmp_path / "run/reward").exists()
