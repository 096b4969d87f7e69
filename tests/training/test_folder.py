"""The run's folder: nothing worth keeping is lost, nothing worthless is in the way, and two runs never share one."""

import fcntl
from pathlib import Path
from typing import Any

import pytest

from plaudit.configs.reward import RewardTrainingConfig
from plaudit.data.records import Comparison, Ranking
from plaudit.models.reward_model import RewardModel
from plaudit.training import reward
from plaudit.training.folder import check_output, claimed, prepare_output
from plaudit.training.guards import NonFiniteError
from plaudit.training.reward_trainer import RewardTrainer
from tests.training.conftest import WORDS, tiny_model

RECORDS = [
    Comparison(prompt=f"why {word}", completions=("good cat", "bad dog"), judgement=Ranking(((0,), (1,))))
    for word in WORDS[:6]
]


def reward_config(tokenizer: str, output: Path, **options: Any) -> RewardTrainingConfig:
    settings = {"epochs": 1, "device": "cpu", "quiet": True, **options}
    return RewardTrainingConfig(model=tiny_model(tokenizer), output=output, **settings)


def test_a_run_that_failed_before_its_first_checkpoint_is_not_in_the_way(
    tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = reward_config(tokenizer_folder, tmp_path / "run", quiet=False)
    backward = RewardTrainer.backward

    def broken(self: RewardTrainer, *arguments: object) -> object:
        loss, sums = backward(self, *arguments)  # type: ignore[arg-type]
        return loss * float("nan"), sums

    monkeypatch.setattr(RewardTrainer, "backward", broken)
    with pytest.raises(NonFiniteError):
        reward.main(config, train=RECORDS)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert (tmp_path / "run" / "metrics.jsonl").exists()
    monkeypatch.setattr(RewardTrainer, "backward", backward)
    capsys.readouterr()
    result = reward.main(config, train=RECORDS)
    assert isinstance(result, reward.RewardTrainingResult)
    assert isinstance(result.model, RewardModel)
    assert "holds a run without a checkpoint, which is removed" in capsys.readouterr().err
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "kept",
    [
        "model/model.safetensors",
        "result.json",
        "checkpoints/step-000000004/state.pt",
        "checkpoints/step-000000004/damaged",
        "checkpoints/.partial-old-step-000000004/state.pt",
    ],
)
def test_what_could_be_missed_is_refused_and_left(tokenizer_folder: str, tmp_path: Path, kept: str) -> None:
    config = reward_config(tokenizer_folder, tmp_path)
    (tmp_path / kept).parent.mkdir(parents=True, exist_ok=True)
    for name in (kept, "metrics.jsonl"):
        (tmp_path / name).write_text("x")
    for refuse in (check_output, prepare_output):
        with pytest.raises(ValueError, match="already holds a run"):
            refuse(config)
    assert (tmp_path / kept).exists()
    assert (tmp_path / "metrics.jsonl").exists()
    prepare_output(config.model_copy(update={"resume": True}))
    assert (tmp_path / kept).exists()
    prepare_output(config.model_copy(update={"overwrite": True}))
    assert not list(tmp_path.iterdir())


def test_only_a_checkpoint_that_was_never_finished_is_worthless(tokenizer_folder: str, tmp_path: Path) -> None:
    config = reward_config(tokenizer_folder, tmp_path)
    (tmp_path / "checkpoints" / ".partial-abc").mkdir(parents=True)
    prepare_output(config)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_two_runs_never_write_into_one_folder(tokenizer_folder: str, tmp_path: Path, options: dict[str, bool]) -> None:
    config = reward_config(tokenizer_folder, tmp_path, **options)
    with claimed(tmp_path):
        # What the other one has written before its first checkpoint.
        (tmp_path / "metrics.jsonl").write_text("its own")
        with pytest.raises(ValueError, match="another run is writing to"):
            reward.main(config, train=RECORDS)
        assert (tmp_path / "metrics.jsonl").read_text() == "its own"
        with pytest.raises(ValueError, match="another run"), claimed(tmp_path):
            raise AssertionError("never")
    assert isinstance(reward.main(config, train=RECORDS), reward.RewardTrainingResult)


def test_where_folders_cannot_be_locked_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError("not here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with claimed(tmp_path):
        assert "cannot be locked (not here)" in capsys.readouterr().err
