"""One process or two under torchrun: the same losses, the same model, and no process left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("distributed_worker.py")
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TIES = {"loss": "davidson"}
# 37 records in steps of 4: the last step has one, so the second process has none in it.
SHORT: dict[str, Any] = {"epochs": 1, "records_per_step": 4}
DROPOUT: dict[str, Any] = {"epochs": 1, "dropout": 0.1}
JOBS: list[dict[str, Any]] = [
    {"name": "reward", "kind": "reward", "options": TIES, "processes": 1},
    {"name": "reward-ddp", "kind": "reward", "options": TIES, "strategy": "ddp"},
    {"name": "reward-fsdp", "kind": "reward", "options": TIES, "strategy": "fsdp"},
    {"name": "sft", "kind": "sft", "options": SHORT, "processes": 1},
    {"name": "sft-ddp", "kind": "sft", "options": SHORT, "strategy": "ddp"},
    {"name": "sft-fsdp", "kind": "sft", "options": SHORT, "strategy": "fsdp"},
    {"name": "drop", "kind": "reward", "options": DROPOUT, "strategy": "fsdp"},
    {"name": "drop-stopped", "kind": "reward", "options": DROPOUT, "strategy": "fsdp", "terminate": [1, 2]},
    {
        "name": "drop-resumed",
        "kind": "reward",
        "options": DROPOUT | {"resume": True},
        "strategy": "fsdp",
        "goes_on_from": "drop-stopped",
    },
    {"name": "sft-stopped", "kind": "sft", "options": SHORT, "strategy": "fsdp", "terminate": [0, 3]},
    {
        "name": "sft-two-then-one",
        "kind": "sft",
        "options": SHORT | {"resume": True},
        "processes": 1,
        "goes_on_from": "sft-stopped",
    },
]
ADAPTERS: dict[str, Any] = TIES | {"lora": True, "gradient_checkpointing": True}
BF16: dict[str, Any] = {"epochs": 1, "precision": "bf16"}
ENCODER: dict[str, Any] = {"epochs": 1}
MORE_JOBS: list[dict[str, Any]] = [
    {"name": "lora", "kind": "reward", "options": ADAPTERS, "processes": 1},
    {"name": "lora-ddp", "kind": "reward", "options": ADAPTERS, "strategy": "ddp"},
    {"name": "lora-fsdp", "kind": "reward", "options": ADAPTERS, "strategy": "fsdp"},
    {"name": "encoder", "kind": "encoder", "options": ENCODER, "processes": 1},
    {"name": "encoder-ddp", "kind": "encoder", "options": ENCODER, "strategy": "ddp"},
    {"name": "encoder-fsdp", "kind": "encoder", "options": ENCODER, "strategy": "fsdp"},
    {"name": "bf16", "kind": "reward", "options": BF16, "processes": 1},
    {"name": "bf16-ddp", "kind": "reward", "options": BF16, "strategy": "ddp"},
    {"name": "bf16-fsdp", "kind": "reward", "options": BF16, "strategy": "fsdp"},
    {"name": "drop-ddp", "kind": "reward", "options": DROPOUT, "strategy": "ddp"},
    {"name": "drop-ddp-stopped", "kind": "reward", "options": DROPOUT, "strategy": "ddp", "terminate": [0, 3]},
    {
        "name": "drop-ddp-resumed",
        "kind": "reward",
        "options": DROPOUT | {"resume": True},
        "strategy": "ddp",
        "goes_on_from": "drop-ddp-stopped",
    },
    {"name": "alone", "kind": "reward", "options": TIES, "processes": 1},
    {"name": "alone-stopped", "kind": "reward", "options": TIES, "processes": 1, "terminate": [0, 4]},
    {
        "name": "one-then-fsdp",
        "kind": "reward",
        "options": TIES | {"resume": True},
        "strategy": "fsdp",
        "goes_on_from": "alone-stopped",
    },
    {
        "name": "one-then-ddp",
        "kind": "reward",
        "options": TIES | {"resume": True},
        "strategy": "ddp",
        "goes_on_from": "alone-stopped",
    },
]


@dataclass
class Outcome:
    """What a job left behind."""

    folder: Path

    def of(self, rank: int) -> dict[str, Any]:
        """What process `rank` saw."""
        found: dict[str, Any] = json.loads((self.folder / f"outcome-{rank}.json").read_text())
        return found

    @property
    def lines(self) -> list[dict[str, float]]:
        """The metrics file without clock readings."""
        lines = [json.loads(line) for line in (self.folder / "run" / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """All saved weights of the final model."""
        found = {}
        for path in sorted((self.folder / "run" / "model").rglob("*.safetensors")):
            found |= {f"{path.name}/{name}": value for name, value in load_file(path).items()}
        assert found
        return found


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(WORKER.parent), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def run_jobs(folder: Path, jobs: list[dict[str, Any]]) -> dict[str, Outcome]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [*LAUNCH, str(WORKER), str(folder / "jobs.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return {job["name"]: Outcome(folder / job["name"]) for job in jobs}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_jobs(tmp_path_factory.mktemp("distributed"), JOBS)


@pytest.fixture(scope="module")
def more_outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    return run_jobs(tmp_path_factory.mktemp("distributed-more"), MORE_JOBS)


def assert_same_run(one: Outcome, two: Outcome, tolerance: float) -> None:
    """Every logged number of every step and evaluation; the gradient's norm relative to its size."""
    assert len(one.lines) == len(two.lines)
    for first, second in zip(one.lines, two.lines, strict=True):
        assert first.keys() == second.keys()
        for name in first.keys() - {"mean_reward", "eval/mean_reward"}:
            # A comparative loss says nothing about the mean reward, so rounding moves it freely.
            scale = max(1.0, abs(first[name])) if name == "gradient_norm" else 1.0
            assert abs(first[name] - second[name]) <= tolerance * scale, (name, first, second)


def assert_sharded(outcome: Outcome) -> None:
    """Every parameter was a DTensor while the run went on, and the two processes held each number once."""
    seen = [outcome.of(rank) for rank in (0, 1)]
    assert all(all(each["sharded"]) for each in seen)
    assert seen[0]["here"] + seen[1]["here"] == seen[0]["whole"]
    assert 0 < seen[1]["here"] < 0.6 * seen[0]["whole"]


@pytest.mark.parametrize("kind", ["reward", "sft"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_as_one(outcomes: dict[str, Outcome], kind: str, strategy: str) -> None:
    one, two = outcomes[kind], outcomes[f"{kind}-{strategy}"]
    assert_same_run(one, two, 1e-5)
    assert sum("loss" in line for line in one.lines) == 10
    assert one.of(0)["steps"] == two.of(0)["steps"] == two.of(1)["steps"] == 10
    assert two.of(0)["metrics"] == two.of(1)["metrics"]
    if strategy == "fsdp":
        assert_sharded(two)
    else:
        assert not any(two.of(0)["sharded"])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_saved_model_is_that_of_one_process(outcomes: dict[str, Outcome], strategy: str) -> None:
    folder = outcomes["reward"].folder.parent
    scores = json.loads((folder / "scores.json").read_text())
    one, two = (torch.tensor(scores[name]) for name in ("reward", f"reward-{strategy}"))
    assert one.std() > 1e-2
    torch.testing.assert_close(two - two[0], one - one[0], rtol=0, atol=1e-4)
    seen = outcomes[f"reward-{strategy}"].of(0)
    assert seen["tie"] == pytest.approx(outcomes["reward"].of(0)["tie"], abs=1e-5)
    # The shift is that of the scores which the saved model gives, and both processes know it.
    assert seen["mean"] == outcomes[f"reward-{strategy}"].of(1)["mean"]
    difference = seen["mean"][0] - outcomes["reward"].of(0)["mean"][0]
    assert difference == pytest.approx((two - one).mean().item(), abs=1e-4)
    weights, other = outcomes["sft"].weights, outcomes[f"sft-{strategy}"].weights
    assert weights.keys() == other.keys()
    for name, value in weights.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-4)


def test_a_signal_to_one_process_stops_both_after_the_same_step(outcomes: dict[str, Outcome]) -> None:
    for name, step in (("drop-stopped", 2), ("sft-stopped", 3)):
        for rank in (0, 1):
            seen = outcomes[name].of(rank)
            # It came after that step, and they agree at the end of the next.
            assert (seen["steps"], seen["stopped_by"]) == (step + 1, "SIGTERM")
        assert (outcomes[name].folder / "run" / "checkpoints").is_dir()
        assert not (outcomes[name].folder / "run" / "model").exists()


def assert_bitwise(whole: Outcome, resumed: Outcome) -> None:
    assert whole.lines == resumed.lines
    weights, other = whole.weights, resumed.weights
    assert weights.keys() == other.keys()
    assert all(torch.equal(other[name], value) for name, value in weights.items())


def test_resumed_by_as_many_processes_is_bitwise_the_same(outcomes: dict[str, Outcome]) -> None:
    assert_bitwise(outcomes["drop"], outcomes["drop-resumed"])


def test_a_checkpoint_of_two_processes_opens_in_one(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["sft-two-then-one"].of(0)["steps"] == 10
    assert_same_run(outcomes["sft"], outcomes["sft-two-then-one"], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "encoder"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_adapters_and_encoders_train_as_in_one(more_outcomes: dict[str, Outcome], kind: str, strategy: str) -> None:
    assert_same_run(more_outcomes[kind], more_outcomes[f"{kind}-{strategy}"], 1e-5)
    if strategy == "fsdp":
        assert_sharded(more_outcomes[f"{kind}-fsdp"])


@pytest.mark.slow
def test_bfloat16_differs_by_its_rounding_only(more_outcomes: dict[str, Outcome]) -> None:
    assert_same_run(more_outcomes["bf16"], more_outcomes["bf16-ddp"], 0.05)
    assert_same_run(more_outcomes["bf16"], more_outcomes["bf16-fsdp"], 0.05)


@pytest.mark.slow
def test_a_checkpoint_of_one_process_opens_in_two(more_outcomes: dict[str, Outcome]) -> None:
    for strategy in ("fsdp", "ddp"):
        assert_same_run(more_outcomes["alone"], more_outcomes[f"one-then-{strategy}"], 1e-5)


@pytest.mark.slow
def test_ddp_resumes_bitwise(more_outcomes: dict[str, Outcome]) -> None:
    assert_bitwise(more_outcomes["drop-ddp"], more_outcomes["drop-ddp-resumed"])


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_job_within_a_minute(tmp_path: Path, strategy: str) -> None:
    job = {"name": "killed", "kind": "reward", "strategy": strategy, "kill": [1, 7], "options": {"save_every": 1}}
    (tmp_path / "jobs.json").write_text(json.dumps([job]))
    command = [*LAUNCH, str(WORKER), str(tmp_path / "jobs.json")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    ended, died = time.time(), float((tmp_path / "killed" / "died").read_text())
    assert done.returncode != 0
    assert ended - died < 60
    assert "process 0: another process of this run has died" in done.stderr
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert list((tmp_path / "killed" / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
def test_from_the_command_line_stopped_and_resumed_alone(tmp_path: Path, tokenizer_folder: str) -> None:
    lines = [
        {"prompt": f"why is it {word}", "completions": ["so good", "very bad", "yes yes"], "ranking": [[0], [2], [1]]}
        for word in ("cat", "dog", "mat", "so") * 40
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "run.yaml").write_text(
        "model:\n  model_type: llama\n  tokenizer: " + tokenizer_folder + "\n  template: raw\n  backbone_config:\n"
        "    {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2}\n"
        "data: [data.jsonl]\noutput: run\nrecords_per_step: 8\nepochs: 30\ndevice: cpu\n"
    )
    words = ["plaudit", "reward", "run.yaml"]
    command = [*LAUNCH, "-m", *words, "--parallel", "fsdp"]
    told, metrics = tmp_path / "told.txt", tmp_path / "run" / "metrics.jsonl"
    with told.open("w") as stream:
        process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=stream)
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, told.read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    assert "stopped by SIGTERM after step" in told.read_text()
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["stopped_by"] == "SIGTERM"
    alone = [sys.executable, "-m", *words, "--resume", "--max-steps", str(result["steps"] + 2)]
    done = subprocess.run(alone, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the checkpoint is of 2 processes and 1 go on with it" in done.stderr
    assert (tmp_path / "run" / "model" / "plaudit.json").exists()
