"""Rows in the order of tars: whole shards, checked, read ahead by a thread. For data that is streamed tar after tar."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.prefetch import prefetch
from threetowers.cache.read.embedding_cache import EmbeddingCache, Slot
from threetowers.cache.read.shard_rows import ShardRows
from threetowers.cache.webdataset.tar_index import key_hash


@dataclass(frozen=True, eq=False)
class TarRows:
    """All rows of one view of one tar, in memory."""

    tar_id: int
    path: str
    manifest: Manifest
    slot: Slot
    block: ShardRows

    def __len__(self) -> int:
        return len(self.slot.status_n)

    def row(self, ordinal: int, key: str) -> npt.NDArray[np.float32] | None:
        """(D,) float32 of one sample; None where it has no embedding.

        Raises:
            ContractError: the row is of another key.
        """
        if not 0 <= ordinal < len(self) or self.slot.key_hash_n[ordinal] != key_hash(key):
            raise ManifestError(
                f"tar {self.path} ({self.tar_id}), ordinal {ordinal} of {len(self)}, key {key!r}: the row there is of "
                "another key: the tar is not the one that was cached"
            )
        if self.slot.status_n[ordinal] != RowStatus.OK:
            return None
        at = np.array([ordinal])
        scale = self.block.scale_n
        row_D: npt.NDArray[np.float32] = self.manifest.precision.decode(
            self.block.take(at), None if scale is None else scale[at]
        )[0]
        return row_D


def stream_rows(
    cache: EmbeddingCache, tar_ids: Sequence[int], view: int = 0, *, depth: int = 2
) -> Generator[TarRows, None, None]:
    """The rows of these tars, one tar at a time, in this order; the next `depth` tars are being read meanwhile.

    Memory: at most `depth` + 1 tars of rows. Closing the iterator stops the thread.

    Raises:
        ContractError: half built or damaged; raised when the tar's turn comes.
    """

    cache = copy.copy(cache)  # what it keeps open is not to be shared with the thread

    def read() -> Iterator[TarRows]:
        for tar_id in tar_ids:
            path = cache.tars[tar_id].path
            yield TarRows(tar_id, path, cache.manifest, cache.slot(tar_id), cache.block(tar_id, view))

    with contextlib.closing(prefetch(read(), depth)) as rows:
        yield from rows
