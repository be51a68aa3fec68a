"""The stored rows of one tar: read into memory, or memory-mapped and checked chunk by chunk.

In both cases a row is returned only if its bytes are those that the tar's done record describes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.format.done_record import DoneRecord, FileSum
from threetowers.cache.format.dtypes import Float32Array, StoredArray
from threetowers.cache.format.layout import arrays, emb_name, scale_name, tar_files
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.shard import CRC, BadShard, chunk, chunk_offsets
from threetowers.cache.storage.storage import Storage

Rows = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class ShardRows:
    """(n, D) rows as they are stored, in memory, and their (n,) scales if the dtype has them."""

    rows_nD: StoredArray
    scale_n: Float32Array | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the rows."""
        return self.rows_nD.nbytes

    def take(self, rows: Rows) -> StoredArray:
        """Return a copy of some of the rows, as they are stored."""
        return self.rows_nD[rows]


class MmapShardRows:
    """The rows of a memory-mapped local file. A chunk is checked when one of its rows is first used."""

    def __init__(self, path: Path, crc32c: Sequence[int], manifest: Manifest, scale_n: Float32Array | None) -> None:
        """Map a file. Raises BadShard if it is not laid out as a shard of this cache."""
        dtype = _dtype(manifest)
        dim = manifest.dim
        chunk_rows = manifest.chunk_rows
        n_stored = len(crc32c)
        self._path = path
        self._crc32c = crc32c
        self._chunk_rows = chunk_rows
        self.scale_n = scale_n
        chunk_bytes = chunk_rows * dim * dtype.itemsize
        self._data = np.memmap(path, np.uint8, "r")
        offsets = chunk_offsets(self._data, manifest.chunks_per_tar, n_stored, chunk_bytes)
        if (offsets != np.arange(n_stored) * (chunk_bytes + CRC)).any():
            raise BadShard(f"{path}: its chunks are not in the order in which they are written")
        strides = (chunk_bytes + CRC, dim * dtype.itemsize, dtype.itemsize)
        self._chunks: StoredArray = np.ndarray((n_stored, chunk_rows, dim), dtype, self._data.data, strides=strides)
        self._checked = np.zeros(n_stored, np.bool_)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that a memory map needs beside the page cache: none."""
        return 0

    def take(self, rows: Rows) -> StoredArray:
        """Return a copy of some of the rows, as they are stored. Raises BadShard if a chunk has changed."""
        chunk_m, inside_m = np.divmod(rows, self._chunk_rows)
        if not self._checked[chunk_m].all():
            for i in np.unique(chunk_m[~self._checked[chunk_m]]):
                self._check(int(i))
        return self._chunks[chunk_m, inside_m]

    def _check(self, i: int) -> None:
        chunk_bytes = self._chunks[i].nbytes
        try:
            chunk(self._data, i * (chunk_bytes + CRC), chunk_bytes, self._crc32c[i])
        except BadShard as error:
            raise BadShard(f"{self._path}: {error}") from error
        self._checked[i] = True


def open_shard_rows(storage: Storage, manifest: Manifest, record: DoneRecord, view: int) -> ShardRows | MmapShardRows:
    """Open the rows of one view of a tar: memory-mapped if local, else read. Raises BadShard."""
    path = storage.local_path(tar_files(manifest, record.tar_id)[emb_name(view)])
    if path is None:
        return read_shard_rows(storage, manifest, record, view)
    return MmapShardRows(path, record.chunk_crc32c[emb_name(view)], manifest, _scale(storage, manifest, record, view))


def read_shard_rows(storage: Storage, manifest: Manifest, record: DoneRecord, view: int) -> ShardRows:
    """Read all rows of one view of a tar, by one request, and compare the file with its digest.

    Raises:
        BadShard: it is not the file that was written.
    """
    name = emb_name(view)
    dtype = _dtype(manifest)
    file = tar_files(manifest, record.tar_id)[name]
    path = storage.local_path(file)
    n_stored = len(record.chunk_crc32c[name])
    chunk_bytes = manifest.chunk_rows * manifest.dim * dtype.itemsize
    rows_cB = np.empty((n_stored, chunk_bytes), np.uint8)
    if path is None:
        data = storage.read(file)
        found = FileSum.of(data)
        if found == record.files[name]:
            rows_cB[:] = np.ndarray((n_stored, chunk_bytes), np.uint8, data, strides=(chunk_bytes + CRC, 1))
    else:
        found = _read_chunks(path, rows_cB)
    if found != record.files[name]:
        raise BadShard(f"{storage.uri(file)} is not the file that was written")
    rows_nD = rows_cB.reshape(-1).view(dtype).reshape(-1, manifest.dim)[: record.n_rows]
    return ShardRows(rows_nD, _scale(storage, manifest, record, view))


def read_column(storage: Storage, manifest: Manifest, record: DoneRecord, name: str) -> StoredArray:
    """Read what a tar has of another array than embeddings: hashes, statuses, scales, ends of runs. Raises BadShard."""
    file = tar_files(manifest, record.tar_id)[name]
    spec = arrays(manifest)[name]
    data = storage.read(file)
    if FileSum.of(data) != record.files[name]:
        raise BadShard(f"{storage.uri(file)} is not the file that was written")
    dtype = np.dtype(spec.dtype).newbyteorder("<")
    length = spec.length(record.n_samples, record.n_rows)
    if not spec.chunked:
        return np.ndarray((length, *spec.row), dtype, data)
    n_stored = len(record.chunk_crc32c[name])
    chunk_bytes = manifest.chunk_rows * dtype.itemsize  # each row is a number
    chunks = np.ndarray((n_stored, manifest.chunk_rows), dtype, data, strides=(chunk_bytes + CRC, dtype.itemsize))
    return chunks.reshape(-1)[:length]


def _read_chunks(path: Path, rows_cB: npt.NDArray[np.uint8]) -> FileSum:
    """Read a shard's chunks into place, hashing each while it is in the processor's cache; return the file's sum."""
    digest = xxhash.xxh3_128()
    crc = bytearray(CRC)
    total = 0
    file = os.open(path, os.O_RDONLY)
    try:
        for row_B in rows_cB:
            total += os.preadv(file, [row_B, crc], total)
            digest.update(row_B)
            digest.update(crc)
        while tail := os.pread(file, 1 << 20, total):
            total += len(tail)
            digest.update(tail)
    finally:
        os.close(file)
    return FileSum(total, digest.hexdigest())


def _scale(storage: Storage, manifest: Manifest, record: DoneRecord, view: int) -> Float32Array | None:
    if not manifest.storage_dtype.scaled:
        return None
    return read_column(storage, manifest, record, scale_name(view)).astype(np.float32)


def _dtype(manifest: Manifest) -> np.dtype[np.generic]:
    return np.dtype(manifest.storage_dtype.stored).newbyteorder("<")
