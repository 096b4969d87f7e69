"""Work ahead: a background thread makes the next few items while the current one is used."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

Item = TypeVar("Item")

_POLL_SECONDS = 0.1


@contextmanager
def prefetched(items: Iterable[Item], depth: int = 2) -> Iterator[Iterator[Item]]:
    """The same items in the same order, up to `depth` of them made ahead by a background thread.

    What the items depend on is unchanged: the thread only iterates earlier. So a source that is a pure function of its
    place (a schedule) stays one, and a run that is broken off and resumed sees the same items. The source must not draw
    from global random state, which the user of the items draws from as well.

    Args:
        items: where they come from; iterated in the thread, from first to last.
        depth: most items that wait; 0 makes each when it is asked for, without a thread.

    Yields:
        An iterator. An exception of the source is raised in its place, after the items before it. On leaving the block,
        for whatever reason, the thread stops after the item under way and is waited for; a generator is closed.

    Raises:
        ValueError: if `depth` is negative.
    """
    if depth < 0:
        raise ValueError(f"prefetch is {depth}; it must be 0 (no thread) or more")
    if depth == 0:
        yield iter(items)
        return
    worker = _Worker(items, depth)
    worker.thread.start()
    try:
        yield worker.results()
    finally:
        worker.stop()


@dataclass(frozen=True)
class _Entry(Generic[Item]):
    """One item, or the error that came instead of it."""

    items: tuple[Item, ...]
    error: BaseException | None = None


class _Worker(Generic[Item]):
    """A thread that iterates, a bounded queue between it and the user, and a flag that ends both."""

    def __init__(self, items: Iterable[Item], depth: int) -> None:
        self.items = items
        # None at the end.
        self.queue: Queue[_Entry[Item] | None] = Queue(depth)
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._work, name="plaudit-prefetch", daemon=True)

    def _work(self) -> None:
        iterator = iter(self.items)
        try:
            for item in iterator:
                if not self._put(_Entry((item,))):
                    return
            self._put(None)
        except BaseException as error:
            self._put(_Entry((), error))
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def _put(self, entry: "_Entry[Item] | None") -> bool:
        """Wait for room; False once nobody will read any more."""
        while not self.stopped.is_set():
            try:
                self.queue.put(entry, timeout=_POLL_SECONDS)
            except Full:
                continue
            return True
        return False

    def results(self) -> Iterator[Item]:
        while (entry := self._get()) is not None:
            if entry.error is not None:
                raise entry.error
            yield from entry.items

    def _get(self) -> "_Entry[Item] | None":
        while True:
            try:
                return self.queue.get(timeout=_POLL_SECONDS)
            except Empty:
                if self.stopped.is_set():
                    return None
                if not self.thread.is_alive() and self.queue.empty():
                    raise RuntimeError("the thread that makes batches ahead has died without a word") from None

    def stop(self) -> None:
        """End the thread and wait for it."""
        self.stopped.set()
        self.thread.join()
