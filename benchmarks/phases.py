"""Time by phase of an iteration, for workers that know nothing of it: functions are wrapped from outside."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from lockstep import synchronise


class Phases:
    """Seconds by phase, one table per optimizer step, and the tokens that were sampled.

    Attributes:
        steps: for each finished iteration its seconds by phase.
        tokens: for each finished iteration how many tokens were sampled.
    """

    def __init__(self, *, device: str = "cpu") -> None:
        """Nothing is timed yet; the clock is the processor's for work of the CPU, else the one on the wall."""
        self._clock = time.process_time if device == "cpu" else _wall
        self.steps: list[dict[str, float]] = []
        self.tokens: list[int] = []
        self._now: Counter[str] = Counter()
        self._sampled = 0

    def wrap(self, owner: Any, name: str, phase: str, *, when: Callable[[], bool] = lambda: True) -> None:
        """Time a function or method as part of a phase, where `when` says so."""
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not when():
                return original(*args, **kwargs)
            started = self._clock()
            found = original(*args, **kwargs)
            self._now[phase] += self._clock() - started
            return found

        setattr(owner, name, timed)

    def sampled(self, tokens: int) -> None:
        """Count tokens of this iteration."""
        self._sampled += tokens

    def end(self) -> None:
        """The iteration is over."""
        self.steps.append(dict(self._now))
        self.tokens.append(self._sampled)
        self._now, self._sampled = Counter(), 0


def _wall() -> float:
    """The time on the wall once the accelerator has done what it was given."""
    synchronise()
    return time.perf_counter()
