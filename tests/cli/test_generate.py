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
        (["--length-penalty", "2"], "plaudit: length_penalty and early_stopping are for method 'beam', not 'sample'"),
        (["--num-beams", "3"], "plaudit: num_beams 3 is for method 'beam', not 'sample'"),
        (["--method", "greedy", "--top-k", "2"], "plaudit: top_k, top_p and min_p are for method 'sample'"),
        (["--stop", ""], "plaudit: stop_strings holds an empty string"),
        (["--top-p", "1.5"], "plaudit: --top-p: input should be less than or equal to 1, not 1.5"),
        (["--temperature", "0"], "plaudit: --temperature: input should be greater than 0, not 0.0"),
        (["--max-new-tokens", "0"], "plaudit: --max-new-tokens: input should be greater than or equal to 1, not 0"),
        (["--samples", "0"], "plaudit: --samples: must be at least 1, not 0"),
        (["--dtype", "int3"], "plaudit: dtype 'int3': use one of"),
        (["--input", "b"], "plaudit: give --prompt or --input, not both"),
        (
            ["--endpoint", "text"],
            "plaudit: --endpoint and --one-answer-a-request say how a server is asked: give --server",
        ),
    ],
)
def test_faults_of_options_are_one_line_each(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", str(tmp_path / "no model"), "--prompt", "a", *words])
    said = capsys.readouterr().err
    assert caught.value.code == 2
    assert said.startswith(message), said
    assert said.count("\n") == 1


def test_each_fault_of_an_option_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["chat", str(tmp_path / "no model"), "--top-p", "0", "--seed", "-1"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["--top-p", "--seed"]


def test_a_bad_line_is_named(folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "the"}\n{"question": "why"}\n'))
    with pytest.raises(SystemExit):
        main(["generate", folder, "--max-new-tokens", "2"])
    assert "standard input:2" in capsys.readouterr().err


def test_chat(folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\nwhy\n\nthe cat\n"))
    main(["chat", folder, "--max-new-tokens", "5", "--system", "be good"])
    assert capsys.readouterr().out.count("\n") == 3
