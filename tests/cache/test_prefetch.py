import threading
import time
from collections.abc import Iterator

import pytest

from threetowers.cache.processes.prefetch import prefetch


def test_order_is_kept_and_read_ahead_is_bounded() -> None:
    drawn = []

    def source() -> Iterator[int]:
        for i in range(50):
            drawn.append(i)
            yield i

    for got in prefetch(source(), depth=3):
        assert got == drawn[got]
        assert len(drawn) <= got + 1 + 3
    assert got == 49


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Iterator[int]:
        yield from range(3)
        raise ValueError("the fourth")

    items = prefetch(source(), depth=8)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="the fourth"):
        next(items)


def test_closing_stops_the_thread() -> None:
    before = threading.active_count()
    items = prefetch(iter(range(10**9)), depth=2)
    assert next(items) == 0
    assert threading.active_count() == before + 1
    items.close()
    assert threading.active_count() == before


def test_an_item_is_begun_only_when_one_is_taken() -> None:
    """A source may reuse two buffers at depth 1."""
    begun: list[int] = []

    def source() -> Iterator[int]:
        for i in range(4):
            begun.append(i)
            yield i

    items = prefetch(source(), depth=1)
    assert next(items) == 0
    for taken in range(1, 4):
        time.sleep(0.02)  # the thread has time to run further ahead than it may
        assert begun[-1] == taken
        assert next(items) == taken
    assert list(items) == []


def test_closing_closes_the_source_while_it_waits_for_a_place() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    items = prefetch(source(), depth=2)
    assert next(items) == 1
    items.close()
    assert closed.is_set()
