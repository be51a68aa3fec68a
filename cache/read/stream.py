"""Rows in the order of tars: the shards of whole tars, checked, read ahead by a thread, for sequential access."""

import contextlib
import copy
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.dtypes import Float32Array
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.processes.prefetch import prefetch
from threetowers.cache.read.caption_runs import CaptionRows, CaptionRuns
from threetowers.cache.read.embedding_cache import EmbeddingCache
from threetowers.cache.read.shard_rows import ShardRows
from threetowers.cache.read.tar_columns import OK, TarColumns

LOCKS = 64  # of the tars that may be read at the same time


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

    def row(self, ordinal: int, key: str) -> Float32Array | None:
        """Return the embedding of the image of one sample, (D,) float32; None if it has none.

        Raises:
            ManifestError: the row belongs to another key, or these are rows of captions.
        """
        if self.columns.runs is not None:
            raise ManifestError(f"tar {self.path} ({self.tar_id}): of: expected rows of images, found rows of text")
        if not self._is_embedded(ordinal, key):
            return None
        row_D: Float32Array = self._decoded(np.array([ordinal]))[0]
        return row_D

    def rows(self, ordinals_m: npt.NDArray[np.int64], captions_m: npt.NDArray[np.int64] | None = None) -> Float32Array:
        """Return the embeddings of m samples, (m, D) float32; their keys are not compared.

        Args:
            ordinals_m: the samples' positions in the tar.
            captions_m: numbers of their captions, for rows of text.

        Raises:
            ManifestError: one of them has no such row.
        """
        missing_m = self.columns.status_n[ordinals_m] != OK
        rows_m = ordinals_m
        if captions_m is not None:
            rows_m, outside = self._runs().rows(ordinals_m, captions_m)
            missing_m[outside] = True
        if missing_m.any():
            first = int(ordinals_m[int(np.argmax(missing_m))])
            raise ManifestError(f"tar {self.path} ({self.tar_id}), ordinal {first}: there is no such row")
        return self._decoded(rows_m)

    def captions(self, ordinal: int, key: str) -> CaptionRows | None:
        """Return which captions of a sample have rows; None if it has no embedding.

        Raises:
            ManifestError: the sample there has another key, or these are rows of images.
        """
        runs = self._runs()
        return runs.captions(ordinal) if self._is_embedded(ordinal, key) else None

    def caption_row(self, ordinal: int, key: str, number: int, caption: str | None = None) -> Float32Array | None:
        """Return the embedding of one caption of a sample, (D,) float32; None if it has no embedding.

        Args:
            ordinal: the sample's position in the tar.
            key: its key, to be compared.
            number: of the caption among those of `captions`.
            caption: the caption, to be compared; None to trust the number.

        Raises:
            ManifestError: as for `captions`; or the caption was changed, moved or added.
        """
        runs = self._runs()
        if not self._is_embedded(ordinal, key):
            return None
        row = runs.row(ordinal, number, caption)
        if row is None:
            difference = runs.captions(ordinal).difference(number, caption)
            raise ManifestError(f"tar {self.path} ({self.tar_id}), ordinal {ordinal}, key {key!r}: {difference}")
        row_D: Float32Array = self._decoded(np.array([row]))[0]
        return row_D

    def caption_rows(self, ordinal: int, key: str) -> Float32Array | None:
        """Return the embeddings of all captions of a sample, (k, D) float32; None if it has none.

        Raises:
            ManifestError: as for `captions`.
        """
        runs = self._runs()
        if not self._is_embedded(ordinal, key):
            return None
        return self._decoded(np.arange(*runs.bound_N[ordinal : ordinal + 2]))

    def _is_embedded(self, ordinal: int, key: str) -> bool:
        """Return whether a sample has an embedding. Raises ManifestError if another one is there."""
        if not self.columns.is_at(ordinal, key):
            raise ManifestError(
                f"tar {self.path} ({self.tar_id}), ordinal {ordinal} of {len(self)}, key {key!r}: the row there is of "
                "another key: the tar is not the one that was cached"
            )
        return bool(self.columns.status_n[ordinal] == OK)

    def _runs(self) -> CaptionRuns:
        if self.columns.runs is None:
            raise ManifestError(f"tar {self.path} ({self.tar_id}): of: expected rows of text, found rows of images")
        return self.columns.runs

    def _decoded(self, rows: npt.NDArray[np.int64]) -> Float32Array:
        scale_n = self.shard.scale_n
        return self.manifest.storage_dtype.decode(self.shard.take(rows), None if scale_n is None else scale_n[rows])


class SharedRows:
    """The rows of tars of one cache that several streams want at about the same time.

    The first reads them, and the others take what it has read for as long as one of them keeps it.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._rows: WeakValueDictionary[tuple[int, int], TarRows] = WeakValueDictionary()
        self._locks = [threading.Lock() for _ in range(LOCKS)]

    def get(self, tar_id: int, view: int, read: Callable[[], TarRows]) -> TarRows:
        """Return the rows of one view of a tar, by `read` unless they are there."""
        key = tar_id, view
        with self._locks[hash(key) % LOCKS]:
            rows = self._rows.get(key)
            if rows is None:
                rows = self._rows[key] = read()
            return rows


def stream_rows(
    cache: EmbeddingCache,
    tar_ids: Sequence[int],
    view: int = 0,
    *,
    depth: int = 2,
    shared: SharedRows | None = None,
) -> Generator[TarRows, None, None]:
    """Yield the rows of these tars, one tar at a time, in this order, while a thread reads the next `depth` tars.

    Memory: at most `depth` + 1 tars of rows. Closing the iterator stops the thread.

    Args:
        cache: the cache.
        tar_ids: the tars.
        view: of their images.
        depth: how many tars are read ahead.
        shared: the rows that other streams of this cache have in memory.

    Raises:
        ManifestError: a tar is incomplete or damaged; raised in its turn.
    """
    cache = copy.copy(cache)  # what it keeps open is not to be shared with the thread
    held = shared or SharedRows()

    def read(tar_id: int) -> TarRows:
        path = cache.tars[tar_id].path
        return TarRows(tar_id, path, cache.manifest, cache.columns(tar_id), cache.shard_rows(tar_id, view))

    def read_all() -> Iterator[TarRows]:
        for tar_id in tar_ids:
            yield held.get(tar_id, view, partial(read, tar_id))

    with contextlib.closing(prefetch(read_all(), depth)) as rows:
        yield from rows
