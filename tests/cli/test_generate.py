"""`plaudit generate` and `plaudit chat` on a tiny model in a folder."""

import io
import json
from pathlib import Path

import pytest

from plaudit.cli.app import main
from tests.rollout.language_models import tiny_lm


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny_lm().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_generate(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", folder, "--max-new-tokens", "6", "--samples", "2"]
    main([*words, "--prompt", "the cat sat"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2
    rows = [{"id": "a", "prompt": "the cat sat"}, {"prompt": [{"role": "user", "content": "why"}]}]
    text = "\n".join(map(json.dumps, rows))
    output = tmp_path / "answers.jsonl"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    main([*words, "--logprobs", "--output", str(output)])
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert found[0]["id"] == "a"
    assert "".join(text + "\n" for text in found[0]["completions"]) == printed
    assert all(len(row["completions"]) == len(row["finished"]) == len(row["logprobs"]) == 2 for row in found)
    assert all(value < 0 for row in found for value in row["logprobs"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--num-beams", "3"], "num_beams"),
        (["--prompt", "a", "--input", "b"], "not both"),
    ],
)
def test_faults(folder: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", folder, *words])
    assert message in capsys.readouterr().err


def test_a_bad_line_is_named(folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "the"}\n{"question": "why"}\n'))
    with pytest.raises(SystemExit):
        main(["generate", folder, "--max-new-tokens", "2"])
    assert "standard input:2" in capsys.readouterr().err


def test_chat(folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nwhy\n\nthe cat\n"))
    main(["chat", folder, "--max-new-tokens", "5", "--system", "be good"])
    assert capsys.readouterr().out.count("\n") == 3
