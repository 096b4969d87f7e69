"""Reading and writing records: any known format in, validated comparisons and demonstrations out.

    result = read_comparisons("choices.csv", on_error="skip")
    result.records, result.read, result.used, result.refused

Reading streams: one row (or one group of rows) is held at a time, and always `read == used + refused`.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from plaudit.configs.data import Annotators, ColumnsConfig, DataConfig, OnError
from plaudit.data.annotators import merge_annotators
from plaudit.data.fields import look_up, nothing_to_compare, optional_text
from plaudit.data.formats import COMPARISON_FORMATS, DEMONSTRATION_FORMATS, Format, recognise, unrecognised_hint
from plaudit.data.formats_table import read_table
from plaudit.data.native import write_comparisons, write_demonstrations
from plaudit.data.records import Comparison, Demonstration, PromptRecord, RecordError
from plaudit.data.sources import Row, iterate_rows
from plaudit.data.validation import validate_comparison, validate_demonstration

__all__ = [
    "ReadResult",
    "Tally",
    "iter_comparisons",
    "iter_demonstrations",
    "read_comparisons",
    "read_data",
    "read_demonstration_data",
    "read_demonstrations",
    "write_comparisons",
    "write_demonstrations",
]

Record = TypeVar("Record", Comparison, Demonstration, PromptRecord)

#: Rows that are looked at before giving up on recognising a format.
ROWS_TO_RECOGNISE = 50
#: Faults kept in full in a tally; the counts and the side file always hold them all.
KEPT_PROBLEMS = 1000


@dataclass
class Tally:
    """What became of every row: `read == used + sum(refused.values())` at any time.

    Attributes:
        read: rows that stood in the source (blank lines are no rows); a tree counts once for each of its groups.
        used: rows that went into a record.
        refused: how many rows could not be used, by reason.
        problems: the first of them in full, with place, key and expectation.
        formats: the format of each file.
    """

    read: int = 0
    used: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    problems: list[RecordError] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for people: rows read, used, and refused by reason."""
        refused = sum(self.refused.values())
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.refused.most_common())
        return f"{self.read} rows read, {self.used} used, {refused} refused" + (f" ({reasons})" if reasons else "")


@dataclass
class ReadResult(Tally, Generic[Record]):
    """A tally together with the records that the used rows gave."""

    records: list[Record] = field(default_factory=list)


def read_comparisons(
    path: str | Path,
    *,
    format: str | None = None,
    on_error: OnError = "refuse",
    annotators: Annotators = "apart",
    limit: int | None = None,
    group_key: str | None = None,
    subset_key: str | None = None,
    columns: ColumnsConfig | None = None,
    refused_file: str | Path | None = None,
    split: str | None = None,
    download: bool = False,
) -> ReadResult[Comparison]:
    """Read every comparison of a file, folder or dataset.

    Args:
        path: a file, a folder, or (with `download`) the name of a Hugging Face dataset.
        format: a name from `plaudit.data.formats.COMPARISON_FORMATS`; by default recognised by the columns.
        on_error: `refuse` raises at the first row that cannot be used, `skip` counts it by reason and goes on.
        annotators: `apart` keeps one comparison per annotator, `merge` joins those of the same completions.
        limit: read at most this many rows.
        group_key: (dotted) key whose value becomes `group`, which splits never divide.
        subset_key: (dotted) key whose value becomes `subset`, reported apart.
        columns: which columns hold what, for tables in no known format.
        refused_file: where rows that cannot be used are written (JSON Lines: file, line, reason, key, row).
        split: of a folder or dataset, only the part of this name.
        download: whether a name that is no local path may be fetched.

    Raises:
        RecordError: (a ValueError) with file, line, key, problem and expectation, under `on_error="refuse"`.
        ValueError: where there is nothing to read or no format fits.
    """
    result: ReadResult[Comparison] = ReadResult()
    result.records.extend(
        iter_comparisons(
            path, format=format, on_error=on_error, limit=limit, group_key=group_key, subset_key=subset_key,
            columns=columns, refused_file=refused_file, split=split, download=download, tally=result,
        )
    )  # fmt: skip
    if annotators == "merge":
        result.records = merge_annotators(result.records)
    return result


def iter_comparisons(
    path: str | Path,
    *,
    format: str | None = None,
    on_error: OnError = "refuse",
    limit: int | None = None,
    group_key: str | None = None,
    subset_key: str | None = None,
    columns: ColumnsConfig | None = None,
    refused_file: str | Path | None = None,
    split: str | None = None,
    download: bool = False,
    tally: Tally | None = None,
) -> Iterator[Comparison]:
    """Like `read_comparisons`, one comparison at a time in constant memory, annotators apart; counts go to `tally`."""
    formats = COMPARISON_FORMATS
    if columns is not None:
        if format not in (None, "table"):
            raise ValueError(f"columns are named, which makes it a table; leave out the format {format!r} or the names")
        formats = {"table": replace(formats["table"], read=lambda row: read_table(row, columns), recognise=_always)}

    def finish(record: Comparison, row: Mapping[str, Any]) -> Comparison:
        identity = record.id or optional_text(row, "id")
        group = str(look_up(row, group_key)) if group_key else record.group
        subset = str(look_up(row, subset_key)) if subset_key else record.subset or _plain_text(row.get("subset"))
        if (identity, group, subset) != (record.id, record.group, record.subset):
            record = replace(record, id=identity, group=group, subset=subset)
        validate_comparison(record)
        return record

    rows = iterate_rows(path, split=split, download=download)
    engine = Engine(formats, format, on_error, finish, tally or Tally(), limit)
    yield from engine.run(rows, refused_file, str(path))


def read_demonstrations(
    path: str | Path,
    *,
    format: str | None = None,
    on_error: OnError = "refuse",
    limit: int | None = None,
    group_key: str | None = None,
    refused_file: str | Path | None = None,
    split: str | None = None,
    download: bool = False,
) -> ReadResult[Demonstration]:
    """Read every demonstration of a file, folder or dataset; arguments and errors as in `read_comparisons`."""
    result: ReadResult[Demonstration] = ReadResult()
    result.records.extend(
        iter_demonstrations(
            path, format=format, on_error=on_error, limit=limit, group_key=group_key,
            refused_file=refused_file, split=split, download=download, tally=result,
        )
    )  # fmt: skip
    return result


def iter_demonstrations(
    path: str | Path,
    *,
    format: str | None = None,
    on_error: OnError = "refuse",
    limit: int | None = None,
    group_key: str | None = None,
    refused_file: str | Path | None = None,
    split: str | None = None,
    download: bool = False,
    tally: Tally | None = None,
) -> Iterator[Demonstration]:
    """Like `read_demonstrations`, one at a time in constant memory; counts go to `tally`."""

    def finish(record: Demonstration, row: Mapping[str, Any]) -> Demonstration:
        if group_key:
            record = replace(record, group=str(look_up(row, group_key)))
        validate_demonstration(record)
        return record

    rows = iterate_rows(path, split=split, download=download)
    engine = Engine(DEMONSTRATION_FORMATS, format, on_error, finish, tally or Tally(), limit)
    yield from engine.run(rows, refused_file, str(path))


def read_data(config: DataConfig) -> ReadResult[Comparison]:
    """`read_comparisons` with everything taken from a configuration."""
    return read_comparisons(**config.model_dump(exclude={"columns"}), columns=config.columns)


def read_demonstration_data(config: DataConfig) -> ReadResult[Demonstration]:
    """`read_demonstrations` with everything taken from a configuration."""
    return read_demonstrations(**config.model_dump(exclude={"columns", "annotators", "subset_key"}))


class Engine(Generic[Record]):
    """Rows in, records out: recognises each file's format, groups rows where it must, counts and reports."""

    def __init__(
        self,
        formats: Mapping[str, Format[Record]],
        format_name: str | None,
        on_error: OnError,
        finish: Callable[[Record, Mapping[str, Any]], Record],
        tally: Tally,
        limit: int | None,
    ) -> None:
        if format_name is not None and format_name not in formats:
            raise ValueError(f"unknown format {format_name!r}; expected one of {', '.join(formats)}")
        self.formats: Mapping[str, Format[Record]] = formats
        self.finish: Callable[[Record, Mapping[str, Any]], Record] = finish
        self.format_name, self.on_error, self.tally, self.limit = format_name, on_error, tally, limit
        self.side: IO[str] | None = None
        self.rows = 0

    def run(self, rows: Iterable[Row], refused_file: str | Path | None, source: str) -> Iterator[Record]:
        """Every record of the rows, in order."""
        with ExitStack() as stack:
            if refused_file is not None:
                Path(refused_file).parent.mkdir(parents=True, exist_ok=True)
                self.side = stack.enter_context(open(refused_file, "w", encoding="utf-8"))
            for file_rows in self._by_file(rows):
                yield from self._read_file(file_rows)
            if self.tally.read == 0:
                raise ValueError(f"{source}: there is no row in it")

    def _by_file(self, rows: Iterable[Row]) -> Iterator[Iterator[Row]]:
        """The rows of each file as an iterator of its own; counts what is read and stops at the limit."""
        source = iter(rows)
        pending: list[Row] = []

        def one_file(first: Row) -> Iterator[Row]:
            row: Row | None = first
            while row is not None and row.file == first.file:
                if self.limit is not None and self.rows >= self.limit:
                    return
                self.rows += 1
                self.tally.read += 1
                yield row
                row = next(source, None)
            if row is not None:
                pending.append(row)

        following = next(source, None)
        while following is not None and (self.limit is None or self.rows < self.limit):
            yield one_file(following)
            following = pending.pop() if pending else None

    def _read_file(self, rows: Iterator[Row]) -> Iterator[Record]:
        waiting: list[Row] = []
        name = self.format_name
        for row in rows:
            waiting.append(row)
            if name is None and row.value is not None:
                name = recognise(row.value, self.formats)
            if name is not None or len(waiting) >= ROWS_TO_RECOGNISE:
                break
        if name is None:
            yield from self._unrecognised(waiting, rows)
            return
        self.tally.formats[waiting[0].file] = name
        form = self.formats[name]
        everything = _chained(waiting, rows)
        yield from self._read_grouped(form, everything) if form.read_group else self._read_single(form, everything)

    def _unrecognised(self, waiting: list[Row], rows: Iterator[Row]) -> Iterator[Record]:
        parsed = next((row for row in waiting if row.value is not None), None)
        if parsed is not None and parsed.value is not None:
            keys = ", ".join(map(str, parsed.value))
            raise ValueError(
                f"{parsed.place}: the format cannot be told from the keys {keys}; "
                f"{unrecognised_hint(parsed.value, self.formats)}"
            )
        for row in _chained(waiting, rows):
            self._refuse(row, row.error or RecordError("not recognised"))
        yield from ()

    def _read_single(self, form: Format[Record], rows: Iterable[Row]) -> Iterator[Record]:
        assert form.read is not None
        for row in rows:
            try:
                if row.error is not None or row.value is None:
                    raise row.error or RecordError("not a JSON object")
                found = form.read(row.value)
                if not found:
                    raise nothing_to_compare()
                parts = [[each] for each in found] if form.collection else [found]
            except RecordError as error:
                self._refuse(row, error)
                continue
            self.tally.read += len(parts) - 1
            for part in parts:
                yield from self._finished(row, part)

    def _finished(self, row: Row, part: Sequence[Record | RecordError]) -> list[Record]:
        """The records of a row, or of one group in it, checked; none where one of them cannot be used."""
        assert row.value is not None
        records = []
        try:
            for each in part:
                if isinstance(each, RecordError):
                    raise each
                records.append(self.finish(each, row.value))
        except RecordError as error:
            self._refuse(row, error)
            return []
        self.tally.used += 1
        return records

    def _read_grouped(self, form: Format[Record], rows: Iterable[Row]) -> Iterator[Record]:
        assert form.group_by is not None
        group: list[Row] = []
        current: object = None
        for row in rows:
            if row.error is not None or row.value is None:
                self._refuse(row, row.error or RecordError("not a JSON object"))
                continue
            key = form.group_by(row.value)
            if group and key != current:
                yield from self._read_group(form, group)
                group = []
            group.append(row)
            current = key
        if group:
            yield from self._read_group(form, group)

    def _read_group(self, form: Format[Record], rows: list[Row]) -> list[Record]:
        """The records of rows that belong together; where one of the records does not hold, all of its rows go."""
        assert form.read_group is not None
        values = [row.value for row in rows if row.value is not None]
        try:
            found, faults = form.read_group(values)
            records = [self.finish(record, values[0]) for record in found]
        except RecordError as error:
            found, records, faults = [], [], dict.fromkeys(range(len(rows)), error)
        if not records and not faults:
            faults = dict.fromkeys(range(len(rows)), nothing_to_compare())
        for index, fault in sorted(faults.items()):
            self._refuse(rows[index], fault)
        self.tally.used += len(rows) - len(faults)
        return records

    def _refuse(self, row: Row, error: RecordError) -> None:
        if not error.place or error.place != row.place:
            error = RecordError(error.reason, key=error.key, problem=error.problem, expected=error.expected,
                                place=row.place, is_fault=error.is_fault)  # fmt: skip
        if self.on_error == "refuse" and error.is_fault:
            raise error
        self.tally.refused[error.reason] += 1
        if len(self.tally.problems) < KEPT_PROBLEMS:
            self.tally.problems.append(error)
        if self.side is not None:
            content = {"row": row.value} if row.value is not None else {"raw": row.raw}
            told = {"file": row.file, "line": row.line, "reason": error.reason, "key": error.key, "message": str(error)}
            # Escaped, because what is refused may hold half characters that no file can hold.
            self.side.write(json.dumps(told | content, ensure_ascii=True, default=str) + "\n")


def _chained(first: Iterable[Row], rest: Iterable[Row]) -> Iterator[Row]:
    yield from first
    yield from rest


def _always(row: Mapping[str, Any]) -> bool:
    return True


def _plain_text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
