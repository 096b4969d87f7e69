"""SIGTERM and SIGINT as a request: the run finishes what it must, saves, and leaves with a message."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from plaudit.training.messages import say


class RunStopped(Exception):
    """A signal asks the run to stop here, where it can be saved.

    Attributes:
        signal: its name.
    """

    def __init__(self, signal: str) -> None:
        super().__init__(signal)
        self.signal = signal


class StopRequest:
    """A context in which the first SIGTERM or SIGINT sets `requested` to the signal's name and a second one kills.

    The previous handlers come back on leaving. Where one is entered within another, for a job that is a part of
    another, a signal asks both. Outside the main thread, where Python forbids handlers, it never
    requests anything.

    Attributes:
        requested: the signal's name, once there was one.
        patient: whether later signals are ignored: a launcher such as torchrun passes on what its processes may have
            got already, and kills by itself those that take too long.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.requested: str | None = None
        self.patient = patient
        self._previous: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._request) or signal.SIG_DFL
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.requested is None or self.patient:
            for number, handler in self._previous.items():
                signal.signal(number, handler)

    def heed(self) -> None:
        """Stop here if there was a signal.

        Raises:
            RunStopped: if there was one.
        """
        if self.requested is not None:
            raise RunStopped(self.requested)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            return
        self.requested = signal.Signals(number).name
        if self.patient:
            return
        say(f"{self.requested}: saving a checkpoint before stopping (once more to stop at once)")
        self._give_way()

    def _give_way(self) -> None:
        """Put back the handlers that a second signal goes to: past outer requests, which have heard it now as well."""
        for number, handler in self._previous.items():
            while isinstance(outer := getattr(handler, "__self__", None), StopRequest):
                outer.requested = self.requested
                handler = outer._previous[number]
            signal.signal(number, handler)
