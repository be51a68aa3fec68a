"""Rows in the order of tars: the shards of whole tars, checked, read ahead by a thread, for sequential access."""

import contextlib
import copy
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.processes.prefetch import prefetch
from threetowers.cache.read.embedding_cache import EmbeddingCache, TarColumns
from threetowers.cache.read.shard_rows import ShardRows
from threetowers.cache.webdataset.tar_index import key_hash


@dataclass(frozen=True, eq=False)
class TarRows:
    """All rows of one view of one tar, in memory."""

    tar_id: int
    path: str
    manifest: Manifest
    columns: TarColumns
    shard: ShardRows

    def __len__(self) -> int:
        """Return the number of samples in the tar."""
        return len(self.columns.status_n)

    def row(self, ordinal: int, key: str) -> npt.NDArray[np.float32] | None:
        """Return the embedding of one sample, (D,) float32; None if it has none.

        Raises:
            ManifestError: the row belongs to another key.
        """
        if not 0 <= ordinal < len(self) or self.columns.key_hash_n[ordinal] != key_hash(key):
            raise ManifestError(
                f"tar {self.path} ({self.tar_id}), ordinal {ordinal} of {len(self)}, key {key!r}: the row there is of "
                "another key: the tar is not the one that was cached"
            )
        if self.columns.status_n[ordinal] != RowStatus.OK:
            return None
        at = np.array([ordinal])
        scale_n = self.shard.scale_n
        stored = self.shard.take(at)
        row_D: npt.NDArray[np.float32] = self.manifest.storage_dtype.decode(
            stored, None if scale_n is None else scale_n[at]
        )[0]
        return row_D


def stream_rows(
    cache: EmbeddingCache, tar_ids: Sequence[int], view: int = 0, *, depth: int = 2
) -> Generator[TarRows, None, None]:
    """Yield the rows of these tars, one tar at a time, in this order, while a thread reads the next `depth` tars.

    Memory: at most `depth` + 1 tars of rows. Closing the iterator stops the thread.

    Raises:
        ManifestError: a tar is incomplete or damaged; raised in its turn.
    """
    cache = copy.copy(cache)  # what it keeps open is not to be shared with the thread

    def read() -> Iterator[TarRows]:
        for tar_id in tar_ids:
            path = cache.tars[tar_id].path
            yield TarRows(tar_id, path, cache.manifest, cache.columns(tar_id), cache.shard_rows(tar_id, view))

    with contextlib.closing(prefetch(read(), depth)) as rows:
        yield from rows
