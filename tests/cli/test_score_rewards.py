"""`plaudit score --reward`: rules, models and servers from the command line, alone and beside a model."""

import json
from pathlib import Path
from typing import Any

import pytest

from plaudit.cli.app import main
from plaudit.evaluation.score_rewards import build_rewards, score_rewards
from plaudit.rewards.base import NonFiniteRewardError, as_reward
from tests.models.conftest import word_tokenizer
from tests.models.test_saving import build

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": "why is it so", "completion": "the cat sat 3", "answer": "#### 3"},
    {"id": "b", "prompt": "why is it so", "completions": ["no", "very bad yes 4"], "answer": "4"},
    {"id": "c", "prompt": "the cat", "completion": "no"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    word_tokenizer().save_pretrained(place / "tokenizer")
    model = build(str(place / "tokenizer"))
    model.set_normalisation(-1.5, 2.0)
    model.save_pretrained(place / "model")
    return place / "model"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "rows.jsonl")


def run(*words: str) -> int:
    try:
        main(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_several_rules_without_a_model(rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.jsonl"
    words = ("--reward", "length_penalty=0.5", "--reward", "numeric_match", "--reward", "length_penalty=1,free=1")
    assert run("score", *words, "--input", rows, "--output", str(out), "--window", "2") == 0
    assert lines_of(out) == [
        {
            "id": "a",
            "rewards": {"length_penalty=0.5": -2.0, "numeric_match": 1.0, "length_penalty=1,free=1": -3.0},
        },
        {
            "id": "b",
            "rewards": {
                "length_penalty=0.5": [-0.5, -2.0],
                "numeric_match": [0.0, 1.0],
                "length_penalty=1,free=1": [0.0, -3.0],
            },
        },
        {"id": "c", "rewards": {"length_penalty=0.5": -0.5, "numeric_match": None, "length_penalty=1,free=1": 0.0}},
    ]
    assert "3 rows, 4 completions" in (said := capsys.readouterr().err)
    assert "1 completions without a reward by numeric_match (" in said


def test_beside_a_model_and_a_model_as_a_reward(folder: Path, rows: str, tmp_path: Path) -> None:
    both, alone, as_rule = (tmp_path / name for name in ("both.jsonl", "alone.jsonl", "rule.jsonl"))
    assert run("score", str(folder), "--input", rows, "--output", str(alone)) == 0
    words = ("--input", rows, "--probabilities", "--on-error", "skip", "--window", "2", "--output", str(both))
    assert run("score", str(folder), "--reward", "repetition", *words) == 0
    assert run("score", "--reward", str(folder), "--input", rows, "--output", str(as_rule)) == 0
    results = lines_of(both)
    assert "error" in results[0]
    assert "rewards" not in results[0]
    assert results[1]["rewards"] == {"repetition": [0.0, 0.0]}
    assert results[1]["raw"] == pytest.approx(lines_of(alone)[1]["raw"], abs=1e-5)
    for one, other in zip(lines_of(as_rule), lines_of(alone), strict=True):
        assert next(iter(one["rewards"].values())) == pytest.approx(other["normalised"], abs=1e-5)


def test_a_run_goes_on_where_it_stopped_and_only_with_the_same_rewards(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "scores.jsonl"
    words = ("--input", rows, "--output", str(out), "--window", "1")
    rule = ("--reward", "length_penalty=0.5")
    assert run("score", *rule, *words) == 0
    whole = out.read_bytes()
    out.write_bytes(whole[: len(whole) - 20])
    assert run("score", *rule, *words, "--resume") == 0
    assert out.read_bytes() == whole
    assert run("score", "--reward", "length_penalty=0.7", *words, "--resume") == 2
    assert "another model" in capsys.readouterr().err
    assert run("score", *rule, "--reward", "repetition", *words, "--resume") == 2
    assert "rewards/repetition" in capsys.readouterr().err
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to score with"),
        (("--reward", "lenght_penalty=1"), "did you mean length_penalty?"),
        (("--reward", "repetition", "--reward", "repetition"), "given twice"),
        (("--reward", "repetition", "--probabilities"), "needs a reward model"),
        (("--reward", "repetition", "--dtype", "bfloat16"), "say how MODEL is opened"),
    ],
)
def test_what_cannot_be(words: tuple[str, ...], message: str, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("score", *words, "--input", rows) == 2
    assert message in capsys.readouterr().err


def test_rows_that_cannot_be_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n{broken\n" + json.dumps({"id": 7, "prompt": "p"}) + "\n")
    words = ("score", "--reward", "repetition", "--input", str(source))
    assert run(*words, "--output", str(out), "--on-error", "skip") == 0
    results = lines_of(out)
    assert [set(result) for result in results] == [{"id", "rewards"}, {"id", "error"}, {"id", "error"}]
    assert results[2]["id"] == 7
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[0])["rewards"] == {"repetition": 0.0}
    assert "rows.jsonl:2" in captured.err


def test_a_reward_that_is_not_finite_stops_also_when_errors_are_skipped() -> None:
    from plaudit.data.sources import Row

    broken = as_reward(lambda completions: [float("inf")] * len(completions), name="broken")
    rows = [Row("x", number, row) for number, row in enumerate(ROWS, start=1)]
    with pytest.raises(NonFiniteRewardError, match="the cat sat 3"):
        list(score_rewards({"broken": broken}, rows, on_error="skip"))
    assert list(build_rewards(["repetition=2", "mtld"])) == ["repetition", "mtld"]
