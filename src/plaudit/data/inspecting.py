"""The jobs behind `plaudit data inspect` and `plaudit data convert`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from plaudit.configs.data import DataConfig
from plaudit.data.audit import Audit, audit_comparisons
from plaudit.data.audit_page import audit_page, audit_table
from plaudit.data.io import (
    Tally,
    iter_comparisons,
    iter_demonstrations,
    read_data,
    write_comparisons,
    write_demonstrations,
)
from plaudit.data.native import replacing
from plaudit.data.records import Comparison, Demonstration

Record = TypeVar("Record", Comparison, Demonstration)


def inspect_data(
    config: DataConfig, *, html: Path | None = None, json_file: Path | None = None, floor: bool = True
) -> Audit:
    """Audit the records of a configuration; print the table, write the page and the JSON where asked.

    `json_file` `-` puts the JSON on the standard output in place of the table.

    Raises:
        ValueError: from the reader, with file and line; or where nothing could be read.
    """
    result = read_data(config)
    _keep_or_remove(config.refused_file, result)
    audit = audit_comparisons(result.records, tally=result, source=config.path, floor=floor)
    text = json.dumps(audit.to_json(), ensure_ascii=True, indent=2)
    console = Console()
    if json_file is not None and str(json_file) == "-":
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(audit_table(audit))
    notes = Console(stderr=True)
    for path, content in ((json_file, text + "\n"), (html, audit_page(audit) if html else "")):
        if path is not None and str(path) != "-":
            with replacing(path) as temporary:
                temporary.write_text(content, encoding="utf-8")
            notes.print(f"wrote {path}", markup=False, soft_wrap=True)
    _say_refused(config, result, notes)
    return audit


def convert_data(config: DataConfig, out: Path, *, demonstrations: bool = False) -> Tally:
    """Read the records of a configuration and write them to `out` in Plaudit's own form; streams unless merging.

    Raises:
        ValueError: from the reader or the writer, for options that mean nothing to demonstrations, or where not one
            row could be used; then `out` is left as it was.
    """
    if demonstrations and (config.columns or config.subset_key or config.annotators == "merge"):
        raise ValueError("demonstrations have no named columns, no subset and no annotators to merge; leave those out")
    settings = config.model_dump(exclude={"columns", "annotators", "path"})
    tally = Tally()
    if demonstrations:
        settings.pop("subset_key")
        count = write_demonstrations(
            _some(iter_demonstrations(config.path, **settings, tally=tally), config, tally), out
        )
    elif config.annotators == "merge":
        tally = result = read_data(config)
        count = write_comparisons(_some(iter(result.records), config, tally), out)
    else:
        records = iter_comparisons(config.path, **settings, columns=config.columns, tally=tally)
        count = write_comparisons(_some(records, config, tally), out)
    _keep_or_remove(config.refused_file, tally)
    notes = Console(stderr=True)
    notes.print(f"{tally.summary()}; wrote {count} records to {out}", markup=False, highlight=False, soft_wrap=True)
    _say_refused(config, tally, notes)
    return tally


def _some(records: Iterator[Record], config: DataConfig, tally: Tally) -> Iterator[Record]:
    """The records; refuses to go on with none at all, which would leave an empty file behind."""
    first = next(records, None)
    if first is None:
        raise ValueError(f"{config.path}: no record to write: {tally.summary()}; the first: {tally.problems[0]}")
    yield first
    yield from records


def _keep_or_remove(refused_file: str | None, tally: Tally) -> None:
    if refused_file is not None and not tally.refused:
        Path(refused_file).unlink(missing_ok=True)


def _say_refused(config: DataConfig, tally: Tally, notes: Console) -> None:
    if not tally.refused:
        return
    for problem in tally.problems[:3]:
        notes.print(f"refused: {problem}", markup=False, highlight=False, soft_wrap=True)
    rest = sum(tally.refused.values()) - min(3, len(tally.problems))
    more = f"and {rest} more; " if rest > 0 else ""
    where = f"all of them in {config.refused_file}" if config.refused_file else "counted by reason above"
    notes.print(f"{more}{where}", markup=False, highlight=False, soft_wrap=True)
