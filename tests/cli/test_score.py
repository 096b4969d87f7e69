"""`plaudit score` and `plaudit export` as a user meets them, and a kill in the middle."""

import io
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
from plaudit.models.reward_model import RewardModel
from tests.models.conftest import word_tokenizer
from tests.models.test_saving import build

COMMAND = [sys.executable, "-c", "from plaudit.cli.app import main; main()"]
ROWS = [
    {"id": n, "prompt": "why is it so", "completions": ["no", "very bad yes", "the cat sat"][: 1 + n % 3]}
    for n in range(60)
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    word_tokenizer().save_pretrained(place / "tokenizer")
    model = build(str(place / "tokenizer"))
    model.set_normalisation(-1.5, 2.0)
    model.save_pretrained(place / "model")
    return place / "model"


class Bytes(io.StringIO):
    """A standard input with the bytes that `plaudit score` reads."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.buffer = io.BytesIO(text.encode())


def run(*words: str) -> int:
    try:
        main(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def test_from_standard_input_to_standard_output(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    monkeypatch.setattr(sys, "stdin", Bytes(LINES))
    assert run("score", str(folder), "--device", "cpu", "--window", "7") == 0
    out, err = capfdbinary.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["id"] for result in results] == [row["id"] for row in ROWS]
    scores = RewardModel.from_pretrained(folder).score(["why is it so"], [["no", "very bad yes", "the cat sat"]])[0]
    assert results[2]["raw"] == pytest.approx(scores.raw.tolist(), abs=1e-5)
    assert results[2]["normalised"] == pytest.approx(scores.normalised.tolist(), abs=1e-5)
    assert b"scored 60 rows, 120 completions" in err
    assert b"completions/s" in err
    assert b"\r" not in err, "progress was shown where there is no terminal"


def test_files_errors_and_flags(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(LINES + '{"id": "bad"}\n')
    words = ("score", str(folder), "--input", "rows.jsonl", "--output", "scores.jsonl", "--device", "cpu")
    assert run(*words) == 2
    assert "plaudit: rows.jsonl:61: missing key in key 'prompt'" in capsys.readouterr().err
    assert len(Path("scores.jsonl").read_text().splitlines()) == 60
    assert run(*words) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(*words, "--resume", "--on-error", "skip") == 0
    assert "1 rows without scores: 1 missing key" in capsys.readouterr().err
    last = json.loads(Path("scores.jsonl").read_text().splitlines()[60])
    assert last["id"] == "bad"
    assert set(last) == {"id", "error"}
    assert run("score", str(folder), "--window", "0") == 2
    assert run("score", "./missing", "--input", "rows.jsonl") == 2


def test_a_kill_loses_nothing_and_doubles_nothing(folder: Path, tmp_path: Path) -> None:
    """SIGKILL while it runs: the input stalls once twenty rows are out, so that it surely is in the middle."""
    output, source = tmp_path / "scores.jsonl", tmp_path / "rows.jsonl"
    source.write_text(LINES)
    words = ["score", str(folder), "--output", str(output), "--window", "8", "--device", "cpu"]
    with subprocess.Popen([*COMMAND, *words], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        process.stdin.write("".join(LINES.splitlines(keepends=True)[:29]).encode())
        process.stdin.flush()
        deadline = time.monotonic() + 120
        while not output.exists() or output.read_bytes().count(b"\n") < 24:
            assert time.monotonic() < deadline, "nothing was written"
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert output.read_bytes().count(b"\n") == 24
    with output.open("ab") as file:
        file.write(b'{"id": 24, "raw": [0.1')
    assert run(*words, "--input", str(source), "--resume") == 0
    whole = tmp_path / "whole.jsonl"
    assert run("score", str(folder), "--input", str(source), "--output", str(whole), "--device", "cpu") == 0
    got, wanted = ([json.loads(line) for line in path.read_text().splitlines()] for path in (output, whole))
    assert [result["id"] for result in got] == [row["id"] for row in ROWS]
    for one, other in zip(got, wanted, strict=True):
        assert one["raw"] == pytest.approx(other["raw"], abs=1e-5)


def test_export(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run("export", str(folder), str(out)) == 0
    said = capsys.readouterr().out
    assert "opens with AutoModelForSequenceClassification" in said
    assert "note: other tools see raw scores: the normalising shift [-1.5] is kept in plaudit.json" in said
    assert run("export", str(folder), str(out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("export", str(folder), str(out), "--overwrite", "--no-fold") == 0


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {
        "score": ("--output", "--resume", "--on-error", "--too-long", "--token-budget", "--probabilities", "--device"),
        "export": ("--merge", "--fold", "--overwrite"),
    }
    for verb, names in options.items():
        assert run(verb, "--help") == 0
        said = capsys.readouterr().out
        assert all(name in said for name in names)
