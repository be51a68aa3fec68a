"""Vectors in blocks, from memory or from a file: what is larger than memory passes through two buffers."""

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from threetowers.eval.encoders.embedding_store import Embeddings as Floats


def blocks(vectors_MD: NDArray[Any], rows: int) -> Iterator[tuple[int, Floats]]:
    """Yield (first row, (≤ rows, D) float32) over all vectors, in order; each is valid until the next is asked for.

    Of a memory-mapped .npy file the blocks are read from the file, one ahead, and not through the map: pages of a map
    count as this process's memory until something else needs it.
    """
    source = _file_of(vectors_MD)
    if source is None:
        for start in range(0, len(vectors_MD), rows):
            yield start, np.ascontiguousarray(vectors_MD[start : start + rows], dtype=np.float32)
        return
    path, offset = source
    width, dtype = vectors_MD.shape[1], vectors_MD.dtype
    with ExitStack() as stack:
        file = os.open(path, os.O_RDONLY)
        stack.callback(os.close, file)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        buffers = [np.empty((min(rows, len(vectors_MD)), width), dtype) for _ in range(2)]

        def read(start: int, number: int) -> Floats:
            part = buffers[number % 2][: min(rows, len(vectors_MD) - start)]
            view, at = memoryview(part.data).cast("B"), 0
            while at < len(view):
                count = os.preadv(file, [view[at:]], offset + start * width * dtype.itemsize + at)
                if not count:
                    raise OSError(f"{path}: ends before row {len(vectors_MD)}: it is damaged; compute it again")
                at += count
            return part.astype(np.float32, copy=False)

        starts = range(0, len(vectors_MD), rows)
        ahead = pool.submit(read, 0, 0)
        for number, start in enumerate(starts):
            block = ahead.result()
            if number + 1 < len(starts):
                ahead = pool.submit(read, starts[number + 1], number + 1)
            yield start, block


def _file_of(vectors_MD: NDArray[Any]) -> tuple[str, int] | None:
    """Path and offset of the file that a whole memory map stands for; None for an array or a part of a map."""
    if not isinstance(vectors_MD, np.memmap) or not isinstance(vectors_MD.base, mmap.mmap):
        return None
    if vectors_MD.filename is None or not vectors_MD.flags.c_contiguous:
        return None
    return str(vectors_MD.filename), int(vectors_MD.offset)
