"""A run that was killed and resumed ends bitwise where an uninterrupted one ends: weights, metrics, order of data."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# 40 records in steps of 8: 5 steps an epoch, 10 in all; 4 micro-batches a step; a checkpoint every 2 steps.
KILL, TERM = "SIGKILL", "SIGTERM"


def moment(place: str, number: int, sent: str = KILL) -> dict[str, Any]:
    """When to strike."""
    return {"place": place, "number": number, "signal": sent}


LORA = {"lora": True}
JOBS: dict[str, dict[str, Any]] = {
    "plain": {"moments": [None]},
    "plain-again": {"moments": [None]},
    "lora": {"moments": [None], "options": LORA},
    "step-1-unsaved": {"moments": [moment("step", 1), None]},
    "step-1-saved": {"moments": [moment("saved", 1), None], "options": {"save_every": 1}},
    "mid-epoch": {"moments": [moment("step", 3), None]},
    "epoch-end-unsaved": {"moments": [moment("step", 5), None]},
    "epoch-end-saved": {"moments": [moment("saved", 5), None]},
    "mid-accumulation": {"moments": [moment("micro_batch", 22), None]},
    "while-saving": {"moments": [moment("saving", 3), None]},
    "three-times": {"moments": [moment("step", 3), moment("micro_batch", 2), moment("step", 4), None]},
    "at-the-end": {"moments": [moment("saved", 10), None]},
    "lora-mid-accumulation": {"moments": [moment("micro_batch", 22), None], "options": LORA},
    "terminated": {"moments": [moment("micro_batch", 22, TERM), None]},
    "terminated-lora": {"moments": [moment("step", 7, TERM), None], "options": LORA},
    "damaged-last": {"moments": [moment("step", 9), None], "damage": ["step-000000008"]},
    "damaged-all": {"moments": [moment("step", 3), None], "damage": ["step-000000002"]},
}


@dataclass
class Outcome:
    """What a job left behind."""

    codes: list[int]
    folder: Path

    @property
    def last(self) -> dict[str, Any]:
        """Weights, metrics and steps of the last run."""
        path = self.folder / f"outcome-{len(self.codes) - 1}.json"
        assert path.exists(), self.errors
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    @property
    def errors(self) -> str:
        """What the last run wrote to the standard error stream."""
        return (self.folder / f"stderr-{len(self.codes) - 1}.txt").read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The metrics file without clock readings."""
        lines = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]

    def order(self, number: int) -> list[str]:
        """The micro-batches that run `number` saw."""
        return (self.folder / f"order-{number}.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "jobs.json").write_text(json.dumps(JOBS))
    worker = Path(__file__).with_name("worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), str(folder / "jobs.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads((folder / "codes.json").read_text())
    return {name: Outcome(codes[name], folder / name) for name in JOBS}


def test_uninterrupted_runs_are_equal(outcomes: dict[str, Outcome]) -> None:
    first, second = outcomes["plain"], outcomes["plain-again"]
    assert first.codes == [0], first.errors
    assert first.last == second.last
    assert first.lines == second.lines
    assert first.last["steps"] == 10
    assert first.last["stopped_by"] == "epochs"
    assert sum("loss" in line for line in first.lines) == 10
    assert sum("eval/loss" in line for line in first.lines) == 2
    assert first.last["weights"] != outcomes["lora"].last["weights"]


KILLED = [name for name in JOBS if name not in ("plain", "plain-again", "lora", "damaged-all")]


@pytest.mark.parametrize("name", KILLED)
def test_killed_and_resumed_is_bitwise_the_same(outcomes: dict[str, Outcome], name: str) -> None:
    outcome, whole = outcomes[name], outcomes["lora" if "lora" in name else "plain"]
    expected = [-signal.SIGKILL if each and each["signal"] == KILL else 0 for each in JOBS[name]["moments"]]
    assert outcome.codes == expected, outcome.errors
    assert outcome.last == whole.last
    assert outcome.lines == whole.lines
    order, last = whole.order(0), outcome.order(len(expected) - 1) if name != "at-the-end" else []
    assert order[len(order) - len(last) :] == last


def test_resuming_continues_instead_of_starting_again(outcomes: dict[str, Outcome]) -> None:
    steps = len(outcomes["plain"].order(0))
    assert len(outcomes["step-1-unsaved"].order(1)) == steps
    assert len(outcomes["step-1-saved"].order(1)) < steps
    assert len(outcomes["epoch-end-saved"].order(1)) < 0.7 * steps
    assert "going on after step" not in outcomes["plain"].errors


@pytest.mark.parametrize("name", ["terminated", "terminated-lora"])
def test_sigterm_saves_and_leaves_cleanly(outcomes: dict[str, Outcome], name: str) -> None:
    folder = outcomes[name].folder
    first = json.loads((folder / "outcome-0.json").read_text())
    assert first["stopped_by"] == "SIGTERM"
    assert not first["complete"]
    message = (folder / "stderr-0.txt").read_text()
    assert f"stopped by SIGTERM after step {first['steps']}; go on with --resume" in message
    # The step that was broken off after two of its micro-batches is done again, nothing before it is.
    broken_off, resumed = outcomes[name].order(0), outcomes[name].order(1)
    assert len(outcomes["plain"].order(0)) == 40
    assert (len(broken_off), len(resumed)) == ((22, 20) if name == "terminated" else (28, 12))


def test_damaged_checkpoint_is_reported_and_the_last_good_one_used(outcomes: dict[str, Outcome]) -> None:
    errors = outcomes["damaged-last"].errors
    assert "DAMAGED CHECKPOINT" in errors
    assert "step-000000008" in errors
    assert "using the last good checkpoint, step 6" in errors


def test_nothing_but_damaged_checkpoints_is_refused(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["damaged-all"]
    assert outcome.codes == [-signal.SIGKILL, 1]
    assert "no checkpoint is whole" in outcome.errors
