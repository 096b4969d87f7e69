"""Prompts out of whatever holds some: plain rows with their columns, demonstrations, comparisons, trees."""

import json
from pathlib import Path
from typing import Any

import pytest

from plaudit.configs.data import DataConfig
from plaudit.data.prompts import read_prompts
from plaudit.data.records import Message, RecordError


def write(path: Path, *rows: Any) -> str:
    """Rows as JSON Lines; text as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read(tmp_path: Path, *rows: Any, **options: Any) -> Any:
    return read_prompts(DataConfig(path=write(tmp_path / "rows.jsonl", *rows), **options))


def test_plain_rows_keep_their_columns_and_names(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        {"prompt": "2 + 2?", "answer": "4", "id": "a", "group": "sums"},
        {"prompt": [{"role": "user", "content": "Hi"}], "level": 3},
    )
    first, second = found.records
    assert (first.prompt, first.id, first.group) == ("2 + 2?", "a", "sums")
    assert first.columns["answer"] == "4"
    assert second.prompt == (Message("user", "Hi"),)
    assert second.columns == {"level": 3}
    assert (found.read, found.used) == (2, 2)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "why?", "completions": ["a", "b"], "ranking": [[0], [1]]}, "why?"),
        ({"prompt": "why?", "chosen": "a", "rejected": "b"}, "why?"),
        ({"instruction": "Say hi", "input": "loudly", "output": "HI"}, "Say hi\n\nloudly"),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"},
            (Message("user", "Hi"),),
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
            (Message("user", "Hi"),),
        ),
    ],
)
def test_known_formats_give_their_prompts(row: dict[str, Any], prompt: object, tmp_path: Path) -> None:
    assert [record.prompt for record in read(tmp_path, row).records] == [prompt]


def test_a_repeated_prompt_is_asked_once(tmp_path: Path) -> None:
    found = read(tmp_path, {"prompt": "a", "n": 1}, {"prompt": "b"}, {"prompt": "a", "n": 2})
    assert [record.prompt for record in found.records] == ["a", "b"]
    assert found.records[0].columns["n"] == 1
    assert found.read == 3


def test_faults_have_a_place_and_may_be_skipped(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, "{broken", {"prompt": ""}, {"prompt": [{"role": "assistant", "content": "Ho"}]}]
    with pytest.raises(RecordError, match=r"rows.jsonl:2"):
        read(tmp_path, *rows)
    found = read(tmp_path, *rows, on_error="skip", refused_file=str(tmp_path / "refused.jsonl"))
    assert [record.prompt for record in found.records] == ["a"]
    assert found.read == found.used + sum(found.refused.values()) == 4
    assert len((tmp_path / "refused.jsonl").read_text().splitlines()) == 3


def test_trees_give_the_prompt_of_every_ranked_turn(tmp_path: Path) -> None:
    def reply(text: str, rank: int) -> dict[str, Any]:
        return {"role": "assistant", "text": text, "rank": rank, "replies": []}

    tree = {
        "message_tree_id": "t",
        "prompt": {"role": "prompter", "text": "Hi", "replies": [reply("one", 0), reply("two", 1)]},
    }
    found = read(tmp_path, tree)
    assert [record.prompt for record in found.records] == [(Message("user", "Hi"),)]


def test_rows_of_known_formats_are_columns_too(tmp_path: Path) -> None:
    row = {"instruction": "Say hi", "output": "HI", "level": 3}
    assert read(tmp_path, row).records[0].columns == row


def test_a_prompt_under_another_key_is_named(tmp_path: Path) -> None:
    rows = [{"question": "2 + 2?", "answer": "#### 4", "number": 7}, {"question": "3 + 3?", "answer": "#### 6"}]
    with pytest.raises(ValueError, match=r"--data '\{path: FILE, columns: \{prompt: question\}\}'"):
        read(tmp_path, *rows)
    first, second = read(tmp_path, *rows, columns={"prompt": "question", "id": "number"}).records
    assert (first.prompt, first.id, first.columns["answer"], second.id) == ("2 + 2?", "7", "#### 4", None)
    with pytest.raises(RecordError, match=r"rows.jsonl:1: missing key in key 'asked'"):
        read(tmp_path, *rows, columns={"prompt": "asked"})
    with pytest.raises(ValueError, match=r"columns\.choice: of prompts only"):
        read(tmp_path, *rows, columns={"prompt": "question", "choice": "answer"})
    with pytest.raises(ValueError, match="format: prompt: with columns"):
        read(tmp_path, *rows, columns={"prompt": "question"}, format="prompt")
