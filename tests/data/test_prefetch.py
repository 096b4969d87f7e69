"""Work ahead: same items, same order, bounded, exceptions in their place, no thread left behind."""

import threading
import time
from collections.abc import Iterator

import pytest

from plaudit.data.prefetch import prefetched


def alive() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "plaudit-prefetch"]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_same_items_in_order(depth: int) -> None:
    with prefetched((n * n for n in range(50)), depth) as stream:
        assert list(stream) == [n * n for n in range(50)]
        assert list(stream) == []
    assert not alive()


@pytest.mark.parametrize("depth", [0, 2])
def test_an_exception_comes_in_its_place_with_its_trace(depth: int) -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("record 3 is broken")

    seen = []
    with prefetched(source(), depth) as stream:
        seen += [next(stream), next(stream)]
        with pytest.raises(ValueError, match="record 3 is broken") as caught:
            next(stream)
    assert seen == [1, 2]
    assert caught.traceback[-1].name == "source"
    assert not alive()


def test_it_works_ahead_but_not_too_far() -> None:
    made = []

    def source() -> Iterator[int]:
        for n in range(100):
            made.append(n)
            yield n

    with prefetched(source(), 3) as stream:
        assert next(stream) == 0
        deadline = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        # Item 0 is taken, three wait, one is in the thread's hands.
        assert made == list(range(5))
    assert not alive()


def test_leaving_early_closes_the_source_and_ends_the_thread() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    def interrupted() -> None:
        with prefetched(source(), 2) as stream:
            next(stream)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert closed.is_set()
    assert not alive()


def test_it_overlaps_the_two_sides() -> None:
    def source() -> Iterator[int]:
        for n in range(10):
            time.sleep(0.02)
            yield n

    def seconds(depth: int) -> float:
        started = time.perf_counter()
        with prefetched(source(), depth) as stream:
            for _ in stream:
                time.sleep(0.02)
        return time.perf_counter() - started

    assert seconds(2) < 0.8 * seconds(0)


def test_a_negative_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="prefetch is -1"), prefetched([], -1):
        pass
