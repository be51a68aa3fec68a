"""Writing local files so that readers see the old content or the new, also after a crash or a power cut."""

import os
import socket
import threading
from pathlib import Path


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write or replace a file by way of a synced partial file beside it. Text is written as UTF-8.

    Several may write the same file at once: one of them is the last.

    Raises:
        OSError: The file cannot be written. Its name is `path`.
    """
    partial = partial_path(path)
    try:
        write_synced(partial, data.encode() if isinstance(data, str) else data)
        os.replace(partial, path)
    except OSError as error:  # a full disk is found by a write, whose error names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Return the name beside `path` under which this thread may write it: `.NAME.HOST.PROCESS.THREAD.partial`."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.partial")


def finish_partial(partial: Path, path: Path) -> None:
    """Give a complete partial file, whoever wrote it, its final name once its bytes are on disk."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file in place and wait until its bytes are on disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def make_folder(path: Path) -> None:
    """Create a folder and its parents, each synced into its parent."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Wait until a folder's entries are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
