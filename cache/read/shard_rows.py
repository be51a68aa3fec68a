"""The stored rows of one view of one tar: read whole into memory, or mapped and checked chunk by chunk.

Either way no row is handed out unless its bytes are those that the tar's done record speaks of.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.format.done_record import DoneRecord, FileSum
from threetowers.cache.format.layout import arrays, emb_name, scale_name, slot_files
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.shard import CRC, BadShard, chunk, chunk_offsets
from threetowers.cache.storage.storage import Storage

Stored = npt.NDArray[np.generic]
Float32 = npt.NDArray[np.float32]
Ordinals = npt.NDArray[np.integer]


@dataclass(frozen=True, eq=False)
class ShardRows:
    """(n, D) rows as they are stored, in memory, and their (n,) scales where the precision has them."""

    rows_nD: Stored
    scale_n: Float32 | None

    @property
    def nbytes(self) -> int:
        return self.rows_nD.nbytes

    def take(self, ordinals: Ordinals) -> Stored:
        """The stored rows of these ordinals, a copy."""
        return self.rows_nD[ordinals]


class MmapShardRows:
    """The same of a local file that is mapped into memory. A chunk is checked when one of its rows is first touched."""

    def __init__(self, path: Path, crc32c: Sequence[int], manifest: Manifest, scale_n: Float32 | None) -> None:
        """Raises BadShard for a file that is not laid out as a shard of this cache is."""
        dtype, dim = _dtype(manifest), manifest.dim
        self._path, self._crc32c, self._chunk_rows = path, crc32c, manifest.chunk_rows
        self.scale_n = scale_n
        size = manifest.chunk_rows * dim * dtype.itemsize
        self._data = data = np.memmap(path, np.uint8, "r")
        offsets = chunk_offsets(data, manifest.n_chunks, len(crc32c), size)
        if (offsets != np.arange(len(crc32c)) * (size + CRC)).any():
            raise BadShard(f"{path}: its chunks are not in the order in which they are written")
        shape, strides = (len(crc32c), manifest.chunk_rows, dim), (size + CRC, dim * dtype.itemsize, dtype.itemsize)
        self._chunks: Stored = np.ndarray(shape, dtype, data.data, strides=strides)
        self._checked = np.zeros(len(crc32c), np.bool_)

    @property
    def nbytes(self) -> int:
        """Bytes of memory that only this holds."""
        return 0

    def take(self, ordinals: Ordinals) -> Stored:
        """As Block.take. Raises BadShard if a chunk is not as it was written."""
        at, inside = np.divmod(ordinals, self._chunk_rows)
        if not self._checked[at].all():
            for i in np.unique(at[~self._checked[at]]):
                self._check(int(i))
        return self._chunks[at, inside]

    def _check(self, i: int) -> None:
        size = self._chunks[i].nbytes
        try:
            chunk(self._data, i * (size + CRC), size, self._crc32c[i])
        except BadShard as error:
            raise BadShard(f"{self._path}: {error}") from error
        self._checked[i] = True


def open_block(storage: Storage, manifest: Manifest, record: DoneRecord, view: int) -> ShardRows | MmapShardRows:
    """The rows of one view of a tar: mapped where they lie in a local file, else read whole. Raises BadShard."""
    path = storage.local_path(slot_files(manifest, record.tar_id)[emb_name(view)])
    if path is None:
        return read_block(storage, manifest, record, view)
    return MmapShardRows(path, record.chunk_crc32c[emb_name(view)], manifest, _scale(storage, manifest, record, view))


def read_block(storage: Storage, manifest: Manifest, record: DoneRecord, view: int) -> ShardRows:
    """The rows of one view of a tar, read whole, by one request, and compared with the digest of the whole file.

    Raises:
        BadShard: it is not the file that was written.
    """
    name, dtype = emb_name(view), _dtype(manifest)
    file, stored = slot_files(manifest, record.tar_id)[name], len(record.chunk_crc32c[name])
    size, path = manifest.chunk_rows * manifest.dim * dtype.itemsize, storage.local_path(file)
    rows_cB = np.empty((stored, size), np.uint8)
    if path is None:
        data = storage.read(file)
        found = FileSum.of(data)
        if found == record.files[name]:
            rows_cB[:] = np.ndarray((stored, size), np.uint8, data, strides=(size + CRC, 1))
    else:
        found = _read_chunks(path, rows_cB)
    if found != record.files[name]:
        raise BadShard(f"{storage.uri(file)} is not the file that was written")
    rows_nD = rows_cB.reshape(-1).view(dtype).reshape(-1, manifest.dim)[: record.n_samples]
    return ShardRows(rows_nD, _scale(storage, manifest, record, view))


def read_column(storage: Storage, manifest: Manifest, record: DoneRecord, name: str) -> Stored:
    """(n, ...) of an array that is not cut into chunks: hashes, statuses, scales, crop boxes. Raises BadShard."""
    file, spec = slot_files(manifest, record.tar_id)[name], arrays(manifest)[name]
    data = storage.read(file)
    if FileSum.of(data) != record.files[name]:
        raise BadShard(f"{storage.uri(file)} is not the file that was written")
    shape, dtype = (record.n_samples, *spec.row), np.dtype(spec.dtype).newbyteorder("<")
    return np.ndarray(shape, dtype, data)


def _read_chunks(path: Path, rows_cB: npt.NDArray[np.uint8]) -> FileSum:
    """Read a shard's chunks into place, hashing each while it is in the processor's cache; what the file was."""
    digest, crc, total = xxhash.xxh3_128(), bytearray(CRC), 0
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


def _scale(storage: Storage, manifest: Manifest, record: DoneRecord, view: int) -> Float32 | None:
    if not manifest.precision.scaled:
        return None
    return read_column(storage, manifest, record, scale_name(view)).astype(np.float32)


def _dtype(manifest: Manifest) -> np.dtype[np.generic]:
    return np.dtype(manifest.precision.stored).newbyteorder("<")
