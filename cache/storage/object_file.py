"""An object of a storage as a file."""

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

from threetowers.cache.storage.storage import Storage, is_url, split_address

READ_BYTES = 8 << 20  # of a remote object by one request


def open_object(address: str | Path) -> BinaryIO:
    """Open a file or object for reading; a remote one is read READ_BYTES at a time, each by one request.

    Raises:
        FileNotFoundError: There is no such object.
    """
    if not is_url(address):
        return open(address, "rb")
    storage, name = split_address(address)
    size = storage.size(name)
    if size is None:
        raise FileNotFoundError(2, "No such object", str(address))
    return io.BufferedReader(_ObjectReader(storage, name, size), READ_BYTES)


class _ObjectReader(io.RawIOBase):
    """An object that is read by ranges of bytes."""

    def __init__(self, storage: Storage, name: str, size: int) -> None:
        self._storage = storage
        self._name = name
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        data = self._storage.read(self._name, self._position, stop) if stop > self._position else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
