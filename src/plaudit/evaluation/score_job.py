"""The job behind `plaudit score`: where rows come from, where scores go, and going on after a kill."""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NoReturn

from plaudit.data.sources import Row, iterate_rows, parse_line
from plaudit.evaluation.score_stream import (
    WINDOW_ROWS,
    OnError,
    ScoreTally,
    score_stream,
    write_scores_stream,
)

if TYPE_CHECKING:
    from plaudit.models.reward_model import RewardModel
    from plaudit.rewards.base import Reward

Scorer = Callable[..., Iterator[list[dict[str, Any]]]]
"""From rows to windows of results; takes `on_error`, `window_rows` and `tally`."""

STANDARD_INPUT = "<stdin>"

_LINE_START = b'{"id": '

CHECKED_ROWS = 4
"""How many rows of an earlier run are scored again, to see that it was the same model."""


def score_job(
    model: "RewardModel | None",
    source: str | Path | IO[bytes],
    sink: IO[bytes] | None = None,
    *,
    output: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_error: OnError = "refuse",
    probabilities: bool = False,
    token_budget: int = 8192,
    window_rows: int = WINDOW_ROWS,
    rewards: "Mapping[str, Reward] | None" = None,
    terminal: IO[str] | None = None,
) -> ScoreTally:
    """Score everything that comes from a source.

    Args:
        model: the reward model; None where `rewards` alone are asked for.
        source: a file or folder, or a stream of JSON Lines.
        sink: where lines go, unless `output` names a file.
        output: the file to write.
        resume: go on behind the lines that `output` holds already. Its last, unfinished window is done again.
        overwrite: replace `output`.
        on_error: see `score_stream`.
        probabilities: see `score_stream`.
        token_budget: see `score_stream`.
        window_rows: rows of a window; when resuming, the same as before gives the same bytes.
        rewards: further rewards by name, see `plaudit.evaluation.score_rewards`.
        terminal: where progress is shown while it runs; None shows none.

    Returns:
        What was done.

    Raises:
        ValueError: for a row that cannot be scored (under `refuse`), an output that is in the way, or one that does not
            belong to this input and this model.
    """
    tally = ScoreTally()
    scorer: Scorer
    if rewards or model is None:
        from plaudit.evaluation.score_rewards import score_rewards

        scorer = partial(
            score_rewards, rewards or {}, model=model, probabilities=probabilities, token_budget=token_budget
        )
    else:
        scorer = partial(score_stream, model, probabilities=probabilities, token_budget=token_budget)
    rows: Iterator[Row] = iter(_rows(source))
    with ExitStack() as stack:
        if output is not None:
            sink = stack.enter_context(_open_output(output, resume=resume, overwrite=overwrite))
            if resume:
                rows = _resume(scorer, rows, output, sink, window_rows, tally)
        elif resume:
            raise ValueError("resuming needs the file that holds the scores so far: --output FILE --resume")
        if sink is None:
            raise ValueError("there is nowhere to write to; give a sink or an output file")
        windows = scorer(rows, on_error=on_error, window_rows=window_rows, tally=tally)
        write_scores_stream(windows, sink, tally=tally, progress=_progress(terminal))
        if terminal is not None:
            terminal.write("\r\x1b[K")
    return tally


def load_scoring_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str | None = None,
    too_long: Literal["refuse", "truncate_prompt", "truncate"] | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> "RewardModel":
    """Open a reward model for scoring, on its device, in evaluation mode.

    Args:
        name: folder or Hugging Face name.
        device: `auto`, `cpu`, `cuda`, …; `auto` is the fastest that is there.
        dtype: of the backbone; None is as saved.
        too_long: policy for texts that are too long; None is as saved.
        max_length: most tokens of a text; None is as saved.
        trust_remote_code: whether code in the folder may run.

    Raises:
        ValueError: if it is no reward model or the device is not there.
    """
    import torch

    from plaudit.models.reward_model import RewardModel

    changes: dict[str, Any] = {"too_long": too_long, "max_length": max_length}
    given = {key: value for key, value in changes.items() if value is not None}
    model = RewardModel.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code, **given)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error


def _rows(source: str | Path | IO[bytes]) -> Iterable[Row]:
    if isinstance(source, str | Path):
        return iterate_rows(source)
    lines = enumerate(source, start=1)
    return (parse_line(line, STANDARD_INPUT, number) for number, line in lines if line.strip())


def _open_output(output: Path, *, resume: bool, overwrite: bool) -> IO[bytes]:
    if output.name.endswith(".gz"):
        raise ValueError(f"{output}: scores are written as plain JSON Lines, so that a run can go on; pack them later")
    exists = output.exists() and output.stat().st_size > 0
    if exists and not (resume or overwrite):
        raise ValueError(f"{output} exists; go on with it (--resume), replace it (--overwrite) or name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.open("r+b" if exists and resume else "w+b")


def _resume(
    scorer: Scorer,
    rows: Iterator[Row],
    output: Path,
    file: IO[bytes],
    window_rows: int,
    tally: ScoreTally,
) -> Iterator[Row]:
    """Skip the rows whose lines are whole windows of the output, and put the file's end behind those lines."""
    done, end = _whole_windows(file, output, window_rows)
    file.seek(0)
    samples: list[tuple[Row, dict[str, Any]]] = []
    for number in range(1, done + 1):
        row = next(rows, None)
        if row is None:
            raise ValueError(f"{output} holds {done} lines, the input only {number - 1} rows; it is another input's")
        line = _parse(file.readline(), output, number)
        identity = None if row.value is None else row.value.get("id")
        if line.get("id") != identity and not (line.get("id") is None and "error" in line):
            raise ValueError(
                f"{output}:{number}: id {line.get('id')!r}, but {row.place} has {identity!r}; another input"
            )
        if "error" not in line and len(samples) < CHECKED_ROWS:
            samples.append((row, line))
    _check_same_model(scorer, samples, output)
    file.seek(end)
    file.truncate()
    tally.resumed = done
    return rows


def _whole_windows(file: IO[bytes], output: Path, window_rows: int) -> tuple[int, int]:
    """How many complete lines make whole windows, and where in the file the last of them ends.

    Every line is looked at, since what follows the whole windows will be cut off: no other file may be.
    """
    done = end = place = 0
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            if line[: len(_LINE_START)] != _LINE_START[: len(line)]:
                _refuse_line(output, number)
            break
        _parse(line, output, number)
        place += len(line)
        if number % window_rows == 0:
            done, end = number, place
    return done, end


def _parse(line: bytes, output: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not {"raw", "rewards", "error"} & set(value):
        _refuse_line(output, number)
    return value


def _refuse_line(output: Path, number: int) -> NoReturn:
    raise ValueError(f"{output}:{number}: not a line that this command wrote; name another file")


def _check_same_model(scorer: Scorer, samples: list[tuple[Row, dict[str, Any]]], output: Path) -> None:
    windows = scorer([row for row, _ in samples], on_error="skip")
    for (_, old), new in zip(samples, chain.from_iterable(windows), strict=True):
        if set(old) != set(new) or set(old.get("rewards", ())) != set(new.get("rewards", ())):
            raise ValueError(
                f"{output} was written with other options: it has {_names(old)}, now there would be {_names(new)}"
            )
        key = "raw" if "raw" in old else "rewards"
        before, now = _numbers(old[key]), _numbers(new[key])
        same = len(before) == len(now)
        if not same or any(abs(a - b) > 0.02 * max(1.0, abs(a)) for a, b in zip(before, now, strict=True)):
            raise ValueError(f"{output} was written by another model: {key} {old[key]} before, {new[key]} now")


def _names(result: dict[str, Any]) -> list[str]:
    return sorted([*result, *(f"rewards/{name}" for name in result.get("rewards", ()))])


def _numbers(value: Any) -> list[float]:
    """Every number below, in order; what is missing is left out."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [] if value is None else [float(value)]


def _progress(terminal: IO[str] | None) -> Any:
    if terminal is None:
        return None
    shown = 0.0

    def show(tally: ScoreTally) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < 0.5:
            return
        shown = now
        rate = tally.rows / max(tally.seconds, 1e-9)
        terminal.write(f"\r\x1b[K{tally.resumed + tally.rows} rows, {rate:.1f} rows/s")
        terminal.flush()

    return show


def say(text: str) -> None:
    """One line for people, on the standard error stream, since the standard output holds the scores."""
    sys.stderr.write(text + "\n")
