"""Vectors in chunks, from memory or from a file that is larger than memory."""

import mmap
import os
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.cache.processes.prefetch import prefetch


def iter_chunks(vectors_MD: NDArray[Any], rows: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (first row, (≤ rows, D) float32) over all vectors, in order; each chunk is valid until the next one.

    The chunks of a memory-mapped .npy file are read from the file, one ahead, and not through the map: pages of a map
    count as this process's memory until something else needs it.

    Raises:
        OSError: If the file is shorter than its header declares.
    """
    source = _mapped_file(vectors_MD)
    if source is None:
        for start in range(0, len(vectors_MD), rows):
            yield start, np.ascontiguousarray(vectors_MD[start : start + rows], dtype=np.float32)
        return
    path, offset = source
    dtype = vectors_MD.dtype
    row_bytes = vectors_MD.shape[1] * dtype.itemsize

    def read() -> Iterator[tuple[int, NDArray[np.float32]]]:
        # Two buffers: one is read into while the caller uses the other.
        buffers = [np.empty((min(rows, len(vectors_MD)), vectors_MD.shape[1]), dtype) for _ in range(2)]
        with open(path, "rb", buffering=0) as file:
            for number, start in enumerate(range(0, len(vectors_MD), rows)):
                chunk_mD = buffers[number % 2][: min(rows, len(vectors_MD) - start)]
                view = memoryview(chunk_mD.data).cast("B")
                done = 0
                while done < len(view):
                    count = os.preadv(file.fileno(), [view[done:]], offset + start * row_bytes + done)
                    if not count:
                        raise OSError(f"{path}: ends before row {len(vectors_MD)}: it is damaged; compute it again")
                    done += count
                yield start, chunk_mD.astype(np.float32, copy=False)

    with closing(prefetch(read(), depth=1)) as chunks:
        yield from chunks


def _mapped_file(vectors_MD: NDArray[Any]) -> tuple[str, int] | None:
    """Return path and offset of the file of a complete memory map; None for an array or a part of a map."""
    if not isinstance(vectors_MD, np.memmap) or not isinstance(vectors_MD.base, mmap.mmap):
        return None
    if vectors_MD.filename is None or not vectors_MD.flags.c_contiguous:
        return None
    return str(vectors_MD.filename), int(vectors_MD.offset)
