"""A value for the other processes of a machine: pickled to a file, whose arrays they map instead of copying them."""

import mmap
import os
import pickle
import tempfile
import weakref
from typing import Any, Generic, TypeVar

T = TypeVar("T")

ALIGNMENT = 64  # of arrays in the file, in bytes


class MappedPickle(Generic[T]):
    """A value in a file that lives as long as this object.

    Pickled itself, it is no more than the file's name and the places in it. All processes that load it share one copy
    of its NumPy arrays, which are read-only there, in the system's page cache.
    """

    def __init__(self, value: T) -> None:
        """Write the value to a temporary file (in TMPDIR)."""
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        self._spans: list[tuple[int, int]] = []  # of the pickle, then of each buffer
        with tempfile.NamedTemporaryFile(prefix="threetowers-", delete=False) as file:
            self._path = file.name
            weakref.finalize(self, os.unlink, file.name)
            for block in (memoryview(data), *(buffer.raw() for buffer in buffers)):
                start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
                file.seek(start)
                file.write(block)
                self._spans.append((start, start + block.nbytes))

    def __getstate__(self) -> dict[str, Any]:
        """Return what other processes need to find the value."""
        return {"_path": self._path, "_spans": self._spans}

    def load(self) -> T:
        """Return the value."""
        with open(self._path, "rb") as file:
            whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        data, *buffers = [whole[start:stop] for start, stop in self._spans]
        value: T = pickle.loads(data, buffers=buffers)
        return value
