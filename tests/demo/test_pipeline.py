"""The demo end to end at a small size: every stage's output is there and says what it should."""

import json
import math
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from plaudit.configs.demo import DemoConfig
from plaudit.data.io import read_comparisons
from plaudit.demo.best_of import BestOf
from plaudit.demo.pipeline import MARKER, STAGES, DemoRun, _clear, headline, main, num_heads
from plaudit.models.reward_model import RewardModel
from plaudit.training.run import Run

SMALL = {
    "demonstrations": 60,
    "rankings": 40,
    "test_rankings": 20,
    "vocabulary": 500,
    "hidden_size": 32,
    "layers": 1,
    "sft_epochs": 1.0,
    "reward_epochs": 1.0,
    "best_of_prompts": 2,
    "best_of": 2,
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
    for title in ("How good is it?", "One letter and its replies", "Does it pick better answers?", "What it took"):
        assert title in page
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


def test_the_headline_is_printed_beside_optimum_and_floors(run: DemoRun) -> None:
    assert run.report is not None
    assert run.optimum is not None
    model, floors = run.report.models[0].metrics["accuracy"], {f.name: f.metrics["accuracy"] for f in run.report.floors}
    line = headline(run)
    assert f"held-out pair accuracy {100 * model.value:.1f} %" in line
    assert f"{100 * run.optimum.drawn_accuracy:.1f} % on these labels, {100 * run.optimum.accuracy:.1f} % exp" in line
    assert f"length {100 * floors['length'].value:.1f} %" in line
    assert f"bag of words {100 * floors['bag_of_words'].value:.1f} %" in line


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


def test_best_of_means_by_hand() -> None:
    found = BestOf(["a", "b"], [["x", "y"], ["u", "v"]], [[0.1, 0.2], [3.0, -1.0]], [[5.0, 1.0], [2.0, 4.0]])
    assert found.mean_gold == 3.0
    assert found.chosen_gold == (1.0 + 2.0) / 2
    assert found.best_gold == (5.0 + 4.0) / 2


def test_a_stopped_stage_ends_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def update_and_strike(self: Run, *arguments: Any, **options: Any) -> None:
        update(self, *arguments, **options)
        os.kill(os.getpid(), signal.SIGINT)

    update = Run.update
    monkeypatch.setattr(Run, "update", update_and_strike)
    with pytest.raises(SystemExit, match="130"):
        main(DemoConfig(output=tmp_path / "run", **SMALL))
    assert not (tmp_path / "run/reward").exists()
