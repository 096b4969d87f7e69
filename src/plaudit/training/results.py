"""What a training job hands back, and writes as `result.json`."""

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from plaudit.models.quiet import quiet_loading
from plaudit.training.checkpoints import publish_directory

ENDS = ("epochs", "max_steps", "patience", "iterations", "guard")
"""What ends a run that saves its model: the data, a limit, held-out records; in alignment its iterations or a guard."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        output: the run's folder.
        model_folder: the saved model; None when a signal stopped the run before its end.
        stopped_by: one of `ENDS`, or the name of a signal.
        steps: optimizer steps done.
        best_step: the step whose weights were kept as the best; -1 without held-out records.
        tokens: tokens put through the network in training.
        seconds: wall-clock time of this process, preparation included.
        metrics: the held-out metrics of the kept weights; empty without held-out records.
        records: for each kind of records, how many were read and used, and the refused by reason.
        model: the model itself, in evaluation mode.
    """

    output: Path
    model_folder: Path | None
    stopped_by: str
    steps: int
    best_step: int
    tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    model: Any = field(default=None, repr=False)

    @property
    def complete(self) -> bool:
        """True unless a signal stopped the run."""
        return self.model_folder is not None

    @property
    def exit_code(self) -> int:
        """What a command that ran this should end with: 0, or 128 plus the number of the signal that stopped it.

        So SIGTERM gives 143 and Ctrl-C 130, as shells and schedulers expect: nothing that needs the model starts.
        """
        return 0 if self.complete else 128 + signal.Signals[self.stopped_by].value

    def write(self) -> None:
        """Write `result.json`: every field but the model."""
        values = {name: value for name, value in vars(self).items() if name != "model"}
        values = {name: asdict(value) if is_dataclass(value) else value for name, value in values.items()}  # type: ignore[arg-type]
        values = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
        (self.output / "result.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def save_whole(save: Callable[[Path], object], folder: Path) -> Path:
    """Let `save` fill a folder beside its final place, then rename it: a kill leaves no half a model behind."""
    partial = folder.with_name(f".partial-{folder.name}")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    with quiet_loading():
        save(partial)
    publish_directory(partial, folder)
    return folder


def count_table(**counts: Any) -> dict[str, dict[str, Any]]:
    """`RecordCounts` by kind as plain dicts for `TrainingResult.records`."""
    return {kind: {**asdict(each), "refused": dict(each.refused)} for kind, each in counts.items()}
