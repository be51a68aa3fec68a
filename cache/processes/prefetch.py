"""Reading ahead: an iterator that runs in a thread, a bounded number of items ahead of its consumer."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")


def prefetch(source: Iterable[T], depth: int) -> Generator[T, None, None]:
    """Yield what `source` yields, in order, while a thread computes up to `depth` further items.

    The thread begins item n + `depth` only when item n is taken: with a depth of 1, a source that alternates between
    two buffers never overwrites the one in use. An exception in `source` is raised here, after the items before it.
    Closing this generator stops the thread and closes the source.
    """
    items: queue.SimpleQueue[tuple[T] | BaseException | None] = queue.SimpleQueue()
    free = threading.Semaphore(depth)  # places for items that are computed and not yet taken
    stopped = threading.Event()

    def run() -> None:
        iterator = iter(source)
        try:
            while True:
                free.acquire()
                if stopped.is_set():
                    break
                try:
                    item = next(iterator)
                except StopIteration:
                    items.put(None)
                    break
                items.put((item,))
            if isinstance(iterator, Generator):
                iterator.close()
        except BaseException as error:  # raised by the consumer
            items.put(error)

    thread = threading.Thread(target=run, daemon=True, name="prefetch")
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            free.release()
            yield item[0]
    finally:
        stopped.set()
        free.release()  # the thread may be waiting for a place
        thread.join()
