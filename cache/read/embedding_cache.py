"""Read a cache: check that it is of these tars, then take rows by (tar, ordinal, key), by key, or a tar at a time.

A local cache is mapped into memory; of a remote one, whole shards are fetched, checked and kept, as many as fit into a
bound of memory. A row is handed out only when the hash of its key is the one stored beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from threetowers.cache.format.done_record import DONE, DoneRecord, done_record_name, read_done_record
from threetowers.cache.format.layout import STORE, RowStatus, emb_name
from threetowers.cache.format.manifest import Manifest, ManifestError, read_manifest
from threetowers.cache.format.shard import BadShard
from threetowers.cache.format.tar_table import TarEntry, TarTable, read_table
from threetowers.cache.read.shard_rows import MmapShardRows, ShardRows, open_block, read_block, read_column
from threetowers.cache.storage.storage import Storage, open_storage
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
OK = int(RowStatus.OK)  # an enum's member is slow to look up, and this is compared at every row


@dataclass(frozen=True, eq=False)
class Slot:
    """What is stored of one tar beside the embeddings: (n,) hashes of the keys and (n,) Status."""

    record: DoneRecord
    key_hash_n: npt.NDArray[np.uint64]
    status_n: npt.NDArray[np.uint8]


class EmbeddingCache:
    """A cache, opened for reading. Cheap to open, picklable, safe to use before and after a fork.

    `n_views` is the number of views of each image, each with its own rows. Tars are opened when first touched. At most
    `open_tars` stay open, and at most about `memory` bytes of rows that had to be fetched (none where the cache is
    local), the least recently used going first.
    """

    def __init__(self, storage: Storage, manifest: Manifest, table: TarTable, open_tars: int, memory: int) -> None:
        self.storage, self.manifest, self.table = storage, manifest, table
        self.n_views = manifest.views.count
        self._open_tars, self._memory = open_tars, memory
        self._forget()

    @classmethod
    def open(cls, path: str | Path | Storage, *, open_tars: int = 256, memory: int = 1 << 30) -> EmbeddingCache:
        """Open the cache in a folder or at an fsspec URL.

        Raises:
            ContractError: no cache there, or a damaged manifest or tar table.
            PlaceError: the place cannot be read.
        """
        storage = open_storage(path)
        return cls(storage, read_manifest(storage), read_table(storage), open_tars, memory)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_slots", "_params", "_blocks", "_index"):  # memory maps would be pickled by their contents
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._slots: LRUCache[int, Slot] = LRUCache(self._open_tars)
        self._params: LRUCache[int, Float32] = LRUCache(self._open_tars)
        # A block counts at least the bytes that let `open_tars` blocks fit in, and one block always fits.
        memory, least = max(1, self._memory), max(1, self._memory // self._open_tars)
        self._blocks: LRUCache[tuple[int, int], ShardRows | MmapShardRows] = LRUCache(
            memory, lambda block: min(memory, max(block.nbytes, least))
        )
        self._index: tuple[npt.NDArray[np.uint64], Int64] | None = None

    @property
    def dim(self) -> int:
        """Width D of a row."""
        return self.manifest.dim

    @property
    def tars(self) -> tuple[TarEntry, ...]:
        """The tars of the cache; `tars[i].id == i`."""
        return self.table.entries

    def __len__(self) -> int:
        """Samples in the tars of the cache, with or without an embedding."""
        return sum(entry.n_samples for entry in self.tars)

    def finished(self) -> list[int]:
        """Ids of the tars whose rows are built, by one look at the place; the others are still to come."""
        names = self.storage.listdir(DONE)
        return sorted(int(stem) for stem, _, kind in (name.partition(".") for name in names) if kind == "json")

    def tar_id(self, index: TarIndex) -> int:
        """The id of a tar, wherever it lies now, once its rows are known to be finished.

        Raises:
            ContractError: the cache is of no such tar, or of a tar of that name that was packed again, or half built.
        """
        entry = self.table.find(index)
        self.record(entry.id)
        return entry.id

    def record(self, tar_id: int) -> DoneRecord:
        """The done record of a tar.

        Raises:
            ContractError: the tar is half built, or its record is not valid.
        """
        if tar_id in self._slots:
            return self._slots[tar_id].record
        return read_done_record(self.storage, self.manifest, self.tars[tar_id])

    def status(self, tar_id: int) -> npt.NDArray[np.uint8]:
        """(n,) uint8 Status of each sample of a tar."""
        return self.slot(tar_id).status_n.copy()

    def row(self, tar_id: int, ordinal: int, key: str, view: int = 0) -> Float32:
        """(D,) float32: the raw embedding of one sample.

        Raises:
            ContractError: the row is of another key, has no embedding (see `status`), or is damaged.
        """
        slot = self.slot(tar_id)
        if (
            not 0 <= ordinal < len(slot.status_n)
            or slot.key_hash_n[ordinal] != key_hash(key)
            or slot.status_n[ordinal] != OK
        ):
            raise self._refusal(tar_id, ordinal, key)
        row_D: Float32 = self._decoded(tar_id, view, np.array([ordinal]))[0]
        return row_D

    def rows(
        self, tar_ids: Sequence[int] | Int64, ordinals: Sequence[int] | Int64, keys: Sequence[str] | None = None,
        view: int = 0,
    ) -> Float32:  # fmt: skip
        """(m, D) float32: the raw embeddings of many samples, in the order asked; without `keys` they are not compared.

        Raises:
            ContractError: as for `row`; names the first sample that cannot be had.
        """
        tars_m, ordinals_m = np.asarray(tar_ids, np.int64), np.asarray(ordinals, np.int64)
        if tars_m.shape != ordinals_m.shape or tars_m.ndim != 1 or (keys is not None and len(keys) != len(tars_m)):
            raise ValueError(
                f"rows: tar ids of shape {tars_m.shape}, ordinals of {ordinals_m.shape}, "
                f"{'no' if keys is None else len(keys)} keys: expected one of each for each row"
            )
        found = np.empty((len(tars_m), self.dim), np.float32)
        for tar_id in np.unique(tars_m).tolist():
            at = np.flatnonzero(tars_m == tar_id)
            slot, wanted = self.slot(tar_id), ordinals_m[at]
            good = (wanted >= 0) & (wanted < len(slot.status_n))
            good[good] = slot.status_n[wanted[good]] == RowStatus.OK
            if keys is not None:
                hashes = np.array([key_hash(keys[i]) for i in at.tolist()], np.uint64)
                good[good] = slot.key_hash_n[wanted[good]] == hashes[good]
            if not good.all():
                first = int(np.flatnonzero(~good)[0])
                raise self._refusal(tar_id, int(wanted[first]), None if keys is None else keys[at[first]])
            found[at] = self._decoded(tar_id, view, wanted)
        return found

    def tar(self, tar_id: int, view: int = 0) -> Float32:
        """(n, D) float32: all embeddings of a tar, read and checked as a whole; NaN where a sample has none.

        Raises:
            ContractError: half built or damaged.
        """
        block = self.block(tar_id, view)
        rows_nD = self.manifest.precision.decode(block.rows_nD, block.scale_n)
        rows_nD[self.slot(tar_id).status_n != RowStatus.OK] = np.nan
        return rows_nD

    def find(self, key: str) -> tuple[int, int]:
        """(tar id, ordinal) of a key among the tars that were finished when this was first asked.

        The first call reads the hashes of all keys and sorts them: 16 bytes a sample.

        Raises:
            ContractError: there is no such key, or several tars have it.
        """
        if self._index is None:
            parts = [(tar_id, self.slot(tar_id).key_hash_n) for tar_id in self.finished()]
            places = [tar_id * self.manifest.slot + np.arange(len(hashes)) for tar_id, hashes in parts]
            hashes_N = np.concatenate([hashes for _, hashes in parts] or [np.empty(0, np.uint64)])
            order = np.argsort(hashes_N, kind="stable")
            self._index = hashes_N[order], np.concatenate([*places, np.empty(0, np.int64)])[order]
        hashes_N, rows_N = self._index
        first, last = (np.searchsorted(hashes_N, np.uint64(key_hash(key)), side) for side in ("left", "right"))
        if last == first:
            raise ManifestError(f"{self.storage}: no sample {key!r} in the {len(self.finished())} tars that are built")
        if last - first > 1:
            tars = [self.tars[row // self.manifest.slot].path for row in rows_N[first:last].tolist()]
            raise ManifestError(
                f"{self.storage}: several tars have a sample {key!r}: {tars[:5]}: name one, and use `row`"
            )
        tar_id, ordinal = divmod(int(rows_N[first]), self.manifest.slot)
        return tar_id, ordinal

    def array(self, view: int = 0) -> Any:
        """The Zarr array of a view, (tars x slot, D) as stored: row `tar_id * manifest.slot + ordinal`.

        A `zarr.Array`, for NumPy's slicing, `dask.array.from_zarr` and whatever else takes one. bfloat16 is stored as
        uint16, int8 rows belong times the array `scale`; rows without an embedding hold the fill value.
        """
        import zarr
        from zarr.storage import FsspecStore

        name = f"{STORE}/{emb_name(self._known(view))}"
        path = self.storage.local_path(name)
        store = path if path is not None else FsspecStore.from_url(self.storage.uri(name), read_only=True)
        return zarr.open_array(store, mode="r")

    def view_params(self, tar_id: int, ordinal: int, view: int = 0) -> Float32:
        """(5,) where this view of a sample was cut, for `views.replay`: of caches of crops.

        Raises:
            ContractError: half built or damaged.
        """
        params = self._params.get(tar_id)
        if params is None:
            params = self._params[tar_id] = np.asarray(self._column(tar_id, "view_params"), np.float32)
        found: Float32 = params[ordinal, self._known(view)].copy()
        return found

    def moments(
        self, tar_ids: Sequence[int] | None = None, *, max_rows: int = 65536, seed: int = 0
    ) -> tuple[Float32, Float32]:
        """(D,) mean and (D,) population standard deviation of the OK rows of view 0 of some tars, by default of all.

        Accumulated in float64. Exact where the tars have at most about `max_rows` samples; else over whole chunks drawn
        without replacement until they hold that many. The same for the same tars, `max_rows` and `seed`.

        Raises:
            ContractError: half built, damaged, or without a single OK row.
        """
        rows = self.manifest.chunk_rows
        entries = self.tars if tar_ids is None else [self.tars[tar_id] for tar_id in sorted(tar_ids)]
        places = [(entry.id, i) for entry in entries for i in range(-(-entry.n_samples // rows))]
        count, total, square = 0, np.zeros(self.dim), np.zeros(self.dim)
        shift: npt.NDArray[np.float64] | None = None
        for at in np.random.default_rng(seed).permutation(len(places)).tolist():
            if count >= max_rows:
                break
            tar_id, i = places[at]
            ok = i * rows + np.flatnonzero(self.slot(tar_id).status_n[i * rows : (i + 1) * rows] == RowStatus.OK)
            x_nD = self._decoded(tar_id, 0, ok).astype(np.float64)
            if not len(x_nD):
                continue
            shift = x_nD[0] if shift is None else shift  # keeps sum of squares small where the mean is not
            count, total, square = (
                count + len(x_nD),
                total + (x_nD - shift).sum(0),
                square + ((x_nD - shift) ** 2).sum(0),
            )
        if shift is None:
            raise ManifestError(f"{self.storage}: no row has an embedding: see `threetowers cache info`")
        mean = total / count
        std = np.sqrt(np.maximum(square / count - mean**2, 0))
        return (mean + shift).astype(np.float32), std.astype(np.float32)

    def slot(self, tar_id: int) -> Slot:
        """What is stored of a tar beside its embeddings. Raises ContractError: half built or damaged."""
        slot = self._slots.get(tar_id)
        if slot is None:
            record = self.record(tar_id)
            hashes, status = (self._column(tar_id, name, record) for name in ("key_hash", "status"))
            slot = self._slots[tar_id] = Slot(record, hashes.astype(np.uint64), status.astype(np.uint8))
        return slot

    def block(self, tar_id: int, view: int = 0) -> ShardRows:
        """All rows of a tar as they are stored, by one read that is checked as a whole, and not kept.

        Raises:
            ContractError: half built or damaged.
        """
        try:
            return read_block(self.storage, self.manifest, self.slot(tar_id).record, self._known(view))
        except BadShard as error:
            raise self._damaged(tar_id, error) from error

    def _decoded(self, tar_id: int, view: int, ordinals: Int64) -> Float32:
        where = tar_id, self._known(view)
        try:
            block = self._blocks.get(where)
            if block is None:
                block = self._blocks[where] = open_block(self.storage, self.manifest, self.slot(tar_id).record, view)
            stored, scale_n = block.take(ordinals), block.scale_n
        except BadShard as error:
            raise self._damaged(tar_id, error) from error
        return self.manifest.precision.decode(stored, None if scale_n is None else scale_n[ordinals])

    def _column(self, tar_id: int, name: str, record: DoneRecord | None = None) -> npt.NDArray[np.generic]:
        try:
            return read_column(self.storage, self.manifest, record or self.slot(tar_id).record, name)
        except BadShard as error:
            raise self._damaged(tar_id, error) from error

    def _known(self, view: int) -> int:
        if not 0 <= view < self.n_views:
            raise ValueError(
                f"{self.storage}: view {view}: the cache holds {self.n_views}: {self.manifest.views.policy}"
            )
        return view

    def _refusal(self, tar_id: int, ordinal: int, key: str | None) -> ManifestError:
        slot = self.slot(tar_id)
        named = "" if key is None else f", key {key!r}"
        where = f"{self.storage}: tar {self.tars[tar_id].path} ({tar_id}), ordinal {ordinal}{named}"
        if not 0 <= ordinal < len(slot.status_n):
            return ManifestError(f"{where}: the tar has {len(slot.status_n)} samples")
        if key is not None and slot.key_hash_n[ordinal] != key_hash(key):
            return ManifestError(f"{where}: the row there is of another key: the tar is not the one that was cached")
        return ManifestError(f"{where}: no embedding: {RowStatus(slot.status_n[ordinal]).name.lower()}")

    def _damaged(self, tar_id: int, error: BadShard) -> ManifestError:
        return ManifestError(
            f"{self.storage}: rows of tar {self.tars[tar_id].path} ({tar_id}) are damaged: {error}. Delete "
            f"{self.storage.uri(done_record_name(tar_id))} and run `threetowers cache build` again"
        )
