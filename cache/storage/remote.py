"""A storage in an object store, through fsspec."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from threetowers.cache.storage.atomic import finish_partial, partial_path
from threetowers.cache.storage.storage import Storage, StorageError, WriteError

HINT = "Check the address, the credentials and the endpoint (environment or fsspec's configuration)"


class RemoteStorage(Storage):
    """A prefix of an object store. An object is written by one PUT, which stores apply atomically."""

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
    def _root(self) -> tuple[Any, str]:
        """The file system, opened once in each process: it holds sockets and a thread, which no fork survives."""
        if self._opened is None or self._opened[0] != os.getpid():
            from fsspec.core import url_to_fs

            try:
                self._opened = (os.getpid(), *url_to_fs(self._url))
            except Exception as error:  # each store raises its own kinds for settings that it cannot use
                raise StorageError(f"cannot open {self._url}: {_description(error)}. {HINT}") from error
        return self._opened[1:]

    def uri(self, name: str) -> str:
        """Return the URL of an object."""
        return f"{self._url.rstrip('/')}/{name}"

    def _path(self, name: str) -> tuple[Any, str]:
        fs, root = self._root
        return fs, f"{root.rstrip('/')}/{name}".rstrip("/")

    @contextlib.contextmanager
    def _errors(self, verb: str, name: str, kind: type[StorageError] = StorageError) -> Iterator[None]:
        """Turn whatever a store's client library raises into one message."""
        try:
            yield
        except FileNotFoundError:
            if kind is WriteError:
                raise WriteError(f"cannot {verb} {self.uri(name)}: no such bucket or folder. {HINT}") from None
            raise FileNotFoundError(2, "No such object", self.uri(name)) from None
        except (StorageError, FileExistsError):
            raise
        except Exception as error:  # stores raise their client library's kinds beside OSError
            raise kind(f"cannot {verb} {self.uri(name)}: {_description(error)}. {HINT}") from error

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes from `start` to `stop` of an object, by one ranged GET."""
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
        """Return the size of an object in bytes; None where it is absent."""
        info = self._info(name)
        return None if info is None else int(info["size"])

    def modified(self, name: str) -> float | None:
        """Return when an object was last written, by the store's clock."""
        info = self._info(name)
        if info is None:
            return None
        with self._errors("look at", name):
            fs, path = self._path(name)
            return float(fs.modified(path).timestamp())

    def listdir(self, folder: str = "") -> list[str]:
        """Return what lies directly below a prefix, sorted; prefixes end in `/`."""
        try:
            with self._errors("list", folder):
                fs, path = self._path(folder)
                fs.invalidate_cache(path)
                entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        own = path.rpartition("/")[2]
        names = []
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if name and (entry["type"], name) != ("", own):  # some stores list a marker object of the folder itself
                names.append(name + "/" if entry["type"] == "directory" else name)
        return sorted(names)

    def walk(self, folder: str = "") -> list[str]:
        """Return all objects below a prefix, sorted, relative to it."""
        with self._errors("list", folder):
            fs, path = self._path(folder)
            fs.invalidate_cache(path)
            prefix = fs._strip_protocol(path).rstrip("/") + "/"
            return sorted(name.removeprefix(prefix) for name in fs.find(path) if name.startswith(prefix))

    def put(self, name: str, data: bytes, owner: str) -> None:
        """Write or replace an object by one PUT."""
        with self._errors("write", name, WriteError):
            fs, path = self._path(name)
            self._make_folder(fs, path)
            fs.pipe_file(path, data)

    def upload(self, name: str, path: Path) -> None:
        """Write or replace an object by the content of a local file, in parts where it is large.

        Stores apply the last part atomically. File systems without such parts (sftp, ...) show a file that grows, so
        what reads it should wait for another object that is written afterwards.
        """
        with self._errors("write", name, WriteError):
            fs, remote = self._path(name)
            self._make_folder(fs, remote)
            fs.put_file(str(path), remote)

    def download(self, name: str, path: Path) -> None:
        """Write an object to a local file, which is complete or absent. Raises FileNotFoundError for an absent one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(path)
        try:
            with self._errors("read", name):
                fs, remote = self._path(name)
                fs.get_file(remote, str(partial))
            finish_partial(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def create_exclusive(self, name: str, data: bytes, owner: str) -> bool:
        """Write an object unless it exists, by a conditional PUT where the store has one."""
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

    def delete(self, name: str) -> None:
        """Remove an object; an absent one is no error."""
        with contextlib.suppress(FileNotFoundError), self._errors("delete", name):
            fs, path = self._path(name)
            fs.rm_file(path)

    def remove_partial(self, owner: str) -> None:
        """Do nothing: object stores write atomically."""

    def remove_stale(self) -> None:
        """Do nothing: object stores write atomically."""

    def local_path(self, name: str) -> Path | None:
        """Return None: an object cannot be mapped into memory."""
        return None


def glob_urls(pattern: str) -> list[str]:
    """Return the URLs of the objects that match a URL with `*`, `**`, `?` or `[..]`, sorted.

    Raises:
        StorageError: The store cannot be listed.
    """
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(pattern)
        fs.invalidate_cache()
        return sorted(fs.unstrip_protocol(name) for name in fs.glob(path))
    except Exception as error:  # each store raises its own kinds
        raise StorageError(f"cannot list {pattern}: {_description(error)}. {HINT}") from error


def _description(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")
