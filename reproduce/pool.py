"""Work done side by side, one core each, in processes that serve several runs each."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)
# Then a fresh one: what piles up in a process ends with it. (max_tasks_per_child can hang in Python 3.11.)
TASKS_A_PROCESS = 8
SECONDS_TO_END = 30
# Read by the processes when they start. Memory is kept from step to step: given back to the system after each, which
# is glibc's way with large blocks, it is faulted in again page by page.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}


class Task(NamedTuple):
    """One piece of work: a function of a module, and its arguments."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def perform_all(tasks: Sequence[Task], workers: int, what: str) -> None:
    """Perform all tasks, with no workers in this process. The first failure ends it, after the tasks under way."""
    if not workers:
        for task in tasks:
            task.function(*task.arguments)
    if not workers or not tasks:
        return
    os.environ.update(ENVIRONMENT)
    waiting, finished = deque(tasks), _Progress(what, len(tasks))
    with ThreadPoolExecutor(workers) as cores:
        try:
            for core in as_completed([cores.submit(_serve, waiting, finished) for _ in range(workers)]):
                core.result()
        except BaseException:
            waiting.clear()
            raise


def _serve(waiting: deque[Task], finished: "_Progress") -> None:
    """One core's work: the next task as long as there is one, none of them waiting for another core's."""
    while waiting:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_start) as process:
            for _ in range(TASKS_A_PROCESS):
                try:
                    task = waiting.popleft()
                except IndexError:  # another core was faster
                    return
                try:
                    process.submit(task.function, *task.arguments).result()
                except BaseException:
                    waiting.clear()  # now: this process may take a while to end, and other cores would begin more
                    raise
                finished.tell(task.name)


class _Progress:
    """What is done of the tasks, told as they end."""

    def __init__(self, what: str, count: int) -> None:
        self._what, self._count, self._done = what, count, 0
        self._started, self._lock = time.monotonic(), threading.Lock()

    def tell(self, name: str) -> None:
        with self._lock:
            self._done += 1
            left = (time.monotonic() - self._started) / self._done * (self._count - self._done)
            logger.info("%s %d/%d: %s; about %.0f min left", self._what, self._done, self._count, name, left / 60)


def _start() -> None:
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()

    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


def _end_with_parent() -> None:
    """End where the parent was killed, as nobody waits for the work: a trainer by a checkpoint, all else at once."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os._exit(1)
