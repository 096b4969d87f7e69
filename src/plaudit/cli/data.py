"""`plaudit data inspect` and `plaudit data convert`: look at records, and write them in Plaudit's own form."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from plaudit.configs.base import load_config
from plaudit.configs.data import Annotators, DataConfig, OnError


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the input is read."""

    format: str | None = None
    "Name of the format (docs/data.md lists them). By default it is recognised by its columns."
    on_error: OnError = "refuse"
    "At a row that cannot be used: `refuse` stops there, `skip` counts it by reason and goes on."
    refused_file: Path | None = None
    "With `--on-error skip`: where such rows are written. By default `<name>.refused.jsonl`, if there are any."
    group_key: str | None = None
    "Key whose value must never be split between training and test, such as `doc` or `tree`."
    subset_key: str | None = None
    "Key whose value names the part of the data that a row belongs to."
    split: str | None = None
    "Of a folder or dataset, only this part (`train`, `test`)."
    download: bool = False
    "If the path is not local, download the Hugging Face dataset of that name."
    limit: int | None = None
    "Read at most this many rows."
    prompt: str | None = None
    "Your own table: column with the prompt."
    completions: str | None = None
    "Your own table: columns with the completions, separated by commas, such as `answer_a,answer_b`."
    choice: str | None = None
    "Your own table: column that names the better completion (`answer_a`, or just `a`; `tie`)."
    choices: str | None = None
    "Your own table: what the values of that column mean, such as `1=answer_a,2=answer_b,0=tie`."
    scores: str | None = None
    "Your own table: columns with a score per completion, higher is better, separated by commas."
    ranks: str | None = None
    "Your own table: columns with a rank per completion, 1 is best, separated by commas."
    label: str | None = None
    "Your own table: column with good or bad, for one completion column."
    annotator: str | None = None
    "Your own table: column with the annotator."

    def config(self, path: str, refused_file: Path, annotators: Annotators = "apart") -> DataConfig:
        """The configuration that these flags stand for."""
        side = self.refused_file or refused_file
        given = {
            "path": path,
            "format": self.format,
            "on_error": self.on_error,
            "refused_file": str(side) if self.on_error == "skip" else None,
            "annotators": annotators,
            "group_key": self.group_key,
            "subset_key": self.subset_key,
            "columns": self.columns(),
            "split": self.split,
            "download": self.download,
            "limit": self.limit,
        }
        return load_config(DataConfig, overrides=given)

    def columns(self) -> dict[str, object] | None:
        """The named columns, or None where none was named."""
        given: dict[str, object] = {
            name: value for name in ("prompt", "choice", "label", "annotator") if (value := getattr(self, name))
        }
        for name in ("completions", "scores", "ranks"):
            if getattr(self, name):
                given[name] = tuple(column.strip() for column in getattr(self, name).split(","))
        if self.choices:
            pairs = [meaning.partition("=") for meaning in self.choices.split(",")]
            if not all(sign for _, sign, _ in pairs):
                raise ValueError(f"--choices {self.choices}: expected value=column pairs, such as 1=answer_a,0=tie")
            given["choices"] = {value.strip(): column.strip() for value, _, column in pairs}
        return given or None


def inspect(
    path: str,
    /,
    *,
    html: Path | None = None,
    json: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    floor: bool = True,
    reading: Annotated[Reading | None, Parameter(name="*")] = None,
) -> None:
    """Audit comparisons: counts, lengths, ties, contradictions, cycles, biases, agreement, floors.

    Parameters
    ----------
    path
        A file, a folder, or (with `--download`) the name of a Hugging Face dataset.
    html
        Write the audit as one HTML page with plots.
    json
        Write the audit as JSON; `-` writes it to the standard output instead of the table.
    floor
        Fit the bag-of-words floor (the slowest part).
    """
    from plaudit.data.inspecting import inspect_data

    flags = reading or Reading()
    name = Path(path).name or "data"
    inspect_data(flags.config(path, Path(f"{name}.refused.jsonl")), html=html, json_file=json, floor=floor)


def convert(
    path: str,
    out: Path,
    /,
    *,
    annotators: Annotators = "apart",
    demonstrations: bool = False,
    reading: Annotated[Reading | None, Parameter(name="*")] = None,
) -> None:
    """Read any known format and write Plaudit's own form: `.jsonl`, `.jsonl.gz` or `.parquet`.

    Parameters
    ----------
    path
        A file, a folder, or (with `--download`) the name of a Hugging Face dataset.
    out
        The file to write.
    annotators
        `merge` joins the judgements of the same completions into votes (or means); `apart` keeps them.
    demonstrations
        Read and write demonstrations (a prompt and a completion) instead of comparisons.
    """
    from plaudit.data.inspecting import convert_data

    flags = reading or Reading()
    beside = out.with_name(f"{out.name.split('.')[0]}.refused.jsonl")
    convert_data(flags.config(path, beside, annotators), out, demonstrations=demonstrations)
