"""The one on-disk form: records to and from plain objects, and files written whole or not at all."""

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from plaudit.data.fields import list_of, messages_of, need, number_of, object_of, optional_number, optional_text, show
from plaudit.data.records import (
    Best,
    Comparison,
    Demonstration,
    Judgement,
    Labels,
    Prompt,
    Ranking,
    Ratings,
    RecordError,
    Scores,
    Votes,
)
from plaudit.data.validation import validate_comparison, validate_demonstration

JUDGEMENT_KEYS = ("ranking", "best", "votes", "scores", "labels", "ratings")

#: The role that marks plain text where a Parquet column of messages has to hold it.
TEXT_ROLE = "text"


def comparison_to_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as an object with exactly the documented keys; what is left at its default is left out."""
    value: dict[str, Any] = {} if comparison.id is None else {"id": comparison.id}
    value["prompt"] = prompt_to_json(comparison.prompt)
    value["completions"] = list(comparison.completions)
    value |= judgement_to_json(comparison.judgement)
    for key in ("annotator", "margin", "group", "subset"):
        if getattr(comparison, key) is not None:
            value[key] = getattr(comparison, key)
    if comparison.weight != 1.0:
        value["weight"] = comparison.weight
    if comparison.images:
        value["images"] = list(comparison.images)
    return value


def judgement_to_json(judgement: Judgement) -> dict[str, Any]:
    """A judgement under its key, e.g. `{"ranking": [[2], [0, 3], [1]]}`."""
    match judgement:
        case Ranking(tiers):
            return {"ranking": [list(tier) for tier in tiers]}
        case Best(index):
            return {"best": index}
        case Votes(counts):
            return {"votes": list(counts)}
        case Scores(values=numbers):
            return {"scores": list(numbers)}
        case Labels(values):
            return {"labels": list(values)}
        case Ratings(attributes):
            return {"ratings": {name: list(values) for name, values in attributes.items()}}


def comparison_from_json(value: Mapping[str, Any]) -> Comparison:
    """The comparison in an object of the documented form (not yet validated); keys it does not know are left alone.

    Raises:
        RecordError: for a missing key, a wrong type, or none or several judgements.
    """
    completions = list_of(value, "completions", expected="a list of texts")
    images = value.get("images")
    return Comparison(
        prompt=_prompt_from_json(need(value, "prompt", "text or a list of messages")),
        completions=tuple(completions),
        judgement=judgement_from_json(value),
        id=optional_text(value, "id"),
        annotator=optional_text(value, "annotator"),
        weight=1.0 if value.get("weight") is None else number_of(value, "weight"),
        margin=optional_number(value, "margin"),
        images=() if images is None else tuple(list_of(value, "images", expected="a list of paths")),
        group=optional_text(value, "group"),
        subset=optional_text(value, "subset"),
    )


def judgement_from_json(value: Mapping[str, Any]) -> Judgement:
    """The one judgement that an object holds."""
    present = [key for key in JUDGEMENT_KEYS if value.get(key) is not None]
    if len(present) != 1:
        raise RecordError(
            "several judgements" if present else "no judgement",
            key=", ".join(present),
            problem="" if present else f"the row has {', '.join(sorted(map(str, value))[:12])}",
            expected=f"exactly one of {', '.join(JUDGEMENT_KEYS)}",
        )
    key = present[0]
    if key == "best":
        return Best(value["best"])
    if key == "ranking":
        tiers = list_of(value, key, expected="tiers of completion indices, best first, e.g. [[2], [0, 3], [1]]")
        return Ranking(tuple(tuple(tier) if isinstance(tier, list) else tier for tier in tiers))
    if key == "ratings":
        named = object_of(value[key], key, "an object of named lists")
        lists = {name: list_of(named, name, "ratings.") for name in named if named[name] is not None}
        return Ratings({str(name): _numbers(values, f"ratings.{name}") for name, values in lists.items()})
    values = list_of(value, key, expected="a list, one entry per completion")
    if key == "labels":
        return Labels(tuple(values))
    numbers = _numbers(values, key)
    return Scores(numbers) if key == "scores" else Votes(numbers)  # type: ignore[arg-type]  # validated later


def demonstration_to_json(demonstration: Demonstration) -> dict[str, Any]:
    """A demonstration as `{"prompt", "completion"}` with optional `id`, `weight`, `group`."""
    value: dict[str, Any] = {} if demonstration.id is None else {"id": demonstration.id}
    value |= {"prompt": prompt_to_json(demonstration.prompt), "completion": demonstration.completion}
    if demonstration.weight != 1.0:
        value["weight"] = demonstration.weight
    if demonstration.group is not None:
        value["group"] = demonstration.group
    return value


def write_comparisons(records: Iterable[Comparison], path: str | Path) -> int:
    """Write comparisons as JSON Lines (`.jsonl`, `.jsonl.gz`) or Parquet (`.parquet`), each checked first.

    The file appears whole or not at all. JSON Lines are written as they come; Parquet is collected first.

    Returns:
        How many records were written.

    Raises:
        RecordError: (a ValueError) for a record that does not hold what a comparison promises.
        ValueError: for another ending.
    """

    def checked() -> Iterator[dict[str, Any]]:
        for number, record in enumerate(records, start=1):
            try:
                validate_comparison(record)
            except RecordError as error:
                error.place = f"record {number}" + (f" (id {record.id})" if record.id else "")
                raise
            yield comparison_to_json(record)

    return _write(checked(), Path(path))


def write_demonstrations(records: Iterable[Demonstration], path: str | Path) -> int:
    """Write demonstrations like `write_comparisons` does; returns how many."""

    def checked() -> Iterator[dict[str, Any]]:
        for record in records:
            validate_demonstration(record)
            yield demonstration_to_json(record)

    return _write(checked(), Path(path))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    if path.is_dir():
        raise ValueError(f"{path}: this is a folder; name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(rows: Iterable[dict[str, Any]], path: Path) -> int:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return _write_parquet(list(rows), path)
    if not name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        raise ValueError(f"{path}: cannot tell the form to write; expected an ending of .jsonl, .jsonl.gz or .parquet")
    count = 0
    with replacing(path) as temporary, temporary.open("wb") as raw:
        # No name and no time in the gzip header: the same records give the same bytes.
        stream: IO[bytes] = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if name.endswith(".gz") else raw  # type: ignore[assignment]
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            count += 1
        if stream is not raw:
            stream.close()
    return count


def _write_parquet(rows: list[dict[str, Any]], path: Path) -> int:
    import pyarrow
    import pyarrow.parquet

    text, number = pyarrow.string(), pyarrow.float64()
    messages = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)]))
    as_messages = any(not isinstance(row["prompt"], str) for row in rows)
    if as_messages:
        rows = [{**row, "prompt": _marked(row["prompt"])} for row in rows]
    attributes = sorted({name for row in rows for name in row.get("ratings", ())})
    types = {
        "id": text, "prompt": messages if as_messages else text, "completions": pyarrow.list_(text), "completion": text,
        "ranking": pyarrow.list_(pyarrow.list_(pyarrow.int64())), "best": pyarrow.int64(),
        "votes": pyarrow.list_(number), "scores": pyarrow.list_(number), "labels": pyarrow.list_(pyarrow.bool_()),
        "ratings": pyarrow.struct([(name, pyarrow.list_(number)) for name in attributes]), "annotator": text,
        "margin": number, "weight": number, "images": pyarrow.list_(text), "group": text, "subset": text,
    }  # fmt: skip
    used = [key for key in types if any(key in row for row in rows)]
    schema = pyarrow.schema([(key, types[key]) for key in used])
    with replacing(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), temporary)
    return len(rows)


def _marked(prompt: Any) -> Any:
    return [{"role": TEXT_ROLE, "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_to_json(prompt: Prompt) -> Any:
    """The prompt as it stands in a file: text, or a list of `{"role", "content"}`."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": message.role, "content": message.content} for message in prompt]


def _prompt_from_json(value: object) -> Prompt:
    if isinstance(value, str):
        return value
    messages = messages_of(value, "prompt", "text or a list of messages")
    if len(messages) == 1 and messages[0].role == TEXT_ROLE:
        return messages[0].content
    return messages


def _numbers(values: Iterable[object], key: str) -> tuple[float | None, ...]:
    numbers: list[float | None] = []
    for index, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise RecordError("wrong type", key=f"{key}[{index}]", problem=show(value), expected="a number or null")
        numbers.append(None if value is None else number_of({"": value}, "", f"{key}[{index}]"))
    return tuple(numbers)
