"""Read a cache: check that it is of these tars, then take rows by (tar, ordinal, key).

Rows come straight from a memory map of the shard file. The checksum of a chunk (about 1 MB) is compared the first time
one of its rows is touched; a row is handed out only when the hash of its key is the one stored beside it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from threetowers.cache import shard
from threetowers.cache.contract import Contract, ContractError, TarEntry, TarTable, read_contract
from threetowers.cache.layout import Status, slot_files
from threetowers.cache.place import Place, place_of
from threetowers.cache.record import FileSum, Record, read_record, record_name
from threetowers.cache.tars import TarIndex, key_hash

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class _Slot:
    """The open rows of one tar; `verified[i]` says that chunk i has been checked."""

    record: Record
    emb: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    verified: npt.NDArray[np.bool_]
    key_hash: npt.NDArray[np.uint64]
    status: npt.NDArray[np.uint8]


class EmbeddingCache:
    """A cache folder, opened for reading. Cheap to open, picklable, safe to use before and after a fork.

    Tars are opened when first touched, and at most `open_tars` stay open, the least recently used going first.
    """

    def __init__(self, place: Place, contract: Contract, table: TarTable, open_tars: int) -> None:
        self.place, self.contract, self.table, self.open_tars = place, contract, table, open_tars
        self._slots: OrderedDict[int, _Slot] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path | Place, *, open_tars: int = 256) -> EmbeddingCache:
        """Open a cache.

        Raises:
            ContractError: no cache there, or a damaged manifest or tar table.
        """
        place = place_of(path)
        contract, table = read_contract(place)
        return cls(place, contract, table, open_tars)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_slots": OrderedDict()}  # a memory map would be pickled by its contents

    @property
    def dim(self) -> int:
        """Width D of a row."""
        return self.contract.dim

    @property
    def tars(self) -> tuple[TarEntry, ...]:
        """The tars of the cache; `tars[i].id == i`."""
        return self.table.entries

    def __len__(self) -> int:
        """Samples in the tars of the cache, with or without an embedding."""
        return sum(entry.n_samples for entry in self.tars)

    def tar_id(self, index: TarIndex) -> int:
        """The id of a tar, wherever it lies now, once its rows are known to be finished.

        Raises:
            ContractError: the cache is of no such tar, or of a tar of that name that was packed again, or half built.
        """
        entry = self.table.find(index)
        self.record(entry.id)
        return entry.id

    def record(self, tar_id: int) -> Record:
        """The done record of a tar.

        Raises:
            ContractError: the tar is half built, or its record is not valid.
        """
        if tar_id in self._slots:
            return self._slots[tar_id].record
        return read_record(self.place, self.contract, self.tars[tar_id])

    def status(self, tar_id: int) -> npt.NDArray[np.uint8]:
        """(n,) uint8 Status of each sample of a tar."""
        return self._slot(tar_id).status.copy()

    def row(self, tar_id: int, ordinal: int, key: str) -> Float32:
        """(D,) the raw embedding of one sample, a copy.

        Raises:
            ContractError: the row is of another key, has no embedding (see `status`), or is damaged.
        """
        slot = self._slot(tar_id)
        where = f"{self.place}: tar {self.tars[tar_id].path} ({tar_id}), ordinal {ordinal}, key {key!r}"
        if not 0 <= ordinal < len(slot.status):
            raise ContractError(f"{where}: the tar has {len(slot.status)} samples")
        if slot.key_hash[ordinal] != key_hash(key):
            raise ContractError(f"{where}: the row there is of another key: the tar is not the one that was cached")
        if slot.status[ordinal] != Status.OK:
            raise ContractError(f"{where}: no embedding: {Status(slot.status[ordinal]).name.lower()}")
        chunk, inside = divmod(ordinal, self.contract.chunk_rows)
        row: Float32 = self._chunk(tar_id, slot, chunk)[inside].astype(np.float32)
        return row

    def tar(self, tar_id: int) -> Float32:
        """(n, D) all embeddings of a tar, NaN where a sample has none.

        Raises:
            ContractError: half built or damaged.
        """
        slot = self._slot(tar_id)
        chunks = [self._chunk(tar_id, slot, i) for i in range(len(slot.offsets))]
        return np.concatenate(chunks)[: len(slot.status)].astype(np.float32)

    def moments(
        self, tar_ids: Sequence[int] | None = None, *, max_rows: int = 65536, seed: int = 0
    ) -> tuple[Float32, Float32]:
        """(D,) mean and (D,) population standard deviation of the OK rows of some tars, by default of all.

        Accumulated in float64. Exact where the tars have at most about `max_rows` samples; else over whole chunks drawn
        without replacement until they hold that many. The same for the same tars, `max_rows` and `seed`.

        Raises:
            ContractError: half built, damaged, or without a single OK row.
        """
        rows = self.contract.chunk_rows
        entries = self.tars if tar_ids is None else [self.tars[tar_id] for tar_id in sorted(tar_ids)]
        places = [(entry.id, i) for entry in entries for i in range(-(-entry.n_samples // rows))]
        count, total, square = 0, np.zeros(self.dim), np.zeros(self.dim)
        shift: npt.NDArray[np.float64] | None = None
        for at in np.random.default_rng(seed).permutation(len(places)).tolist():
            if count >= max_rows:
                break
            tar_id, i = places[at]
            slot = self._slot(tar_id)
            ok = slot.status[i * rows : (i + 1) * rows] == Status.OK
            x_nD = self._chunk(tar_id, slot, i)[: len(ok)][ok].astype(np.float64)
            if not len(x_nD):
                continue
            shift = x_nD[0] if shift is None else shift  # keeps sum of squares small where the mean is not
            count, total, square = (
                count + len(x_nD),
                total + (x_nD - shift).sum(0),
                square + ((x_nD - shift) ** 2).sum(0),
            )
        if shift is None:
            raise ContractError(f"{self.place}: no row has an embedding: see `threetowers cache info`")
        mean = total / count
        std = np.sqrt(np.maximum(square / count - mean**2, 0))
        return (mean + shift).astype(np.float32), std.astype(np.float32)

    def _slot(self, tar_id: int) -> _Slot:
        slot = self._slots.get(tar_id)
        if slot is None:
            slot = self._slots[tar_id] = self._open(tar_id)
            if len(self._slots) > self.open_tars:
                self._slots.popitem(last=False)
        self._slots.move_to_end(tar_id)
        return slot

    def _open(self, tar_id: int) -> _Slot:
        contract, entry = self.contract, self.tars[tar_id]
        record = self.record(tar_id)
        files = slot_files(tar_id)
        stored, n_chunks = -(-entry.n_samples // contract.chunk_rows), contract.slot // contract.chunk_rows
        path = self.place.local(files["emb"])
        emb = np.memmap(path, np.uint8, "r") if path else np.frombuffer(self.place.read(files["emb"]), np.uint8)
        data = {name: self.place.read(files[name]) for name in ("key_hash", "status")}
        try:
            offsets = shard.chunk_offsets(emb, n_chunks, stored, self._chunk_bytes)
            for name in ("key_hash", "status"):
                if FileSum.of(data[name]) != record.files[name]:
                    raise shard.BadShard(f"{self.place.at(files[name])} is not the file that was written")
        except shard.BadShard as error:
            raise self._damaged(tar_id, error) from error
        hashes = np.frombuffer(data["key_hash"], dtype="<u8", count=entry.n_samples)
        status = np.frombuffer(data["status"], dtype="u1", count=entry.n_samples)
        return _Slot(record, emb, offsets, np.zeros(stored, dtype=np.bool_), hashes, status)

    @property
    def _chunk_bytes(self) -> int:
        return self.contract.chunk_rows * self.dim * np.dtype(self.contract.dtype).itemsize

    def _chunk(self, tar_id: int, slot: _Slot, i: int) -> npt.NDArray[np.floating]:
        offset = int(slot.offsets[i])
        if slot.verified[i]:
            payload = slot.emb[offset : offset + self._chunk_bytes]
        else:
            try:
                payload = shard.chunk(slot.emb, offset, self._chunk_bytes, slot.record.chunk_crc32c[i])
            except shard.BadShard as error:
                raise self._damaged(tar_id, error) from error
            slot.verified[i] = True
        rows = np.frombuffer(payload, dtype=np.dtype(self.contract.dtype).newbyteorder("<"))
        return rows.reshape(self.contract.chunk_rows, self.dim)

    def _damaged(self, tar_id: int, error: shard.BadShard) -> ContractError:
        return ContractError(
            f"{self.place}: rows of tar {self.tars[tar_id].path} ({tar_id}) are damaged: {error}. Delete "
            f"{self.place.at(record_name(tar_id))} and run `threetowers cache build` again"
        )
