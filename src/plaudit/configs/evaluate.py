"""Measuring reward models."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from plaudit.configs.base import Config


class EvaluateRewardConfig(Config):
    """Measure one or more reward models on what people said: accuracy, calibration, floors, shortcuts."""

    models: tuple[str, ...] = ()
    """Reward models: a folder or name each, or `name=folder` to say how it is called in the report."""
    scores: tuple[str, ...] = ()
    """Scores made earlier instead of models: `name=file.jsonl`, one line `{"id": …, "scores": [one per completion]}`
    per comparison, matched by id where every line has one, else by order."""

    data: tuple[str, ...] = ()
    """Files, folders or dataset names of comparisons to measure on; nothing that the models were trained on."""
    format: str | None = None
    """The reader of `data` and `train_data`; None recognises it from the columns."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """Stop at the first record that cannot be read, or skip such records and count them by reason."""
    annotators: Literal["merge", "apart"] = "apart"
    """Several annotators of the same completions: one comparison each, or merged into votes."""
    limit: int | None = Field(default=None, gt=0)
    """Read at most this many records of each source."""
    group_key: str | None = None
    """Key (dots for nested ones) of what belongs together, such as `doc` or `tree`; intervals redraw it as a whole."""
    subset_key: str | None = None
    """Key whose value names the part of the data that is reported apart."""
    tie_threshold: float = Field(default=0.0, ge=0)
    """Human scores that differ by less than this count as tied; 0 ties only equal ones."""

    floors: tuple[Literal["length", "bag_of_words"], ...] = ("length", "bag_of_words")
    """What every model is held against: length alone, and a bag of words."""
    train_data: tuple[str, ...] = ()
    """Comparisons to fit the floors to (the models' training data). Without them the floors are fitted on `data`
    itself, in folds by prompt or group, each scored by floors that never saw it."""
    floor_folds: int = Field(default=5, ge=2)
    """Number of those folds."""

    cluster_by: Literal["auto", "prompt", "group", "record"] = "auto"
    """What the bootstrap redraws as a whole: `auto` is the group where there is one, else the prompt."""
    resamples: int = Field(default=2000, ge=0)
    """Resamples of the bootstrap; 0 gives no intervals."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """How often an interval should hold."""
    bins: int = Field(default=10, ge=2)
    """Bins of equal mass for calibration."""
    seed: int = 0
    """Seed of the bootstrap and of the floors' folds."""

    probes: bool = True
    """Change preferred answers so that they are no better (flattery, padding, repetition, empty, generic) and see
    what the models pay for it; needs `models`, not `scores`."""
    probe_file: Path | None = None
    """YAML list of `{name, change, text}` that replaces the English probes, for example in another language."""
    probe_limit: int = Field(default=200, gt=0)
    """Probe at most this many answers, spread over the data."""
    rewardbench: Literal[1, 2] | None = None
    """Also score by the rules of RewardBench 1 or 2; the data must be in its format."""
    examples: int = Field(default=12, ge=0)
    """How many of the most confidently wrong pairs to show per model."""

    token_budget: int = Field(default=8192, gt=0)
    """Most tokens in one forward pass."""
    too_long: Literal["refuse", "truncate_prompt", "truncate"] | None = None
    """Texts longer than the model reads: `refuse` leaves them out of every number and counts them,
    `truncate_prompt` cuts the prompt from the left, `truncate` completions too; None is as the model was trained."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`, …; `auto` takes an accelerator where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision to load models in; None keeps theirs."""

    output: Path = Path("runs/evaluation")
    """Folder of `report.html`, `report.json`, the CSV tables, the plots and the scores."""

    @model_validator(mode="after")
    def _check(self) -> "EvaluateRewardConfig":
        if not self.models and not self.scores:
            raise ValueError("nothing to evaluate: name a model, or give --scores name=file.jsonl")
        if not self.data:
            raise ValueError("nothing to evaluate on: give --data with comparisons")
        names = self.named_sources()
        repeated = sorted({name for name, _ in names if [other for other, _ in names].count(name) > 1})
        if repeated:
            raise ValueError(f"two models are called {repeated[0]!r}; tell them apart with name=folder")
        taken = sorted({name for name, _ in names} & set(self.floors))
        if taken:
            raise ValueError(f"a model cannot be called {taken[0]!r}, that is the name of a floor")
        return self

    def named_sources(self) -> list[tuple[str, str]]:
        """`(name, folder or file)` of every model and then of every file of scores."""
        return [named_source(source) for source in (*self.models, *self.scores)]


def named_source(source: str) -> tuple[str, str]:
    """`name=place`, or the last part of a place as its name (of `runs/a/model` it is `a`)."""
    name, separator, place = source.partition("=")
    if separator and name and place:
        return name, place
    parts = [part for part in Path(source).parts if part not in ("/", "..", ".")]
    if len(parts) > 1 and parts[-1] in ("model", "scores.jsonl"):
        return parts[-2], source
    return (Path(parts[-1]).name.removesuffix(".gz").removesuffix(".jsonl") if parts else source), source
