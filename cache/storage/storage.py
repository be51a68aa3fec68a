"""Storage: where a cache or a tar lies, a local folder or any fsspec URL (`s3://`, `gs://`, `memory://`, ...).

A storage holds objects by name. An object is complete or absent, whenever the process or the machine stops.
"""

import re
from abc import ABC, abstractmethod
from pathlib import Path

PARTIAL_FOLDER = "tmp"  # of a local storage: files that are being written
URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")


class StorageError(OSError):
    """A storage that cannot be read. The message names the address and the remedy."""


class WriteError(StorageError):
    """A storage that refuses what should be written. The message names the address and the remedy."""


class Storage(ABC):
    """A folder of objects. Names are relative, with `/`; `str(storage)` is its address. Picklable and safe to fork.

    Methods raise `StorageError`, or `WriteError` where they write, for whatever their descriptions do not mention.
    """

    @abstractmethod
    def __str__(self) -> str:
        """Return the address, as the user gave it."""

    @abstractmethod
    def uri(self, name: str) -> str:
        """Return the full address of an object."""

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return the bytes from `start` to `stop` of an object, by one request.

        Raises:
            FileNotFoundError: There is no such object.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return the size of an object in bytes; None where it is absent."""

    @abstractmethod
    def modified(self, name: str) -> float | None:
        """Return when an object was last written, in seconds since 1970 by the storage's clock; None where absent."""

    @abstractmethod
    def listdir(self, folder: str = "") -> list[str]:
        """Return the entries of a folder, sorted, by one listing; folders end in `/`. An absent folder is empty."""

    @abstractmethod
    def walk(self, folder: str = "") -> list[str]:
        """Return all objects below a folder, sorted, relative to it. An absent folder is empty."""

    @abstractmethod
    def put(self, name: str, data: bytes, owner: str) -> None:
        """Write or replace an object atomically. `owner` is what `remove_partial` cleans up after."""

    @abstractmethod
    def create_exclusive(self, name: str, data: bytes, owner: str) -> bool:
        """Write an object unless it exists, and return whether it was written. Of several that try, one writes.

        Exclusive on local file systems and where the store supports it (S3, GCS); elsewhere it is checked before the
        write.
        """

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove an object; an absent one is no error."""

    @abstractmethod
    def remove_partial(self, owner: str) -> None:
        """Remove what killed processes left half written for an owner that is about to be finished."""

    @abstractmethod
    def remove_stale(self) -> None:
        """Remove what processes of this machine that no longer exist left half written."""

    @abstractmethod
    def local_path(self, name: str) -> Path | None:
        """Return the file of an object where it can be mapped into memory, else None."""


def open_storage(address: str | Path | Storage) -> Storage:
    """Return the storage at a path or URL. Nothing is opened, and nothing needs to exist yet.

    Raises:
        ValueError: fsspec does not know the protocol, or the protocol's package is missing.
    """
    from threetowers.cache.storage.local import LocalStorage  # here: both are subclasses of Storage
    from threetowers.cache.storage.remote import RemoteStorage

    if isinstance(address, Storage):
        return address
    if is_url(address):
        return RemoteStorage(str(address))
    return LocalStorage(str(address).removeprefix("file://"))


def is_url(address: str | Path) -> bool:
    """Return whether an address is a URL for fsspec, not a path."""
    return bool(URL.match(str(address))) and not str(address).startswith("file://")


def split_address(address: str | Path) -> tuple[Storage, str]:
    """Return the storage that holds an object, and the object's name in it."""
    folder, _, name = str(address).rpartition("/")
    if not folder:
        folder = "/" if str(address).startswith("/") else "."
    return open_storage(folder), name
