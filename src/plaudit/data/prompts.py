"""Prompts to be answered, out of whatever holds some: plain prompts, demonstrations, comparisons."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from plaudit.configs.data import ColumnsConfig, DataConfig
from plaudit.data.fields import look_up, optional_text, prompt_of
from plaudit.data.formats import COMPARISON_FORMATS, DEMONSTRATION_FORMATS, Format, Row
from plaudit.data.io import Engine, ReadResult
from plaudit.data.records import Comparison, Demonstration, PromptRecord, RecordError
from plaudit.data.sources import iterate_rows
from plaudit.data.validation import check_prompt


def read_prompts(config: DataConfig) -> ReadResult[PromptRecord]:
    """Every prompt of a file, folder or dataset; one that is repeated is kept once, with its first columns.

    A row with a `prompt` (text or messages) gives that, its other keys as columns; `columns.prompt` names another key
    than `prompt`. Rows of any known format of demonstrations or comparisons give the prompts of those, the whole row as
    columns (of what is spread over rows, or is a tree, nothing). `read` and `used` count rows.

    Raises:
        RecordError: (a ValueError) with file and line, under `on_error: refuse`.
        ValueError: where there is nothing to read or no format fits.
    """
    formats = prompt_formats() if config.columns is None else {"columns": _named(config.columns)}
    if config.columns is not None and config.format is not None:
        raise ValueError(f"format: {config.format}: with columns the rows are read by these; leave one of the two out")

    def finish(record: PromptRecord, row: Mapping[str, Any]) -> PromptRecord:
        if config.group_key:
            record = replace(record, group=str(look_up(row, config.group_key)))
        check_prompt(record.prompt)
        return record

    result: ReadResult[PromptRecord] = ReadResult()
    rows = iterate_rows(config.path, split=config.split, download=config.download)
    engine = Engine(formats, config.format, config.on_error, finish, result, config.limit)
    result.records = unique_prompts(list(engine.run(rows, config.refused_file, config.path)))
    return result


def unique_prompts(records: Sequence[PromptRecord]) -> list[PromptRecord]:
    """The first record of every prompt, in order."""
    found: dict[object, PromptRecord] = {}
    for record in records:
        found.setdefault(record.prompt, record)
    return list(found.values())


def _read_prompt(row: Row, key: str = "prompt", name: str = "id") -> list[PromptRecord]:
    columns = {other: value for other, value in row.items() if other != key}
    prompt = prompt_of(row.get(key), key)
    return [
        PromptRecord(prompt=prompt, id=optional_text(row, name), group=optional_text(row, "group"), columns=columns)
    ]


def _named(columns: ColumnsConfig) -> Format[PromptRecord]:
    """The format of rows whose prompt stands under a key of its own.

    Raises:
        ValueError: for other columns than `prompt` and `id`.
    """
    if others := sorted(columns.model_fields_set - {"prompt", "id"}):
        raise ValueError(f"columns.{others[0]}: of prompts only the columns prompt and id are named; leave it out")
    key, name = columns.prompt, columns.id or "id"
    return Format(f"prompts under {key!r}", lambda row: True, lambda row: _read_prompt(row, key, name))


def _prompts_of(form: Format[Comparison] | Format[Demonstration]) -> Format[PromptRecord]:
    """The format of the same rows, of which only the prompts are taken."""

    def kept(found: Sequence[Comparison | Demonstration | RecordError]) -> list[PromptRecord | RecordError]:
        return [
            each if isinstance(each, RecordError) else PromptRecord(prompt=each.prompt, id=each.id, group=each.group)
            for each in found
        ]

    read, read_group = form.read, form.read_group

    def from_row(row: Row) -> list[PromptRecord | RecordError]:
        assert read is not None
        found = kept(read(row))
        if form.collection:
            return found
        return [each if isinstance(each, RecordError) else replace(each, columns=dict(row)) for each in found]

    def from_group(rows: Sequence[Row]) -> tuple[list[PromptRecord], dict[int, RecordError]]:
        assert read_group is not None
        records, faults = read_group(rows)
        return [each for each in kept(records) if isinstance(each, PromptRecord)], faults

    return Format(
        form.about,
        form.recognise,
        None if read is None else from_row,
        form.group_by,
        None if read_group is None else from_group,
        form.collection,
    )


def prompt_formats() -> dict[str, Format[PromptRecord]]:
    """Formats that prompts are read from by name, in the order in which they are asked."""
    plain = Format(
        "prompt, as text or messages, beside whatever else",
        lambda row: isinstance(row.get("prompt"), str | list),
        _read_prompt,
    )
    known = {name: _prompts_of(form) for name, form in COMPARISON_FORMATS.items()}
    return {"prompt": plain} | {name: _prompts_of(form) for name, form in DEMONSTRATION_FORMATS.items()} | known
