"""Rows out of files: one streaming iterator over JSON Lines, JSON, CSV, Parquet, folders and datasets by name.

A row is what stood in the file, not yet understood. A row that cannot even be parsed is still a row: it carries its
`RecordError`, so that nothing is dropped in silence.
"""

import csv
import gzip
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from plaudit.data.records import RecordError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        file: the file or dataset it came from.
        line: its line (JSON Lines, CSV) or its number (JSON, Parquet, datasets), from 1.
        value: what stood there, or None where that could not be parsed.
        error: why it could not be parsed.
        raw: the line as it stood there, where it could not be parsed.
    """

    file: str
    line: int
    value: Mapping[str, Any] | None
    error: RecordError | None = None
    raw: str | None = None

    @property
    def place(self) -> str:
        """`file:line`, as editors and terminals understand it."""
        return f"{self.file}:{self.line}"


def iterate_rows(path: str | Path, *, split: str | None = None, download: bool = False) -> Iterator[Row]:
    """Every row of a file, a folder, or (only where `download`) of a Hugging Face dataset, one at a time.

    Args:
        path: a file, a folder of files or a folder written by `datasets.save_to_disk`, or a dataset's name.
        split: of a folder or dataset, only the part with this name.
        download: whether a name that is no local path may be looked up on the Hugging Face hub.

    Raises:
        ValueError: if nothing is there, or the kind of file is unknown.
    """
    local = Path(path)
    if local.is_dir():
        if (local / "state.json").exists() or (local / "dataset_dict.json").exists():
            yield from _saved_dataset(local, split)
            return
        for file in files_of(local, split):
            yield from iterate_file(file)
    elif local.exists():
        if split is not None:
            raise ValueError(f"{path}: one file has no split '{split}'; give its folder, or leave the split out")
        yield from iterate_file(local)
    elif download:
        yield from _named_dataset(str(path), split)
    else:
        raise ValueError(
            f"{path}: no such file or folder. Give a path that exists; if it is the name of a Hugging Face dataset, "
            f"allow the download (with plaudit data --download, elsewhere --data '{{path: {path}, download: true}}')"
        )


def files_of(folder: Path, split: str | None = None) -> list[Path]:
    """The readable files below a folder, in alphabetical order; with `split`, those whose name (or whose folder's
    name) begins with it.

    Raises:
        ValueError: if there is none.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and kind_of(file) is not None)
    if split is not None:
        files = [file for file in files if any(part.startswith(split) for part in file.relative_to(folder).parts)]
    if not files:
        wanted = f" whose name begins with '{split}'" if split else ""
        raise ValueError(f"{folder}: no file{wanted} with an ending that can be read ({', '.join(SUFFIXES)}, also .gz)")
    return files


def kind_of(file: Path) -> str | None:
    """The ending that says how to read a file, without `.gz`; None where it is not known."""
    name = file.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def iterate_file(file: Path) -> Iterator[Row]:
    """Every row of one file."""
    kind = kind_of(file)
    if kind in (".jsonl", ".ndjson"):
        yield from _json_lines(file)
    elif kind == ".json":
        yield from _json(file)
    elif kind in (".csv", ".tsv"):
        yield from _csv(file, "\t" if kind == ".tsv" else None)
    elif kind == ".parquet":
        yield from _parquet(file)
    else:
        raise ValueError(f"{file}: cannot tell how to read it; expected an ending of {', '.join(SUFFIXES)}, also .gz")


@contextmanager
def open_bytes(file: Path) -> Iterator[IO[bytes]]:
    """A file to be read as bytes, unpacked where it is gzip (told by its first bytes, not by its name)."""
    with file.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        if not packed:
            yield raw
            return
        try:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield cast(IO[bytes], unpacked)
        except (EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{file}: damaged gzip file ({error}); fetch or write it again") from None


def parse_line(line: bytes, file: str, number: int) -> Row:
    """One line of JSON Lines as a row; whatever is wrong with it is in the row's `error`."""

    def broken(reason: str, problem: str, expected: str = "one JSON object per line") -> Row:
        error = RecordError(reason, problem=problem, expected=expected, place=f"{file}:{number}")
        return Row(file, number, None, error, line.decode(errors="backslashreplace").rstrip("\r\n"))

    try:
        value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except UnicodeDecodeError as error:
        return broken("not UTF-8", f"byte {error.start + 1} of the line", "a file in UTF-8")
    except RecursionError:
        return broken("broken JSON", "nested too deeply")
    except json.JSONDecodeError as error:
        # Its own words count lines within this one line.
        return broken("broken JSON", f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos + 1} of the line")
    except ValueError as error:
        return broken("broken JSON", str(error))
    if not isinstance(value, dict):
        return broken("not a JSON object", f"{type(value).__name__}")
    return Row(file, number, value)


def whole_lines(path: Path) -> list[str]:
    """The lines, each with its end, of a file that a run adds lines to; a last one that a kill has cut off is left out.

    `str.splitlines` would also break texts at U+2028 and its kin, which JSON leaves as they are.
    """
    whole, end, _ = path.read_bytes().rpartition(b"\n")
    return [f"{line}\n" for line in whole.decode("utf-8").split("\n")] if end else []


def _json_lines(file: Path) -> Iterator[Row]:
    with open_bytes(file) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield parse_line(line, str(file), number)


def _json(file: Path) -> Iterator[Row]:
    """A JSON file: a list of objects, an object with one list of objects, or JSON Lines under the wrong name."""
    with open_bytes(file) as stream:
        content = stream.read()
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except ValueError:
        lines = content.splitlines()
        if len(lines) > 1 and parse_line(lines[0], str(file), 1).value is not None:
            yield from (parse_line(line, str(file), n) for n, line in enumerate(lines, start=1) if line.strip())
            return
        row = parse_line(content, str(file), 1)
        raise ValueError(f"{file}: broken JSON: {row.error.problem if row.error else ''}") from None
    rows = value
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list)]
        rows = lists[0] if len(lists) == 1 and len(value) == 1 else [value]
    if not isinstance(rows, list):
        raise ValueError(f"{file}: a JSON {type(value).__name__}; expected a list of objects")
    for number, row in enumerate(rows, start=1):
        yield _as_row(row, str(file), number)


def _csv(file: Path, delimiter: str | None) -> Iterator[Row]:
    """Rows of a table; without a delimiter, that of the header: a semicolon or tab where it has no comma."""
    csv.field_size_limit(sys.maxsize)
    with open_bytes(file) as stream:
        # Surrogates stand for bytes that are no UTF-8; the row that holds them is refused, not the whole file.
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        first = text.readline()
        if delimiter is None:
            delimiter = next((mark for mark in ",;\t" if mark in first), ",")
        reader = csv.reader(chain([first] if first else [], text), delimiter=delimiter, strict=True)
        header: list[str] | None = None
        line = 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                problem = RecordError("broken CSV", problem=str(error), expected="quoted cells", place=f"{file}:{line}")
                yield Row(str(file), line, None, problem)
                line = reader.line_num + 1
                continue
            if cells is None:
                return
            if header is None:
                header = _checked_header(cells, file)
            elif cells:
                yield _csv_row(header, cells, str(file), line)
            line = reader.line_num + 1


def _checked_header(cells: list[str], file: Path) -> list[str]:
    if _has_foreign_bytes(cells):
        raise ValueError(f"{file}:1: not UTF-8; expected a file in UTF-8 (in Excel, save it as 'CSV UTF-8')")
    header = [cell.strip() for cell in cells]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise ValueError(f"{file}:1: column {repeated[0]!r} stands there twice; rename one of them")
    return header


def _csv_row(header: list[str], cells: list[str], file: str, line: int) -> Row:
    problem: RecordError | None = None
    if len(cells) != len(header):
        problem = RecordError(
            "wrong number of cells",
            problem=f"{len(cells)} cells",
            place=f"{file}:{line}",
            expected=f"{len(header)}, as in the header (quote cells that hold the delimiter)",
        )
    elif _has_foreign_bytes(cells):
        problem = RecordError(
            "not UTF-8", expected="a file in UTF-8 (in Excel, save it as 'CSV UTF-8')", place=f"{file}:{line}"
        )
    if problem is not None:
        return Row(file, line, None, problem, ",".join(cells))
    return Row(file, line, dict(zip(header, cells, strict=True)))


def _has_foreign_bytes(cells: list[str]) -> bool:
    return any(not cell.isascii() and any("\udc80" <= character <= "\udcff" for character in cell) for cell in cells)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield _as_row(row, str(file), number)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file that can be read ({error})") from None


def _saved_dataset(folder: Path, split: str | None) -> Iterator[Row]:
    import datasets

    dataset = datasets.load_from_disk(str(folder))
    if split is not None and not isinstance(dataset, dict) and str(dataset.split) != split:
        raise ValueError(f"{folder}: no split '{split}'; it is one data set without splits")
    yield from _dataset_rows(dataset, str(folder), split)


def _named_dataset(name: str, split: str | None) -> Iterator[Row]:
    """Stream a dataset from the Hugging Face hub; `name:configuration` picks a configuration."""
    import datasets

    if os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        raise ValueError(f"{name}: no such file or folder, and downloads are switched off (HF_HUB_OFFLINE)")
    path, _, configuration = name.partition(":")
    try:
        dataset = datasets.load_dataset(path, configuration or None, split=split, streaming=True)
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise ValueError(f"{name}: neither a local path nor a dataset that could be reached ({error})") from None
    except RuntimeError as error:
        # Old datasets that are a script (WebGPT, summarize from feedback): `datasets` no longer runs those.
        raise ValueError(f"{name}: {error}. Fetch its files yourself and give their folder") from None
    yield from _dataset_rows(dataset, name, split)


def _dataset_rows(dataset: Any, name: str, split: str | None) -> Iterator[Row]:
    if isinstance(dataset, dict):
        if split is not None and split not in dataset:
            raise ValueError(f"{name}: no split '{split}'; it has {', '.join(dataset)}")
        parts: Iterable[tuple[str, Any]] = [(split, dataset[split])] if split is not None else dataset.items()
        for part, rows in parts:
            for number, row in enumerate(rows, start=1):
                yield _as_row(row, f"{name}[{part}]", number)
        return
    for number, row in enumerate(dataset, start=1):
        yield _as_row(row, name, number)


def _as_row(value: Any, file: str, number: int) -> Row:
    if isinstance(value, dict):
        return Row(file, number, value)
    error = RecordError(
        "not a JSON object", problem=type(value).__name__, expected="an object", place=f"{file}:{number}"
    )
    return Row(file, number, None, error, repr(value)[:1000])
