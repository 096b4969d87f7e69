"""Progress on a terminal as a bar, elsewhere as plain lines; with rate and time left."""

import sys
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from plaudit.training.messages import say


def duration_text(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class ProgressReport:
    """Shows the step, the loss, tokens per second and the time left.

    The rate is taken over the last 50 steps (evaluation and saving included), so that it follows the machine.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        every: int = 10,
        label: str,
        quiet: bool,
        unit: str = "tokens",
    ) -> None:
        self.total_steps, self.every, self.label, self.quiet = total_steps, max(1, every), label, quiet
        self.unit = unit
        self._marks: deque[tuple[float, int, int]] = deque([(time.perf_counter(), first_step, 0)], maxlen=51)
        self._tokens = 0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if not quiet and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(label, total=total_steps, completed=first_step, detail="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self, step: int, *, tokens: int, metrics: Mapping[str, float], at: float | None = None
    ) -> dict[str, float]:
        """Count one step of `tokens` tokens (or of another unit), made now or at that reading of `time.perf_counter`.

        Returns:
            `time/tokens_per_second` and `time/seconds_left`, clock readings for the trackers.
        """
        self._tokens += tokens
        self._marks.append((time.perf_counter() if at is None else at, step, self._tokens))
        (start, first, tokens_before), (now, _, _) = self._marks[0], self._marks[-1]
        elapsed = max(now - start, 1e-9)
        rate = (self._tokens - tokens_before) / elapsed
        left = elapsed / max(1, step - first) * (self.total_steps - step)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        speed = f"{rate:,.0f} {self.unit}/s, {duration_text(left)} left"
        detail = ", ".join(filter(None, [f"{step}/{self.total_steps}", shown, speed]))
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, detail=detail)
        elif not self.quiet and (step % self.every == 0 or step == self.total_steps):
            say(f"{self.label}: step {detail}")
        return {f"time/{self.unit}_per_second": rate, "time/seconds_left": left}

    def note(self, text: str) -> None:
        """One line that stays, above the bar where there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        elif not self.quiet:
            say(f"{self.label}: {text}")
