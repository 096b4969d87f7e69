"""The verbs `plaudit sft` and `plaudit reward` from files to saved models, and the vetted configurations."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from plaudit.cli.app import main
from plaudit.configs.align import AlignConfig
from plaudit.configs.base import load_config
from plaudit.configs.reward import RewardTrainingConfig
from plaudit.configs.sft import SftConfig
from plaudit.models.reward_model import RewardModel
from plaudit.training.run import Run
from plaudit.training.trackers import read_metrics
from tests.training.conftest import SIZES, WORDS

VETTED = Path(__file__).parents[2] / "configs"
PARTS = {"reward-lora.yaml", "reward-ties.yaml", "reward-helpsteer.yaml"}


@pytest.mark.parametrize("path", sorted(VETTED.glob("*.yaml")), ids=lambda path: path.name)
def test_vetted_configurations_hold_and_say_how_to_run_them(path: Path) -> None:
    verb = path.stem.partition("-")[0]
    cls = {"sft": SftConfig, "reward": RewardTrainingConfig, "align": AlignConfig}[verb]
    files = [VETTED / "reward-decoder.yaml", path] if path.name in PARTS else [path]
    config = load_config(cls, files)
    assert config.output == Path("runs") / path.stem
    text = path.read_text()
    assert f"#   plaudit {verb} {' '.join(f'configs/{file.name}' for file in files)}" in text


def write_files(folder: Path) -> None:
    demonstrations = [{"prompt": f"why {a}", "completion": f"it is {b}"} for a in WORDS[:6] for b in WORDS[6:9]]
    rankings = [
        {"prompt": f"why {a} {b}", "completions": ["good cat", "a cat", "bad"], "ranking": [[0], [1], [2]]}
        for a in WORDS[:6]
        for b in WORDS[:6]
    ]
    for name, rows in (("demonstrations", demonstrations), ("rankings", rankings)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = f"{{model_type: llama, template: raw, tokenizer: tokenizer, backbone_config: {json.dumps(SIZES)}}}"
    (folder / "small.yaml").write_text(
        f"model: {model}\nepochs: 2\nrecords_per_step: 4\ndevice: cpu\noptimizer: {{learning_rate: 1e-2}}\n"
    )


@pytest.fixture
def folder(tokenizer_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_files(tmp_path)
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_demonstrations_to_a_reward_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["sft", "small.yaml", "--data", "demonstrations.jsonl", "--held-out-fraction", "0.2"])
    assert (folder / "runs/sft/model/model.safetensors").exists()
    reward = ["reward", "--model.backbone", "runs/sft/model", "--model.template", "raw", "--device", "cpu"]
    reward += ["--data", "rankings.jsonl", "--demonstrations", "demonstrations.jsonl", "--held-out-fraction", "0.3"]
    reward += ["--records-per-step", "4", "--epochs", "3", "--optimizer.learning-rate", "1e-2"]
    main([*reward, "--dry-run"])
    printed = capsys.readouterr().out
    assert "backbone: runs/sft/model" in printed
    assert "optimizer steps" in printed
    assert not (folder / "runs/reward").exists()
    main(reward)
    result = json.loads((folder / "runs/reward/result.json").read_text())
    assert result["records"]["demonstrations"]["read"] == 18
    assert result["metrics"]["accuracy"] > 0.9
    model = RewardModel.from_pretrained(folder / "runs/reward/model")
    assert model.score(["why the cat"], [["good cat", "bad"]])[0].raw.diff().item() < 0
    with pytest.raises(SystemExit):
        main(reward)
    assert "already holds a run" in capsys.readouterr().err
    main([*reward, "--resume"])


@pytest.mark.parametrize("verb", ["sft", "reward"])
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_ends_with_the_code_of_its_signal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, verb: str, sent: signal.Signals, code: int
) -> None:
    data = "demonstrations.jsonl" if verb == "sft" else "rankings.jsonl"
    words = [verb, "small.yaml", "--data", data, "--output", "run", "--quiet"]

    def update_and_strike(self: Run, *arguments: Any, **options: Any) -> None:
        update(self, *arguments, **options)
        os.kill(os.getpid(), sent)

    update = Run.update
    monkeypatch.setattr(Run, "update", update_and_strike)
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == code
    assert json.loads((folder / "run/result.json").read_text())["stopped_by"] == sent.name
    assert not (folder / "run/model").exists()
    monkeypatch.setattr(Run, "update", update)
    main([*words, "--resume"])
    assert (folder / "run/model").is_dir()


@pytest.mark.slow
def test_the_command_survives_a_kill_from_outside(folder: Path) -> None:
    command = [sys.executable, "-c", "from plaudit.cli.app import main; main()", "reward", "small.yaml"]
    command += ["--data", "rankings.jsonl", "--save-every", "2", "--epochs", "20"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--output", "whole"], env=environment, check=True)
    metrics = folder / "killed" / "metrics.jsonl"
    killed = subprocess.Popen([*command, "--output", "killed"], env=environment)
    while not metrics.exists() or len(read_metrics(metrics)) < 25:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    terminated = subprocess.Popen([*command, "--output", "killed", "--resume"], env=environment, stderr=subprocess.PIPE)
    while len(read_metrics(metrics)) < 60:
        assert terminated.poll() is None
        time.sleep(0.01)
    terminated.send_signal(signal.SIGTERM)
    _, messages = terminated.communicate()
    assert terminated.returncode == 128 + signal.SIGTERM
    assert b"stopped by SIGTERM after step" in messages
    subprocess.run([*command, "--output", "killed", "--resume"], env=environment, check=True)
    weights = [(folder / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    lines = [
        [
            {k: v for k, v in line.items() if not k.startswith("time/")}
            for line in read_metrics(folder / name / "metrics.jsonl")
        ]
        for name in ("whole", "killed")
    ]
    assert lines[0] == lines[1]
