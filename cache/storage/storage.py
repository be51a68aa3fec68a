"""Where a cache or a tar lies: a local folder, or any fsspec URL (`s3://`, `gs://`, `memory://`, ...).

A place holds objects by name. An object is there whole or not at all, whenever the process or the machine stops.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

STAGING = "tmp"
BLOCK = 8 << 20
URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")
KNOB = "Check the address, the credentials and the endpoint (environment or fsspec's configuration)"


class StorageError(OSError):
    """A place that cannot be read. The message names the address and the remedy."""


class WriteError(StorageError):
    """A place does not take what should be written. The message names the address and the remedy."""


class Storage(Protocol):
    """A folder of objects. Names are relative, with `/`; `str(storage)` is its address. Picklable and safe to fork.

    Everything but what is said below raises `StorageError`, or `WriteError` where it writes.
    """

    @property
    def url(self) -> str:
        """Its address, as the user gave it."""
        ...

    def at(self, name: str) -> str:
        """The full address of an object."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` to `stop` of an object, by one request. Raises FileNotFoundError if it is absent."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of an object, None where it is absent."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder, sorted, by one listing; the names of folders end in `/`. [] if absent."""
        ...

    def walk(self, folder: str = "") -> list[str]:
        """All objects in a folder and its folders, sorted, relative to the folder. [] if absent."""
        ...

    def put(self, name: str, data: bytes, owner: str) -> None:
        """Write an object whole, or leave what was there. `owner`: who `clear_staged` may clean up after."""
        ...

    def put_new(self, name: str, data: bytes, owner: str) -> bool:
        """Write an object if there is none of that name: False if there is. Of several that try, one writes.

        Exclusive on local file systems and where the store can do it (S3, GCS); elsewhere a look before the write.
        """
        ...

    def modified(self, name: str) -> float | None:
        """When an object was last written, seconds since 1970 by the clock of the place; None where it is absent."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; one that is absent is fine."""
        ...

    def clear_staged(self, owner: str) -> None:
        """Remove what killed runs left half written for an owner that is about to be finished."""
        ...

    def clear_dead(self) -> None:
        """Remove what processes of this machine left half written that are no more."""
        ...

    def local(self, name: str) -> Path | None:
        """The file of an object where it can be mapped into memory, else None."""
        ...


def open_storage(address: str | Path | Storage) -> Storage:
    """The place at a path or URL. Nothing is opened, nothing needs to be there.

    Raises:
        ValueError: a protocol that fsspec does not know, or whose package is missing.
    """
    if not isinstance(address, str | Path):
        return address
    url = str(address)
    if url.startswith("file://"):
        return LocalStorage(url.removeprefix("file://"))
    return RemoteStorage(url) if is_url(url) else LocalStorage(url)


def is_url(address: str | Path) -> bool:
    """Whether this is an address for fsspec, not a path."""
    return bool(URL.match(str(address))) and not str(address).startswith("file://")


def split_address(address: str | Path) -> tuple[Storage, str]:
    """The place that holds an object, and the object's name in it."""
    folder, _, name = str(address).rpartition("/")
    return open_storage(folder or ("/" if str(address).startswith("/") else ".")), name


def glob_urls(pattern: str) -> list[str]:
    """The URLs of the objects that match a URL with `*`, `**`, `?` or `[..]`, sorted."""
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(pattern)
        fs.invalidate_cache()
        return sorted(fs.unstrip_protocol(name) for name in fs.glob(path))
    except Exception as error:  # each store raises its own kinds
        raise StorageError(f"cannot list {pattern}: {_told(error)}. {KNOB}") from error


def open_object(address: str | Path) -> BinaryIO:
    """A file or object, open for reading; a remote one is read in blocks of BLOCK bytes, each by one request.

    Raises:
        FileNotFoundError: there is no such object.
    """
    if not is_url(address):
        return open(address, "rb")
    storage, name = split_address(address)
    size = storage.size(name)
    if size is None:
        raise FileNotFoundError(2, "No such object", str(address))
    return io.BufferedReader(_Ranges(storage, name, size), BLOCK)


class _Ranges(io.RawIOBase):
    """An object of a place as a file, read by ranges."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._place, self._name, self._size, self._at = storage, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        data = self._place.read(self._name, self._at, stop) if stop > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


class LocalStorage:
    """A folder of a file system. Files are staged in `tmp/`, synced to disk, renamed, and the rename synced."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def url(self) -> str:
        return str(self.folder)

    def at(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        try:
            file = os.open(self.folder / name, os.O_RDONLY)
            try:
                stop = os.fstat(file).st_size if stop is None else stop
                return _pread(file, start, stop)
            finally:
                os.close(file)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(error.errno, error.strerror, self.at(name)) from None
        except OSError as error:
            raise StorageError(f"cannot read {self.at(name)}: {error.strerror}") from error

    def size(self, name: str) -> int | None:
        path = self.folder / name
        try:
            return path.stat().st_size if path.is_file() else None
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str = "") -> list[str]:
        try:
            with os.scandir(self.folder / folder) as entries:
                return sorted(entry.name + "/" * entry.is_dir() for entry in entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise StorageError(f"cannot list {self.at(folder)}: {error.strerror}") from error

    def walk(self, folder: str = "") -> list[str]:
        root = self.folder / folder
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def put(self, name: str, data: bytes, owner: str) -> None:
        self._write(name, data, owner, os.replace)

    def put_new(self, name: str, data: bytes, owner: str) -> bool:
        return not (self.folder / name).exists() and self._write(name, data, owner, _link)

    def _write(self, name: str, data: bytes, owner: str, finish: Callable[[Path, Path], bool | None]) -> bool:
        """Stage, sync and finish a file. Staged files bear host, process and thread: no two writers share one."""
        path = self.folder / name
        writer = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
        staged = self.folder / STAGING / f"{owner}.{path.name}.{writer}"
        try:
            make_folder(staged.parent)
            make_folder(path.parent)
            try:
                _write_synced(staged, data)
                try:
                    done = finish(staged, path)
                except FileNotFoundError:  # somebody who finished the same tar cleared it away
                    _write_synced(staged, data)
                    done = finish(staged, path)
            except BaseException:
                staged.unlink(missing_ok=True)
                raise
            sync_folder(path.parent)
            return done is not False
        except OSError as error:
            raise WriteError(
                f"cannot write {path} ({len(data)} bytes): {error.strerror}. Make room or choose another folder, then "
                "run the same command again: finished tars are kept."
            ) from error

    def modified(self, name: str) -> float | None:
        try:
            return (self.folder / name).stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None

    def delete(self, name: str) -> None:
        try:
            (self.folder / name).unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise WriteError(f"cannot delete {self.at(name)}: {error.strerror}") from error

    def clear_staged(self, owner: str) -> None:
        for path in (self.folder / STAGING).glob(f"{owner}.*"):
            path.unlink(missing_ok=True)

    def clear_dead(self) -> None:
        host = re.escape(socket.gethostname())
        for path in (self.folder / STAGING).glob("*"):
            writer = re.search(rf"\.{host}\.(\d+)\.\d+$", path.name)
            if writer is not None and not process_lives(int(writer[1])):
                path.unlink(missing_ok=True)

    def local(self, name: str) -> Path | None:
        return self.folder / name


def process_lives(pid: int) -> bool:
    """Whether this machine has a process of that id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _link(staged: Path, path: Path) -> bool:
    try:
        os.link(staged, path)
        return True
    except FileExistsError:
        return False
    finally:
        staged.unlink(missing_ok=True)


def _pread(file: int, start: int, stop: int) -> bytes:
    parts = []
    while start < stop and (part := os.pread(file, stop - start, start)):  # one call gives 2 GiB at most
        parts.append(part)
        start += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, each synced into its parent."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Have a folder's entries on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoteStorage:
    """A prefix of an object store, through fsspec. An object is one PUT, which stores make whole or not at all."""

    def __init__(self, url: str) -> None:
        from fsspec.core import get_filesystem_class

        self._url = url.rstrip("/") if not url.endswith("://") else url
        try:
            get_filesystem_class(url.partition("://")[0])
        except (ValueError, ImportError) as error:
            raise ValueError(f"{url}: {error}") from error
        self._opened: tuple[int, Any, str] | None = None

    def __str__(self) -> str:
        return self._url

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": None}

    @property
    def url(self) -> str:
        return self._url

    @property
    def _root(self) -> tuple[Any, str]:
        """The file system, opened once in each process: it holds sockets and a thread, which no fork survives."""
        if self._opened is None or self._opened[0] != os.getpid():
            from fsspec.core import url_to_fs

            try:
                self._opened = (os.getpid(), *url_to_fs(self._url))
            except Exception as error:  # each store raises its own kinds for settings that it cannot use
                raise StorageError(f"cannot open {self._url}: {_told(error)}. {KNOB}") from error
        return self._opened[1:]

    def at(self, name: str) -> str:
        return f"{self._url.rstrip('/')}/{name}"

    def _path(self, name: str) -> tuple[Any, str]:
        fs, root = self._root
        return fs, f"{root.rstrip('/')}/{name}".rstrip("/")

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str, kind: type[StorageError] = StorageError) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            if kind is WriteError:
                raise WriteError(f"cannot {verb} {self.at(name)}: no such bucket or folder. {KNOB}") from None
            raise FileNotFoundError(2, "No such object", self.at(name)) from None
        except (StorageError, FileExistsError):
            raise
        except Exception as error:  # stores raise their client library's kinds beside OSError
            raise kind(f"cannot {verb} {self.at(name)}: {_told(error)}. {KNOB}") from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with self._errors("read", name):
            fs, path = self._path(name)
            data: bytes = fs.cat_file(path, start=start or None, end=stop)
            return data

    def _info(self, name: str) -> dict[str, Any] | None:
        try:
            with self._errors("look at", name):
                fs, path = self._path(name)
                fs.invalidate_cache(path.rpartition("/")[0])  # what other processes wrote since a listing
                info: dict[str, Any] = fs.info(path)
                return info if info["type"] == "file" else None
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        info = self._info(name)
        return None if info is None else int(info["size"])

    def names(self, folder: str = "") -> list[str]:
        try:
            with self._errors("list", folder):
                fs, path = self._path(folder)
                fs.invalidate_cache(path)
                found = [(e["name"].rstrip("/").rpartition("/")[2], e["type"]) for e in fs.ls(path, detail=True)]
        except FileNotFoundError:
            return []
        own = path.rpartition("/")[2]  # some stores list a marker object of the folder itself
        return sorted(name + "/" * (kind == "directory") for name, kind in found if name and (kind, name) != ("", own))

    def walk(self, folder: str = "") -> list[str]:
        with self._errors("list", folder):
            fs, path = self._path(folder)
            fs.invalidate_cache(path)
            prefix = fs._strip_protocol(path).rstrip("/") + "/"
            return sorted(name.removeprefix(prefix) for name in fs.find(path) if name.startswith(prefix))

    def put(self, name: str, data: bytes, owner: str) -> None:
        with self._errors("write", name, WriteError):
            fs, path = self._path(name)
            self._make_folder(fs, path)
            fs.pipe_file(path, data)

    def put_new(self, name: str, data: bytes, owner: str) -> bool:
        try:
            with self._errors("write", name, WriteError):
                fs, path = self._path(name)
                self._make_folder(fs, path)
                fs.pipe_file(path, data, mode="create")
        except FileExistsError:
            return False
        return True

    @staticmethod
    def _make_folder(fs: Any, path: str) -> None:
        if not getattr(fs, "async_impl", False):  # object stores have no folders; sftp, smb, ... do
            fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def modified(self, name: str) -> float | None:
        info = self._info(name)
        if info is None:
            return None
        with self._errors("look at", name):
            fs, path = self._path(name)
            return float(fs.modified(path).timestamp())

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._errors("delete", name):
            fs, path = self._path(name)
            fs.rm_file(path)

    def clear_staged(self, owner: str) -> None:
        """Nothing is ever staged here."""

    def clear_dead(self) -> None:
        """Nor here."""

    def local(self, name: str) -> Path | None:
        return None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
