"""A pool of processes with one core each, every one for several tasks."""

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
# Memory that leaks ends with its process. (max_tasks_per_child of the executor can hang in Python 3.11.)
TASKS_A_PROCESS = 8
SECONDS_TO_END = 30
# Read by the processes when they start. They keep freed memory from step to step: by default glibc returns large blocks
# to the system, and they are faulted in again page by page.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**26),
}


class Task(NamedTuple):
    """A call of a module's function, with a name for messages."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def run_tasks(tasks: Sequence[Task], workers: int, what: str) -> None:
    """Run all tasks in `workers` processes, with 0 in this one.

    The first failure is raised when the tasks under way have ended; no more are started. `what` names a task in logs.
    """
    if not workers:
        for task in tasks:
            task.function(*task.arguments)
    if not workers or not tasks:
        return
    os.environ.update(ENVIRONMENT)
    waiting = deque(tasks)
    progress = _Progress(what, len(tasks))
    with ThreadPoolExecutor(workers) as threads:
        try:
            for thread in as_completed([threads.submit(_run_waiting, waiting, progress) for _ in range(workers)]):
                thread.result()
        except BaseException:
            waiting.clear()
            raise


def _run_waiting(waiting: deque[Task], progress: "_Progress") -> None:
    """Run waiting tasks in one process after the other, until there are none."""
    while waiting:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=_start) as process:
            for _ in range(TASKS_A_PROCESS):
                try:
                    task = waiting.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    process.submit(task.function, *task.arguments).result()
                except BaseException:
                    waiting.clear()  # at once: this process may take a while to end, and other threads would start more
                    raise
                progress.log(task.name)


class _Progress:
    """Logs the number of tasks that have ended, and the time that is left."""

    def __init__(self, what: str, count: int) -> None:
        self._what = what
        self._count = count
        self._done = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()

    def log(self, name: str) -> None:
        """Count a task that has ended."""
        with self._lock:
            self._done += 1
            left = (time.monotonic() - self._started) / self._done * (self._count - self._done)
            logger.info("%s %d/%d: %s; about %.0f min left", self._what, self._done, self._count, name, left / 60)


def _start() -> None:
    """Initialise a process of the pool."""
    import torch

    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


def _end_with_parent() -> None:
    """End this process after its parent, a trainer with a checkpoint: nothing waits for its result any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_END)
    os._exit(1)
