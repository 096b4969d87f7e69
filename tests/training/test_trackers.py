import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from plaudit.training.trackers import JsonlTracker, Trackers, read_metrics


def test_jsonl_is_cut_back_on_resume(tmp_path: Path) -> None:
    trackers = Trackers([], tmp_path, settings={})
    for step in range(1, 6):
        trackers.log(step, {"loss": 1 / step, "bad": math.inf})
    trackers.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    trackers = Trackers([], tmp_path, settings={}, resume_step=3)
    trackers.log(4, {"loss": 9.0})
    trackers.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[2] == {"step": 3, "loss": 1 / 3, "bad": None}
    assert lines[3]["loss"] == 9.0
    Trackers([], tmp_path, settings={}).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_texts_with_marks_that_python_takes_for_line_ends_survive_a_resume(tmp_path: Path) -> None:
    path, text = tmp_path / "samples.jsonl", "one\u2028two\u2029three\x85four\x0bfive\r\nsix é"
    tracker = JsonlTracker(path)
    for step in (1, 2):
        tracker.write(step, {"completion": text})
    tracker.close()
    with path.open("ab") as file:
        file.write('{"step": 3, "completion": "é'.encode()[:-1])  # a kill in the middle of a letter
    JsonlTracker(path, resume_step=1).close()
    assert read_metrics(path) == [{"step": 1, "completion": text}]


def test_unknown_and_missing_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tracker 'neptune' is unknown: use any of tensorboard"):
        Trackers(["neptune"], tmp_path, settings={})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'plaudit\[wandb\]'"):
        Trackers(["wandb"], tmp_path, settings={})


def test_tensorboard_holds_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(["tensorboard"], tmp_path, settings={"seed": 1})
    trackers.log(1, {"loss": 0.5})
    trackers.log(2, {"loss": 0.25})
    trackers.flush()
    trackers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_hosted_trackers_are_called_as_their_libraries_want(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class FakeRun:
        id = "run-7"

        def log(self, metrics: dict[str, float], step: int) -> None:
            calls.append(("wandb.log", metrics, step))

        def finish(self) -> None:
            calls.append(("wandb.finish",))

    wandb, trackio, mlflow = ModuleType("wandb"), ModuleType("trackio"), ModuleType("mlflow")

    def wandb_init(**options: Any) -> FakeRun:
        calls.append(("wandb.init", options["id"], options["config"]))
        return FakeRun()

    wandb.init = wandb_init  # type: ignore[attr-defined]
    trackio.init = lambda **options: calls.append(("trackio.init", options["resume"]))  # type: ignore[attr-defined]
    trackio.log = lambda metrics, step: calls.append(("trackio.log", metrics, step))  # type: ignore[attr-defined]
    trackio.finish = lambda: calls.append(("trackio.finish",))  # type: ignore[attr-defined]

    def start_run(run_id: str | None, run_name: str | None) -> Any:
        calls.append(("mlflow.start", run_id))
        return SimpleNamespace(info=SimpleNamespace(run_id="ml-1"))

    mlflow.set_experiment = lambda name: None  # type: ignore[attr-defined]
    mlflow.start_run = start_run  # type: ignore[attr-defined]
    mlflow.log_dict = lambda values, name: calls.append(("mlflow.config", values))  # type: ignore[attr-defined]
    mlflow.log_metrics = lambda metrics, step: calls.append(("mlflow.log", metrics, step))  # type: ignore[attr-defined]
    mlflow.end_run = lambda: calls.append(("mlflow.end",))  # type: ignore[attr-defined]
    for module in (wandb, trackio, mlflow):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    names = ["wandb", "trackio", "mlflow"]
    for resume_step in (None, 1):
        trackers = Trackers(names, tmp_path, settings={"seed": 1}, resume_step=resume_step)
        trackers.log(2, {"loss": 0.5})
        trackers.close()
    first, second = calls[: len(calls) // 2 + 1], calls[len(calls) // 2 + 1 :]
    assert ("wandb.init", None, {"seed": 1}) in first
    assert ("mlflow.start", None) in first
    assert ("mlflow.config", {"seed": 1}) in first
    assert {("wandb.finish",), ("trackio.finish",), ("mlflow.end",)} <= set(
        map(tuple, (c for c in first if len(c) == 1))
    )
    assert ("wandb.init", "run-7", {"seed": 1}) in second
    assert ("mlflow.start", "ml-1") in second
    assert ("trackio.init", "allow") in second
    for name in names:
        assert [call for call in calls if call[0] == f"{name}.log"] == [(f"{name}.log", {"loss": 0.5}, 2)] * 2
