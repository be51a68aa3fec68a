"""How worker processes start beside a process that computes.

A fork is quick and shares all memory, but it also copies the locks that other threads hold at that moment, and CUDA and
NCCL run many threads. So beside a GPU workers are forked from a server: a process of its own that has one thread and
never touches a GPU. Python warns of a fork beside threads from 3.12 on, so there the server is used on CPUs as well.
"""

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from typing import Any, Literal

# Imported once, by the server that all workers of this process come from.
PRELOADED = ["torch.utils.data", "timm.data", "webdataset", "PIL.Image", "sentencepiece"]


def start_method() -> Literal["fork", "forkserver"]:
    """Return how worker processes of this process start."""
    import torch

    return "forkserver" if torch.cuda.is_available() or sys.version_info >= (3, 12) else "fork"


def worker_context() -> BaseContext:
    """Return the context in which workers start, with their server, if there is one, running."""
    return server_context() if start_method() == "forkserver" else multiprocessing.get_context("fork")


def server_context() -> BaseContext:
    """Return the context of workers that a server forks, and start the server, unless it runs already.

    It imports what workers need, which takes some seconds: called early, it does so beside other work.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # the server's start would start it, and unblock the signal
    with _sigterm_blocked():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM inside the context; a process that starts there, and its children, have it blocked for good.

    Schedulers send it to every process of a job, but the last step still needs the workers, and they end when their
    server does.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Let workers that start inside the context not run the main script again, as those of a server would.

    They need nothing of it, and few scripts are written for it (`if __name__ == "__main__"`).
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: main.__dict__[name] for name in ("__file__", "__spec__") if name in main.__dict__}
    if threading.current_thread() is not threading.main_thread() or not hidden:
        yield
        return
    main.__dict__.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        main.__dict__.update(hidden)
