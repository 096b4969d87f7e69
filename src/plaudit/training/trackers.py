"""Metrics go to one JSON Lines file always, and to other trackers by name behind the same two methods."""

import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from plaudit.data.sources import whole_lines

TIMING_PREFIX = "time/"


class Tracker(Protocol):
    """Anything that takes numbers by step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of optimizer step `step`."""

    def flush(self) -> None:
        """Make sure that all that was logged survives a crash of the machine, as far as the tracker can."""

    def close(self) -> None:
        """Finish the run."""


class JsonlTracker:
    """One JSON object per line: `{"step": …, "loss": …}`. Not-finite numbers are written as null.

    On resume the lines after `resume_step` are cut off, so that the file ends as if the run had never stopped.
    Names under `time/` are clock readings and differ from run to run; everything else is repeated bit by bit.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resume_step is None else _lines_until(path, resume_step)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line and hand it to the operating system, so that it survives a kill of the process."""
        self.write(step, {name: value if value - value == 0 else None for name, value in metrics.items()})

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """The same for a row of anything that JSON holds, such as a sampled text."""
        self._file.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")
        self._file.flush()

    def flush(self) -> None:
        """Write through to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write through and close the file."""
        self.flush()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, one dict per logged step; a line cut off by a kill at the end is left out."""
    return [json.loads(line) for line in whole_lines(path)]


class TensorboardTracker:
    """Scalars in TensorBoard's event files under `<output>/tensorboard`; on resume, later ones are purged."""

    def __init__(self, output: Path, run_name: str, settings: dict[str, Any], resume_step: int | None) -> None:
        writer = _optional("torch.utils.tensorboard", "tensorboard").SummaryWriter
        purge = None if resume_step is None else resume_step + 1
        self._writer = writer(log_dir=str(output / "tensorboard"), purge_step=purge)
        self._writer.add_text("configuration", f"```json\n{json.dumps(settings, indent=1)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One scalar per metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write the events out."""
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run in the project `plaudit`; offline or online as its own environment variables say.

    The run's id is kept in `<output>/wandb-run-id.txt`, so that a resumed job continues the same run.
    """

    module_name = "wandb"

    def __init__(self, output: Path, run_name: str, settings: dict[str, Any], resume_step: int | None) -> None:
        module = _optional(self.module_name, self.module_name)
        identity = output / "wandb-run-id.txt"
        known = identity.read_text(encoding="utf-8").strip() if resume_step is not None and identity.exists() else None
        self._run = module.init(
            project="plaudit", name=run_name, config=settings, dir=str(output), id=known, resume="allow"
        )
        identity.write_text(str(self._run.id), encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics of the step in one call."""
        self._run.log(dict(metrics), step=step)

    def flush(self) -> None:
        """The service sends on its own thread."""

    def close(self) -> None:
        """Wait for the upload and end the run."""
        self._run.finish()


class TrackioTracker:
    """A Trackio run in the project `plaudit`; local unless its own settings say otherwise."""

    def __init__(self, output: Path, run_name: str, settings: dict[str, Any], resume_step: int | None) -> None:
        self._module = _optional("trackio", "trackio")
        resume = "never" if resume_step is None else "allow"
        self._module.init(project="plaudit", name=run_name, config=settings, resume=resume)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics of the step in one call."""
        self._module.log(dict(metrics), step=step)

    def flush(self) -> None:
        """The service writes on its own thread."""

    def close(self) -> None:
        """End the run."""
        self._module.finish()


class MlflowTracker:
    """An MLflow run in the experiment `plaudit`; where to is MLflow's own tracking URI.

    The run's id is kept in `<output>/mlflow-run-id.txt`, so that a resumed job continues the same run.
    """

    def __init__(self, output: Path, run_name: str, settings: dict[str, Any], resume_step: int | None) -> None:
        self._module = _optional("mlflow", "mlflow")
        identity = output / "mlflow-run-id.txt"
        known = identity.read_text(encoding="utf-8").strip() if resume_step is not None and identity.exists() else None
        self._module.set_experiment("plaudit")
        run = self._module.start_run(run_id=known, run_name=None if known else run_name)
        identity.write_text(str(run.info.run_id), encoding="utf-8")
        if known is None:
            self._module.log_dict(settings, "configuration.json")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """All metrics of the step in one call."""
        self._module.log_metrics(dict(metrics), step=step)

    def flush(self) -> None:
        """Every call is already a request."""

    def close(self) -> None:
        """End the run."""
        self._module.end_run()


TRACKERS: dict[str, Callable[[Path, str, dict[str, Any], int | None], Tracker]] = {
    "tensorboard": TensorboardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
    "mlflow": MlflowTracker,
}


class Trackers:
    """The JSON Lines file and every tracker asked for by name, as one."""

    def __init__(
        self,
        names: Sequence[str],
        output: Path,
        *,
        settings: dict[str, Any],
        resume_step: int | None = None,
    ) -> None:
        unknown = [name for name in names if name not in TRACKERS]
        if unknown:
            raise ValueError(f"tracker {unknown[0]!r} is unknown: use any of {', '.join(TRACKERS)}")
        output.mkdir(parents=True, exist_ok=True)
        self._all: list[Tracker] = [JsonlTracker(output / "metrics.jsonl", resume_step=resume_step)]
        self._all += [TRACKERS[name](output, output.name, settings, resume_step) for name in names]

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the metrics of one step to each tracker."""
        for tracker in self._all:
            tracker.log(step, metrics)

    def flush(self) -> None:
        """Flush each tracker."""
        for tracker in self._all:
            tracker.flush()

    def close(self) -> None:
        """Close each tracker, the last one first."""
        for tracker in reversed(self._all):
            tracker.close()


def _optional(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"tracker {extra!r} is not installed: pip install 'plaudit[{extra}]'") from error


def _lines_until(path: Path, step: int) -> list[str]:
    return [line for line in whole_lines(path) if json.loads(line)["step"] <= step] if path.exists() else []
