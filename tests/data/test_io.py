import gzip
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plaudit.configs.data import ColumnsConfig, DataConfig
from plaudit.data.io import (
    iter_comparisons,
    read_comparisons,
    read_data,
    read_demonstrations,
    write_comparisons,
    write_demonstrations,
)
from plaudit.data.records import (
    Best,
    Comparison,
    Demonstration,
    Judgement,
    Labels,
    Message,
    Ranking,
    Ratings,
    RecordError,
    Scores,
    Votes,
)

GOOD = {"prompt": "q", "completions": ["a", "b"], "best": 0}
text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda value: bool(value.strip()))
number = st.floats(-1e6, 1e6, allow_nan=False)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@st.composite
def judgements(draw: Callable[..., Any], count: int) -> Judgement:
    kinds = ["scores", "labels", "ratings"] + (["ranking", "best", "votes"] if count > 1 else [])
    kind = draw(st.sampled_from(kinds))
    some = st.lists(st.none() | number, min_size=count, max_size=count).filter(lambda v: any(x is not None for x in v))
    if kind == "best":
        return Best(draw(st.integers(0, count - 1)))
    if kind == "votes":
        counts = st.lists(st.floats(0, 9), min_size=count, max_size=count).filter(lambda v: sum(v) > 0)
        return Votes(tuple(draw(counts)))
    if kind == "scores":
        return Scores(tuple(draw(some)))
    if kind == "labels":
        return Labels(tuple(None if value is None else value > 0 for value in draw(some)))
    if kind == "ratings":
        return Ratings({name: tuple(draw(some)) for name in draw(st.sets(st.sampled_from("abc"), min_size=1))})
    order = draw(st.permutations(range(count)))
    judged = order[: draw(st.integers(2, count))]
    cuts = draw(st.sets(st.integers(1, len(judged) - 1)))
    bounds = [0, *sorted(cuts), len(judged)]
    return Ranking(tuple(tuple(judged[a:b]) for a, b in pairwise(bounds)))


@st.composite
def comparisons(draw: Callable[..., Any]) -> Comparison:
    completions = tuple(draw(st.lists(text, min_size=1, max_size=5, unique=True)))
    turns = st.lists(text, min_size=1, max_size=2).map(lambda ts: tuple(Message("user", t) for t in ts))
    return Comparison(
        prompt=draw(text | turns), completions=completions, judgement=draw(judgements(len(completions))),
        id=draw(st.none() | text), annotator=draw(st.none() | text), weight=draw(st.floats(0, 9)),
        margin=draw(st.none() | number), group=draw(st.none() | text), subset=draw(st.none() | text),
        images=tuple(draw(st.lists(text, max_size=2))),
    )  # fmt: skip


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".parquet"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(comparisons(), min_size=1, max_size=4))
def test_written_is_read_back(tmp_path: Path, ending: str, records: list[Comparison]) -> None:
    path = tmp_path / f"x{ending}"
    assert write_comparisons(records, path) == len(records)
    result = read_comparisons(path, format="plaudit")
    assert result.records == records
    assert (result.read, result.used) == (len(records), len(records))


def test_demonstrations_are_read_back(tmp_path: Path) -> None:
    records = [
        Demonstration(prompt="q", completion="a", id="1", weight=2.0, group="g"),
        Demonstration(prompt=(Message("user", "問い"),), completion="答え"),
    ]
    for name in ("d.jsonl", "d.jsonl.gz", "d.parquet"):
        assert write_demonstrations(records, tmp_path / name) == 2
        assert read_demonstrations(tmp_path / name).records == records


def test_writing_is_all_or_nothing_and_deterministic(tmp_path: Path) -> None:
    good = Comparison(prompt="q", completions=("a", "b"), judgement=Best(0))
    bad = Comparison(prompt="q", completions=("a",), judgement=Best(0), id="seven")
    with pytest.raises(ValueError, match=r"record 2 \(id seven\)"):
        write_comparisons([good, bad], tmp_path / "x.jsonl")
    assert list(tmp_path.iterdir()) == []
    write_comparisons([good], tmp_path / "x.jsonl.gz")
    write_comparisons([good], tmp_path / "y.jsonl.gz")
    assert (tmp_path / "x.jsonl.gz").read_bytes() == (tmp_path / "y.jsonl.gz").read_bytes()
    with pytest.raises(ValueError, match=r"expected an ending of \.jsonl"):
        write_comparisons([good], tmp_path / "x.txt")


BAD_ROWS: list[tuple[object, str, str]] = [
    ('{"prompt": "q", "comp\n', "broken JSON", ""),
    ("[1, 2]\n", "not a JSON object", ""),
    ("[" * 100_000 + "\n", "broken JSON", ""),
    ({"completions": ["a", "b"], "best": 0}, "missing key", "prompt"),
    ({"prompt": "q", "best": 0}, "missing key", "completions"),
    ({"prompt": None, "completions": ["a", "b"], "best": 0}, "null value", "prompt"),
    ({"prompt": "q", "completions": ["a", "b"]}, "no judgement", ""),
    ({**GOOD, "scores": [1, 2]}, "several judgements", "best, scores"),
    ({"prompt": "q", "completions": ["a", "b"], "scores": [1]}, "judgement does not cover the completions", "scores"),
    ({"prompt": "q", "completions": ["a"], "best": 0}, "one completion for a relative judgement", "completions"),
    ({"prompt": "q", "completions": ["a", ""], "best": 0}, "empty completion", "completions[1]"),
    ({"prompt": "q", "completions": ["a", "a"], "best": 0}, "identical completions", "completions[1]"),
    ('{"prompt": "q", "completions": ["a", "b"], "scores": [NaN, 1]}\n', "not a finite number", "scores[0]"),
    ('{"prompt": "q", "completions": ["a", "b"], "scores": [1e999, 1]}\n', "not a finite number", "scores[0]"),
    ({"prompt": "q", "completions": ["a", "b"], "scores": ["1", 1]}, "wrong type", "scores[0]"),
    ({"prompt": "q", "completions": ["a", "b"], "scores": [True, 1]}, "wrong type", "scores[0]"),
    ({"prompt": 7, "completions": ["a", "b"], "best": 0}, "wrong type", "prompt"),
    ({"prompt": "q", "completions": "ab", "best": 0}, "wrong type", "completions"),
    ({"prompt": "q", "completions": ["a", 7], "best": 0}, "wrong type", "completions[1]"),
    ({"prompt": "q", "completions": ["a", "b"], "ranking": [0, 1]}, "wrong type", "ranking[0]"),
    ({"prompt": "q\ud83d", "completions": ["a", "b"], "best": 0}, "lone surrogate", "prompt"),
    ({"prompt": [{"role": "user"}], "completions": ["a", "b"], "best": 0}, "missing key", "prompt[0].content"),
]


@pytest.mark.parametrize(("row", "reason", "key"), BAD_ROWS)
def test_bad_rows_are_named_or_counted(tmp_path: Path, row: object, reason: str, key: str) -> None:
    path = write(tmp_path / "x.jsonl", GOOD, "\n", row, GOOD)
    with pytest.raises(RecordError) as caught:
        read_comparisons(path)
    assert (caught.value.reason, caught.value.key) == (reason, key)
    assert str(caught.value).startswith(f"{path}:3: ")
    side = tmp_path / "refused.jsonl"
    result = read_comparisons(path, on_error="skip", refused_file=side)
    assert (result.read, result.used, dict(result.refused), len(result.records)) == (3, 2, {reason: 1}, 2)
    told = json.loads(side.read_text("utf-8"))
    assert (told["line"], told["reason"], told["key"]) == (3, reason, key)


def test_a_prompt_of_the_wrong_type_is_told_both_forms(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="int 7; expected text or a list of messages"):
        read_comparisons(write(tmp_path / "x.jsonl", {**GOOD, "prompt": 7}))


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n" + b'{"prompt": "\xff"}\n')
    assert dict(read_comparisons(path, on_error="skip").refused) == {"not UTF-8": 1}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.binary(max_size=20)
        | st.sampled_from([json.dumps(GOOD).encode(), *(json.dumps(row).encode() for row, _, _ in BAD_ROWS[3:10])]),
        max_size=12,
    )
)
def test_read_is_used_plus_refused(tmp_path: Path, rows: list[bytes]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + b"\n".join(row.replace(b"\n", b"") for row in rows))
    side = tmp_path / "side.jsonl"
    result = read_comparisons(path, on_error="skip", refused_file=side)
    expected = 1 + sum(bool(row.replace(b"\n", b"").strip()) for row in rows)
    assert result.read == expected == result.used + sum(result.refused.values())
    assert len(side.read_text("utf-8").splitlines()) == sum(result.refused.values())


def test_a_line_of_ten_megabytes(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {**GOOD, "prompt": "word " * 2_000_000}, GOOD)
    assert [len(str(record.prompt)) for record in iter_comparisons(path)] == [10_000_000, 1]


def test_a_hundred_thousand_rows_take_seconds(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wt", compresslevel=1) as stream:
        stream.writelines(json.dumps({**GOOD, "prompt": f"q{number}"}) + "\n" for number in range(100_000))
    start = time.process_time()
    assert read_comparisons(path).used == 100_000
    assert time.process_time() - start < 20


def test_reading_streams(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", GOOD, "{broken\n")
    records = iter_comparisons(path)
    assert next(records).judgement == Best(0)
    with pytest.raises(RecordError, match=":2: broken JSON"):
        next(records)


def test_limit_and_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", *[GOOD] * 5)
    result = read_comparisons(path, limit=3)
    assert (result.read, result.used, len(result.records)) == (3, 3, 3)


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        read_comparisons("someone/dataset")
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ValueError, match="there is no row"):
        read_comparisons(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="cannot tell how to read"):
        read_comparisons(write(tmp_path / "x.txt", "hello"))
    with pytest.raises(ValueError, match=r"x\.jsonl:1: the format cannot be told from the keys a, b"):
        read_comparisons(write(tmp_path / "x.jsonl", {"a": 1, "b": 2}))
    with pytest.raises(ValueError, match="unknown format 'hhh'; expected one of plaudit"):
        read_comparisons(tmp_path / "x.jsonl", format="hhh")


def test_damaged_gzip_is_an_error_for_people(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(GOOD) + "\n").encode() * 1000)[:-20])
    with pytest.raises(ValueError, match="damaged gzip"):
        read_comparisons(path)


def test_folders_and_splits(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "train-1.jsonl", "test-0.jsonl"):
        write(tmp_path / name, {**GOOD, "prompt": name})
    (tmp_path / "README.md").write_text("not data")
    assert [record.prompt for record in read_comparisons(tmp_path).records] == [
        "test-0.jsonl", "train-0.jsonl", "train-1.jsonl",
    ]  # fmt: skip
    assert read_comparisons(tmp_path, split="test").read == 1
    with pytest.raises(ValueError, match="begins with 'dev'"):
        read_comparisons(tmp_path, split="dev")
    with pytest.raises(ValueError, match="one file has no split 'test'"):
        read_comparisons(tmp_path / "test-0.jsonl", split="test")


def test_saved_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"prompt": "q", "chosen": "a", "rejected": "b"}])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "two"))
    assert read_comparisons(tmp_path / "one").records[0].completions == ("a", "b")
    assert read_comparisons(tmp_path / "two").read == 2
    assert read_comparisons(tmp_path / "two", split="test").read == 1
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        read_comparisons(tmp_path / "two", split="dev")
    with pytest.raises(ValueError, match="no split 'test'; it is one data set"):
        read_comparisons(tmp_path / "one", split="test")


def test_a_dataset_that_is_a_script_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Dataset scripts are no longer supported, but found webgpt_comparisons.py")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"no longer supported.*give their folder"):
        read_comparisons("openai/webgpt_comparisons", download=True)


def test_group_and_subset_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", {**GOOD, "meta": {"doc": 3}, "kind": "k"})
    record = read_comparisons(path, group_key="meta.doc", subset_key="kind").records[0]
    assert (record.group, record.subset) == ("3", "k")
    with pytest.raises(RecordError, match=r"x\.jsonl:1: missing key in key 'doc'"):
        read_comparisons(path, group_key="doc")


def test_configuration_reads_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "q,one,two,won\nwhy,a,b,two\n")
    columns = ColumnsConfig(prompt="q", completions=("one", "two"), choice="won")
    config = DataConfig(path=str(path), columns=columns)
    assert read_data(config).records == read_comparisons(path, columns=columns).records
    assert read_data(config).records[0].judgement == Ranking(((1,), (0,)))


def test_unknown_columns_lead_to_the_verb_or_the_flags_that_know_them(tmp_path: Path) -> None:
    said = write(tmp_path / "said.jsonl", {"prompt": "a", "completion": "b"})
    with pytest.raises(
        ValueError, match=r"those of demonstrations \(prompt-completion\), which plaudit sft learns from"
    ):
        read_comparisons(said)
    with pytest.raises(ValueError, match=r"those of comparisons \(plaudit\), which plaudit reward learns from"):
        read_demonstrations(write(tmp_path / "judged.jsonl", GOOD))
    with pytest.raises(ValueError, match="--prompt COLUMN --completions COLUMN,COLUMN --choice COLUMN"):
        read_comparisons(write(tmp_path / "own.jsonl", {"asked": 1, "left": 2}))


def test_broken_json_counts_characters_of_its_own_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"x\.jsonl:2: broken JSON: expecting ',' delimiter at character 15 of the line"
    ):
        read_comparisons(write(tmp_path / "x.jsonl", GOOD, '{"prompt": "a"'))


def test_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "prompt,answer_a,answer_b,prefered\na,b,c,a")
    with pytest.raises(ValueError, match=r"missing key in key 'preferred': the row has .*did you mean 'prefered'"):
        read_comparisons(path, columns=ColumnsConfig(choice="preferred"))
