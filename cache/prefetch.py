"""Run an iterator in a thread, a bounded number of items ahead of its consumer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


def prefetch(source: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yield what `source` yields, in order; it is advanced in a thread, at most `depth` items ahead.

    An exception in `source` is raised here, after the items before it. Closing this generator stops the thread.
    """
    items: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: tuple[T] | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for item in source:
                if not put((item,)):
                    return
            put(None)
        except BaseException as error:  # handed over and raised by the consumer
            put(error)

    thread = threading.Thread(target=run, daemon=True, name="ahead")
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item[0]
    finally:
        stopped.set()
        thread.join()
