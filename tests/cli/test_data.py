"""`plaudit data inspect` and `plaudit data convert` as a user meets them, mistakes included."""

import json
from pathlib import Path

import pytest

from plaudit.cli.app import main

GOOD = '{"prompt": "q", "completions": ["a", "b"], "best": 0}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.jsonl").write_text(GOOD * 2, "utf-8")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "q", "completions": ["a", ""], "best": 0}\n', "utf-8")
    (tmp_path / "demo.jsonl").write_text('{"prompt": "q", "completion": "a"}\n', "utf-8")
    (tmp_path / "own.csv").write_text("frage,links,rechts,besser\nq,a,b,2\nq,a,b,0\n", "utf-8")
    (tmp_path / "folder").mkdir()
    return tmp_path


def test_json_goes_to_the_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "inspect", "good.jsonl", "--no-floor", "--json", "-"])
    assert json.loads(capsys.readouterr().out)["comparisons"] == 2


def test_flags_name_the_columns(folder: Path) -> None:
    names = ["--prompt", "frage", "--completions", "links,rechts", "--choice", "besser"]
    main(["data", "convert", "own.csv", "own.jsonl", *names, "--choices", "1=links,2=rechts,0=tie"])
    rows = [json.loads(line) for line in (folder / "own.jsonl").read_text("utf-8").splitlines()]
    assert [row["ranking"] for row in rows] == [[[1], [0]], [[0, 1]]]


def test_skipped_rows_are_told_and_written_beside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mixed.jsonl").write_text(GOOD + (folder / "bad.jsonl").read_text("utf-8"), "utf-8")
    main(["data", "convert", "mixed.jsonl", "out.jsonl", "--on-error", "skip"])
    told = capsys.readouterr().err
    assert "2 rows read, 1 used, 1 refused (1 empty completion); wrote 1 records to out.jsonl" in told
    assert "mixed.jsonl:2: empty completion in key 'completions[1]'" in told
    assert json.loads((folder / "out.refused.jsonl").read_text("utf-8"))["line"] == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("inspect", "parameter PATH requires an argument"),
        ("convert good.jsonl", "parameter OUT requires an argument"),
        ("inspect good.jsonl --limit 0", "limit: input should be greater than or equal to 1, not 0"),
        ("inspect good.jsonl --split train", "good.jsonl: one file has no split 'train'"),
        ("inspect good.jsonl --fromat hh", "Did you mean --format?"),
        ("inspect good.jsonl --html folder", "folder: this is a folder; name a file in it"),
        ("inspect own.csv --choice besser --scores links,rechts", "columns for more than one judgement"),
        ("inspect own.csv --choice besser --choices 1", "expected value=column pairs"),
        ("convert bad.jsonl out.jsonl", "bad.jsonl:1: empty completion in key 'completions[1]'"),
        ("convert bad.jsonl out.jsonl --on-error skip", "bad.jsonl: no record to write: 1 rows read, 0 used, 1 ref"),
        ("convert demo.jsonl out.jsonl --demonstrations --annotators merge", "demonstrations have no named columns"),
        ("convert good.jsonl out.txt", "expected an ending of .jsonl, .jsonl.gz or .parquet"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["data", *words.split()])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()
    assert told in last[-1]
    assert last[-1].startswith("plaudit: ")
    assert not (folder / "out.jsonl").exists()
