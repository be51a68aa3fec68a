"""Work done side by side, one core each, in processes that serve several runs each."""

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)
# Then fresh ones: what piles up in a process ends with it. (max_tasks_per_child can hang in Python 3.11.)
TASKS_A_PROCESS = 8
SECONDS_TO_END = 30


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
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the processes when they start
    started, done = time.monotonic(), 0
    for first in range(0, len(tasks), workers * TASKS_A_PROCESS):
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start) as pool:
            part = tasks[first : first + workers * TASKS_A_PROCESS]
            names = {pool.submit(task.function, *task.arguments): task.name for task in part}
            try:
                for future in as_completed(names):
                    future.result()
                    done += 1
                    left = (time.monotonic() - started) / done * (len(tasks) - done)
                    logger.info("%s %d/%d: %s; about %.0f min left", what, done, len(tasks), names[future], left / 60)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


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
