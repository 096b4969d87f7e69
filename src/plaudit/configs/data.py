"""Where records come from, how they are read, and how they are split. Never imports torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from plaudit.configs.base import Config

OnError = Literal["refuse", "skip"]
Annotators = Literal["apart", "merge"]
SplitKey = Literal["prompt", "group"]


class ColumnsConfig(Config):
    """Which columns of a table (CSV, TSV, Parquet, JSON Lines) hold what, for data in no known format.

    A judgement is given in one of four ways: `choice` (one column that names the better completion), `scores` or
    `ranks` (one column per completion), or `label` (good or bad, for one completion).
    """

    prompt: str = "prompt"
    """Column with the prompt."""
    completions: tuple[str, ...] = ()
    """Columns with the completions, one each. Empty: found by a common beginning (`answer_`, `response_`, …)."""
    choice: str | None = None
    """Column that says which completion is better: a completion column's name, or its ending (`a` for `answer_a`)."""
    choices: dict[str, str] = Field(default_factory=dict)
    """What each value in the choice column means: a completion column's name, or `tie`; e.g. `{"1": "answer_a"}`."""
    scores: tuple[str, ...] = ()
    """Columns with a number per completion, higher is better, in the order of `completions`; empty cells: unjudged."""
    ranks: tuple[str, ...] = ()
    """Columns with a rank per completion, 1 is best, equal ranks tie; empty cells are unjudged."""
    label: str | None = None
    """Column with good (true, yes, 1) or bad (false, no, 0), for one completion column."""
    id: str | None = None
    """Column with a name for the row."""
    annotator: str | None = None
    """Column with the annotator."""
    weight: str | None = None
    """Column with the weight of the row."""

    @model_validator(mode="after")
    def _one_judgement(self) -> Self:
        given = [name for name in ("choice", "scores", "ranks", "label") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"columns for more than one judgement: {', '.join(given)}; give one of them")
        for name in ("scores", "ranks"):
            columns = getattr(self, name)
            if columns and self.completions and len(columns) != len(self.completions):
                raise ValueError(f"{len(columns)} columns in {name} for {len(self.completions)} completion columns")
        return self


class DataConfig(Config):
    """One source of records: where it is, what form it has, and what happens to rows that cannot be used."""

    path: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet; .gz too), a folder of them, or the name of a dataset."""
    format: str | None = None
    """Name of the format (see docs/data.md). By default it is recognised by its columns."""
    on_error: OnError = "refuse"
    """`refuse` stops at the first row that cannot be used; `skip` counts such rows by reason and goes on."""
    refused_file: str | None = None
    """With `on_error: skip`, the rows that could not be used are written here, with file, line and reason."""
    annotators: Annotators = "apart"
    """`apart` keeps one comparison per annotator; `merge` joins those of the same completions into votes or means."""
    group_key: str | None = None
    """Key (dots for nested ones) whose value must never be split between training and test, such as `doc` or `tree`."""
    subset_key: str | None = None
    """Key whose value names the part of the data that a row belongs to, reported apart in evaluations."""
    columns: ColumnsConfig | None = None
    """Which columns hold what, for tables in no known format."""
    split: str | None = None
    """Of a folder or dataset, only the part with this name (`train`, `test`)."""
    download: bool = False
    """If the path is not local, whether to download the Hugging Face dataset of that name."""
    limit: int | None = Field(default=None, ge=1)
    """Read at most this many rows."""


class SplitConfig(Config):
    """How records are split, stably: a record stays on its side when the data grows."""

    key: SplitKey = "prompt"
    """`prompt` keeps all records with the same first user turn together; `group` keeps groups together as well."""
    fractions: dict[str, float] = Field(default_factory=lambda: {"train": 0.9, "test": 0.1})
    """Name of each part and its share of the prompts (or groups); the shares sum to 1."""
    seed: int = 0
    """A different seed gives a different split."""

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        if any(share < 0 for share in self.fractions.values()) or abs(sum(self.fractions.values()) - 1) > 1e-6:
            raise ValueError(f"fractions {self.fractions} must be ≥ 0 and sum to 1")
        return self
