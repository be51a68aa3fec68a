"""A storage in a folder of a local file system."""

import errno
import os
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from threetowers.cache.processes.liveness import process_exists
from threetowers.cache.storage.atomic import make_folder, sync_folder, write_synced
from threetowers.cache.storage.storage import PARTIAL_FOLDER, Storage, StorageError, WriteError

MAX_ATTEMPTS = 20  # at a write whose partial file others remove each time
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # of file systems without hard links


class LocalStorage(Storage):
    """A folder of a file system.

    Files are written to a partial file in `tmp/`, synced to disk, renamed, and the rename is synced.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __str__(self) -> str:
        return str(self.folder)

    def uri(self, name: str) -> str:
        """Return the path of an object."""
        return str(self.folder / name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes from `start` to `stop` of a file."""
        try:
            file = os.open(self.folder / name, os.O_RDONLY)
            try:
                stop = os.fstat(file).st_size if stop is None else stop
                return _pread(file, start, stop)
            finally:
                os.close(file)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(error.errno, error.strerror, self.uri(name)) from None
        except OSError as error:
            raise StorageError(f"cannot read {self.uri(name)}: {error.strerror}") from error

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes; None where it is absent or a folder."""
        path = self.folder / name
        try:
            return path.stat().st_size if path.is_file() else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def modified(self, name: str) -> float | None:
        """Return the modification time of a file, by the file system's clock."""
        try:
            return (self.folder / name).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    def listdir(self, folder: str = "") -> list[str]:
        """Return the entries of a folder, sorted; folders end in `/`."""
        try:
            with os.scandir(self.folder / folder) as entries:
                return sorted(entry.name + "/" * entry.is_dir() for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StorageError(f"cannot list {self.uri(folder)}: {error.strerror}") from error

    def walk(self, folder: str = "") -> list[str]:
        """Return all files below a folder, sorted, relative to it."""
        root = self.folder / folder
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def put(self, name: str, data: bytes, owner: str) -> None:
        """Write or replace a file by renaming a synced partial file."""
        self._write(name, data, owner, os.replace)

    def create_exclusive(self, name: str, data: bytes, owner: str) -> bool:
        """Write a file unless it exists, by linking a synced partial file: of several that link, one succeeds."""
        return not (self.folder / name).exists() and self._write(name, data, owner, _link)

    def _write(self, name: str, data: bytes, owner: str, finish: Callable[[Path, Path], bool | None]) -> bool:
        """Write a partial file, and `finish` it. It is named by host, process and thread: no two writers share one."""
        path = self.folder / name
        writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
        partial = self.folder / PARTIAL_FOLDER / f"{owner}.{path.name}.{writer}"
        try:
            try:
                for attempt in range(MAX_ATTEMPTS):
                    try:
                        make_folder(partial.parent)
                        make_folder(path.parent)
                        write_synced(partial, data)
                        written = finish(partial, path)
                        break
                    except FileNotFoundError:  # each worker that finishes the same tar removes the tar's partial files
                        if attempt == MAX_ATTEMPTS - 1:
                            raise
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
            sync_folder(path.parent)
            return written is not False
        except OSError as error:
            raise WriteError(
                f"cannot write {path} ({len(data)} bytes): {error.strerror}. Make room or choose another folder, then "
                "run the same command again: finished tars are kept."
            ) from error

    def delete(self, name: str) -> None:
        """Remove a file; an absent one is no error."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise WriteError(f"cannot delete {self.uri(name)}: {error.strerror}") from error

    def remove_partial(self, owner: str) -> None:
        """Remove the partial files of an owner."""
        for path in (self.folder / PARTIAL_FOLDER).glob(f"{owner}.*"):
            path.unlink(missing_ok=True)

    def remove_stale(self) -> None:
        """Remove the partial files of processes of this machine that no longer exist."""
        host = re.escape(socket.gethostname())
        for path in (self.folder / PARTIAL_FOLDER).glob("*"):
            writer = re.search(rf"\.{host}\.(\d+)\.\d+$", path.name)
            if writer is not None and not process_exists(int(writer[1])):
                path.unlink(missing_ok=True)

    def local_path(self, name: str) -> Path | None:
        """Return the path of an object, which may be absent."""
        return self.folder / name


def _link(partial: Path, path: Path) -> bool:
    try:
        os.link(partial, path)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _claim(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _claim(partial: Path, path: Path) -> bool:
    """Rename to a file that was created exclusively, where there are no links: it is empty for a moment."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    os.replace(partial, path)
    return True


def _pread(file: int, start: int, stop: int) -> bytes:
    parts = []
    while start < stop and (part := os.pread(file, stop - start, start)):  # one call reads 2 GiB at most
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
