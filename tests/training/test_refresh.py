"""Refreshing the reward model during alignment: it learns what is judged, within its budget, and resumes bitwise."""

import json
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from plaudit.configs.align import AlignConfig
from plaudit.configs.refresh import RefreshConfig
from plaudit.data.records import Comparison, Ranking
from plaudit.models.reward_model import RewardModel
from plaudit.rewards.annotators import FunctionAnnotator
from plaudit.rewards.combine import combine
from plaudit.rewards.model import ModelReward
from plaudit.rewards.normalise import Running, normalised
from plaudit.training import align
from plaudit.training import refresh as refreshing
from plaudit.training.align_job import AlignJob
from plaudit.training.refresh import RewardRefresher
from plaudit.training.results import TrainingResult
from plaudit.training.run import Run
from plaudit.training.trackers import read_metrics
from tests.training.conftest import tiny_model
from tests.training.test_align import PROMPTS, count_good, logged, settings, weights

OLD = [
    Comparison(prompt="why is it", completions=("so good", "very bad"), judgement=Ranking(((0,), (1,))), id=f"old{n}")
    for n in range(6)
]


def prefer_good(prompt: Any, completions: Sequence[str]) -> list[float]:
    """One judgement: more `good`, fewer `bad`."""
    return count_good([prompt] * len(completions), completions)


def refreshed(tokenizer: str, output: Path, **options: Any) -> AlignConfig:
    """Six iterations with refreshes before the third and the fifth."""
    block = {
        "every": 2,
        "budget": 7,
        "completions": 4,
        "annotator": f"{__name__}:prefer_good",
        "learning_rate": 1e-2,
        "epochs": 4.0,
        "records_per_step": 2,
        **options.pop("refresh_reward", {}),
    }
    return settings(tokenizer, output, iterations=6, **options, refresh_reward=block)


def fresh_reward(tokenizer: str) -> Any:
    """A reward model with random weights, scaled as in a run, and the truth beside it."""
    model = RewardModel.from_backbone(tiny_model(tokenizer))
    return combine({"proxy": (normalised(model, Running(shift=False)), 1.0), "gold": (count_good, 0.0)})


def run(config: AlignConfig, reward: Any, **options: Any) -> TrainingResult:
    """The job on the tiny prompts."""
    found = align.main(config, prompts=PROMPTS, reward=reward, comparisons=OLD, **options)
    assert isinstance(found, TrainingResult)
    return found


def test_it_asks_within_its_budget_learns_and_freezes_again(tokenizer_folder: str, tmp_path: Path) -> None:
    config = refreshed(tokenizer_folder, tmp_path / "run")
    reward, asked = fresh_reward(tokenizer_folder), []

    def judge(prompt: Any, completions: list[str]) -> list[float]:
        asked.append(len(completions))
        return prefer_good(prompt, completions)

    before = reward.rewards["proxy"].reward.frozen.digest
    result = run(config, reward, annotator=FunctionAnnotator(judge))
    lines = [line for line in read_metrics(result.output / "metrics.jsonl") if "refresh/labels" in line]
    assert [line["step"] for line in lines] == [3, 5]
    assert [line["refresh/asked"] <= most for line, most in zip(lines, (4, 3), strict=True)] == [True, True]
    assert lines[-1]["refresh/labels"] == len(asked) <= 7
    assert all(2 <= count <= 4 for count in asked)
    assert all(line["refresh/accuracy_after"] >= line["refresh/accuracy_before"] for line in lines)
    assert sum(line["refresh/accuracy_after"] for line in lines) / 2 > 0.75
    reward.check()
    assert reward.rewards["proxy"].reward.frozen.digest != before
    learned = RewardModel.from_pretrained(result.output / "reward-model")
    torch.testing.assert_close(learned.head.weight, reward.rewards["proxy"].reward.model.head.weight)
    assert not list((result.output / "refresh").glob("*/checkpoints"))
    assert len(list((result.output / "refresh").glob("*/metrics.jsonl"))) == 2


@pytest.fixture(scope="module")
def whole(tokenizer_folder: str, tmp_path_factory: pytest.TempPathFactory) -> TrainingResult:
    """A run that nothing stopped."""
    return run(refreshed(tokenizer_folder, tmp_path_factory.mktemp("run") / "whole"), fresh_reward(tokenizer_folder))


@pytest.mark.parametrize("start", ["current", pytest.param("original", marks=pytest.mark.slow)])
def test_a_resumed_run_is_bitwise_the_run_that_never_stopped(
    tokenizer_folder: str, tmp_path: Path, whole: TrainingResult, start: str
) -> None:
    class Killed(Exception):
        pass

    def killed(number: int, model: Any) -> None:
        if number == 5:  # the second refresh came before it, the last checkpoint too
            raise Killed

    block = {"refresh_reward": {"start": start}}
    if start != "current":
        whole = run(refreshed(tokenizer_folder, tmp_path / "whole", **block), fresh_reward(tokenizer_folder))
    config = refreshed(tokenizer_folder, tmp_path / "part", **block)
    with pytest.raises(Killed):
        run(config, fresh_reward(tokenizer_folder), on_iteration=killed)
    resumed = run(config.model_copy(update={"resume": True}), fresh_reward(tokenizer_folder))
    assert logged(resumed) == logged(whole)
    theirs = weights(resumed)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in weights(whole).items())


def test_a_signal_while_it_learns_leaves_the_model_as_it_was(
    tokenizer_folder: str, tmp_path: Path, whole: TrainingResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is that of before the refresh, which is made again when the run goes on."""
    config, reward = refreshed(tokenizer_folder, tmp_path / "part"), fresh_reward(tokenizer_folder)
    before, steps = reward.rewards["proxy"].reward.frozen.digest, refreshing.reward_training.run_steps

    def interrupted(trainer: Any, session: Any) -> str:
        steps(trainer, session)
        return "SIGTERM"

    with monkeypatch.context() as patch:
        patch.setattr(refreshing.reward_training, "run_steps", interrupted)
        stopped = run(config, reward)
    assert (stopped.stopped_by, stopped.steps) == ("SIGTERM", 2)
    reward.check()
    assert reward.rewards["proxy"].reward.frozen.digest == before
    resumed = run(config.model_copy(update={"resume": True}), fresh_reward(tokenizer_folder))
    assert logged(resumed) == logged(whole)


@pytest.mark.parametrize("place", ["questions", "learning"])
def test_a_signal_during_a_refresh_is_heeded_before_the_next_answers_are_sampled(
    tokenizer_folder: str, tmp_path: Path, whole: TrainingResult, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In the last step of learning too, when the training of the reward model comes to its own end."""
    config, collected = refreshed(tokenizer_folder, tmp_path / "part"), []
    owner, name = (RewardRefresher, "_questions") if place == "questions" else (Run, "__exit__")
    part, collect = getattr(owner, name), AlignJob.collect

    def struck(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return part(*arguments)

    def counted(self: AlignJob, iteration: int) -> Any:
        collected.append(iteration)
        return collect(self, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, struck)
        patch.setattr(AlignJob, "collect", counted)
        stopped = run(config, fresh_reward(tokenizer_folder))
    assert (stopped.stopped_by, stopped.steps, collected) == ("SIGTERM", 2, [0, 1])
    resumed = run(config.model_copy(update={"resume": True}), fresh_reward(tokenizer_folder))
    assert logged(resumed) == logged(whole)


def test_a_signal_ends_the_waiting_for_people(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = refreshed(tokenizer_folder, tmp_path / "run", refresh_reward={"annotator": "queue", "wait": 3600.0})
    monkeypatch.setattr("plaudit.rewards.annotators.time.sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    stopped = run(config, fresh_reward(tokenizer_folder))
    assert (stopped.stopped_by, stopped.steps) == ("SIGTERM", 2)


def test_people_s_late_answers_count_when_they_come(tokenizer_folder: str, tmp_path: Path) -> None:
    config = refreshed(tokenizer_folder, tmp_path / "run", refresh_reward={"annotator": "queue"})
    folder = config.output / "annotation"

    def answer(number: int, model: Any) -> None:
        if number == 3:
            rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
            texts = [json.dumps({"id": row["id"], "best": 0}) for row in rows]
            (folder / "answers.jsonl").write_text("\n".join(texts) + "\n")

    result = run(config, fresh_reward(tokenizer_folder), on_iteration=answer)
    lines = [line for line in read_metrics(result.output / "metrics.jsonl") if "refresh/labels" in line]
    assert lines[0]["refresh/labels"] == 0
    assert lines[1]["refresh/labels"] == lines[0]["refresh/asked"] > 0


def test_no_more_is_asked_than_the_budget_however_late_people_answer(tokenizer_folder: str, tmp_path: Path) -> None:
    block = {"annotator": "queue", "every": 1, "budget": 3, "comparisons": 2, "epochs": 1.0}
    config = refreshed(tokenizer_folder, tmp_path / "run", refresh_reward=block)
    folder = config.output / "annotation"

    def answer(number: int, model: Any) -> None:
        if number == 4:
            rows = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
            (folder / "answers.jsonl").write_text("".join(json.dumps({"id": r["id"], "best": 0}) + "\n" for r in rows))

    result = run(config, fresh_reward(tokenizer_folder), on_iteration=answer)
    asked = (folder / "questions.jsonl").read_text().splitlines()
    lines = [line for line in read_metrics(result.output / "metrics.jsonl") if "refresh/labels" in line]
    assert len(asked) == sum(line["refresh/asked"] for line in lines) == 3
    assert [line["refresh/labels"] for line in lines] == [0, 0, 0, 3]  # and then there is nothing to wait for


def test_judgements_are_not_lost_when_learning_from_them_is_stopped(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = refreshed(tokenizer_folder, tmp_path / "run", refresh_reward={"annotator": "queue", "wait": 5.0})
    folder, learn = config.output / "annotation", RewardRefresher._learn
    ask = refreshing.open_annotator("queue", folder).__class__._ask

    def answered(self: Any, questions: Any) -> None:
        ask(self, questions)
        with (folder / "answers.jsonl").open("a") as file:
            file.writelines(json.dumps({"id": question.id, "best": 0}) + "\n" for question in questions)

    def stopped(self: Any, *arguments: Any) -> None:
        monkeypatch.setattr(RewardRefresher, "_learn", learn)
        raise refreshing.RunStopped("SIGTERM")

    monkeypatch.setattr("plaudit.rewards.annotators.QueueAnnotator._ask", answered)
    monkeypatch.setattr(RewardRefresher, "_learn", stopped)
    assert run(config, fresh_reward(tokenizer_folder)).stopped_by == "SIGTERM"
    result = run(config.model_copy(update={"resume": True}), fresh_reward(tokenizer_folder))
    lines = [line for line in read_metrics(result.output / "metrics.jsonl") if "refresh/labels" in line]
    assert lines[0]["refresh/labels"] == lines[0]["refresh/asked"] > 0


@pytest.mark.parametrize(("start", "old"), [("current", OLD), ("original", OLD), ("current", [])])
def test_the_zero_of_the_scale_stays_where_it_was(
    tokenizer_folder: str, tmp_path: Path, start: str, old: list[Comparison]
) -> None:
    """Comparisons leave a constant open; a refresh must not move it under what the policy has learned."""
    settings = refreshed(tokenizer_folder, tmp_path, refresh_reward={"start": start})
    model = ModelReward(RewardModel.from_backbone(tiny_model(tokenizer_folder)))
    model.model.set_normalisation(0.7, 1.0)
    refresher = RewardRefresher(settings, model, FunctionAnnotator(prefer_good), old)
    judged = [replace(OLD[0], completions=("so so", "bad bad", "good"), judgement=Ranking(((2,), (0,), (1,))))]
    held = old[0] if old else judged[0]

    def scores() -> torch.Tensor:
        return model.model.score([held.prompt], [list(held.completions)])[0].normalised

    before = scores()
    for number in (1, 2):
        refresher._learn(judged, number, number)
    after = scores()
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after.mean(), before.mean(), rtol=0, atol=1e-5)


def test_old_comparisons_go_along(tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two earlier ones for each new one; the second time, those of the first refresh are among them."""
    seen: list[list[Comparison]] = []

    def watched(config: Any, *, train: list[Comparison], model: Any) -> Any:
        seen.append(train)
        model.eval().requires_grad_(False)  # as a stopped refresh leaves it
        raise refreshing.RunStopped("SIGTERM")

    monkeypatch.setattr(refreshing.reward_training, "main", watched)
    run(refreshed(tokenizer_folder, tmp_path / "run"), fresh_reward(tokenizer_folder))
    (records,) = seen
    new = [record for record in records if record.annotator == "prefer_good"]
    assert len(records) == len(new) + min(2 * len(new), len(OLD))
    assert {str(record.id)[:3] for record in records[len(new) :]} == {"old"}
    assert len({record.id for record in records}) == len(records)


def test_shares_of_the_budget() -> None:
    settings = RefreshConfig(every=10, budget=100)
    assert [settings.share(40, number) for number in range(3)] == [34, 33, 33]
    assert settings.share(41, 0) == 25
    assert RefreshConfig(every=1, budget=5, comparisons=4).share(9, 7) == 4


def test_what_is_refused(tokenizer_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="when all is over"):
        refreshed(tokenizer_folder, tmp_path, refresh_reward={"every": 6})
    with pytest.raises(ValueError, match="no reward model among the rewards"):
        run(refreshed(tokenizer_folder, tmp_path / "a"), count_good)
    with pytest.raises(ValueError, match="neither queue nor module:function"):
        run(
            refreshed(tokenizer_folder, tmp_path / "b", refresh_reward={"annotator": "x"}),
            fresh_reward(tokenizer_folder),
        )


def test_the_accuracy_by_hand(tokenizer_folder: str, tmp_path: Path) -> None:
    model = ModelReward(RewardModel.from_backbone(tiny_model(tokenizer_folder)))
    refresher = RewardRefresher(refreshed(tokenizer_folder, tmp_path), model, FunctionAnnotator(prefer_good), [])
    record = Comparison(prompt="the cat", completions=("good", "bad", "so"), judgement=Ranking(((0,), (1, 2))))
    other = Comparison(prompt="the cat", completions=("good", "bad"), judgement=Ranking(((0, 1),)))
    from plaudit.rewards.base import Sample

    scores = model([Sample("the cat", text) for text in record.completions]).total
    expected = ((scores[0] > scores[1]).double() + (scores[0] > scores[2]).double()) / 2
    assert refresher.accuracy([record, other]) == pytest.approx(expected.item())
    assert refresher.accuracy([other]) == 0.5
