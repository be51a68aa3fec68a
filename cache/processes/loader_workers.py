"""The worker processes of torch's loaders: what they begin with, and that they end.

Torch counts on workers that are forks. Those of a server (`worker_processes`) have the environment that it was started
with, and look for the end of the server instead of that of the process that loads; the server in turn lives as long as
one of them. Nor does SIGTERM end them, by which Python ends workers when it exits, before it waits for them.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import fsspec

from threetowers.cache.processes.worker_processes import without_main_module

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

T = TypeVar("T")


def worker_beginning() -> Callable[[int], None]:
    """Return what a loader's workers do first (`worker_init_fn`).

    They take over this process's environment and its configuration of storages as they are now, and end as soon as it
    does, however it ends.
    """
    return functools.partial(_begin, dict(os.environ), dict(fsspec.config.conf))


def _begin(environment: Mapping[str, str], storages: Mapping[str, Any], worker: int) -> None:
    os.environ.clear()
    os.environ.update(environment)
    fsspec.config.conf.clear()
    fsspec.config.conf.update(storages)
    threading.Thread(target=_end_with_parent, daemon=True, name="end with parent").start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextlib.contextmanager
def loading(loader: "DataLoader[T]") -> Iterator[Iterator[Any]]:
    """Iterate over a loader inside the context. Its workers start when it is entered, in the main thread.

    They end with the context, though a traceback may still refer to the iterator, and with Python, though the context
    may still be open.
    """
    from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

    with without_main_module():
        loaded = iter(loader)
    if not isinstance(loaded, _MultiProcessingDataLoaderIter):
        yield loaded
        return
    end = loaded._shutdown_workers
    atexit.register(end)  # before what multiprocessing registered: it would wait for the workers
    try:
        yield loaded
    finally:
        atexit.unregister(end)
        end()
