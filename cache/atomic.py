"""Files that are there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
import socket
from pathlib import Path

STAGING = "tmp"


class WriteError(OSError):
    """The cache folder does not take what should be written. The message names the path and the remedy."""


def write_atomic(path: Path, data: bytes, *, folder: Path, owner: str) -> None:
    """Write `data` as `path` inside the cache `folder`: staged, synced to disk, renamed, and the rename synced.

    Staged files carry the name of their `owner`, and of host and process, so that two runs never share one and
    `clear_staged` can remove what a killed run left.

    Raises:
        WriteError: disk full, read-only, not a folder, quota, ...; nothing of the file is then visible.
    """
    staged = folder / STAGING / f"{owner}.{path.name}.{socket.gethostname()}.{os.getpid()}"
    try:
        make_folder(staged.parent)
        make_folder(path.parent)
        try:
            with open(staged, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged, path)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise WriteError(
            f"cannot write {path} ({len(data)} bytes): {error.strerror}. Make room or choose another folder, then "
            "run the same command again: finished tars are kept."
        ) from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents, each synced into its parent."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_staged(folder: Path, owner: str) -> None:
    """Remove what killed runs left staged for an owner that is about to be finished."""
    for path in (folder / STAGING).glob(f"{owner}.*"):
        path.unlink(missing_ok=True)
