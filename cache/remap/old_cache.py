"""The cache that rows are carried over from, and which of its rows go with the samples of a tar."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import cached_property

import numpy as np
import numpy.typing as npt
from cachetools import LRUCache

from threetowers.cache.format.done_record import Cosines, read_done_record
from threetowers.cache.format.layout import TarRoom
from threetowers.cache.format.manifest import Manifest, read_manifest
from threetowers.cache.format.row_buffer import RowBuffer
from threetowers.cache.format.store import Arrays, read_tar_rows
from threetowers.cache.format.tar_table import read_table
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash

OPEN_TARS = 64
AS_BEFORE = "as in the cache that its row was taken from"  # why a sample that was looked at has no embedding

Flags = npt.NDArray[np.bool_]


class OldCache:
    """A complete cache; the arrays of the last OPEN_TARS tars that were read stay in memory.

    Raises:
        ManifestError: it is incomplete or damaged.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.manifest = read_manifest(storage)
        self.table = read_table(storage)
        self.records = [read_done_record(storage, self.manifest, entry) for entry in self.table.entries]
        self._open: LRUCache[int, Arrays] = LRUCache(OPEN_TARS)

    def columns(self, tar_id: int, names: Collection[str]) -> Arrays:
        """Return some arrays of a tar, without what is beyond its last sample or row."""
        entry = self.table.entries[tar_id]
        return read_tar_rows(self.storage, self.manifest, entry, self.records[tar_id], list(names))

    def rows(self, tar_id: int) -> Arrays:
        """Return all arrays of a tar."""
        arrays = self._open.get(tar_id)
        if arrays is None:
            entry = self.table.entries[tar_id]
            arrays = self._open[tar_id] = read_tar_rows(self.storage, self.manifest, entry, self.records[tar_id])
        return arrays

    def cosines(self, tar_ids: npt.NDArray[np.integer]) -> Cosines:
        """Return the cosines of rows of these tars, one for each row, as far as the records of the tars tell."""
        least = []
        total = 0.0
        count = 0
        for tar_id, n in zip(*np.unique(tar_ids, return_counts=True), strict=True):
            cosines = self.records[int(tar_id)].cosines
            if cosines.min is not None and cosines.mean is not None:
                least.append(cosines.min)
                total += cosines.mean * int(n)
                count += int(n)
        return Cosines(min(least), total / count) if least else Cosines(None, None)


class TarMatch(ABC):
    """Which rows of the old cache go with the samples of a tar.

    Attributes:
        index: of the tar.
        tar_xxh3_128: digest of the tar; empty where it was not read from end to end.
        defect_n: (n,) which samples cannot have a row, whatever the old cache has.
        new_n: (n,) whose key has none.
        changed_n: (n,) whose key has one of something else.
        nonfinite_n: (n,) whose embedding was nonfinite: there is no row to carry over, and none to miss.
    """

    tar_xxh3_128 = ""
    defect_n: Flags
    new_n: Flags
    changed_n: Flags
    nonfinite_n: Flags

    def __init__(self, index: TarIndex) -> None:
        self.index = index

    @abstractmethod
    def reason(self, ordinal: int) -> str:
        """Return why a new or changed sample has no row."""

    @abstractmethod
    def room(self, row_bytes: int, largest_tar: int) -> TarRoom:
        """Return the room of each tar that this one needs, where the largest has so many samples."""

    @abstractmethod
    def buffer(self, manifest: Manifest) -> tuple[RowBuffer, Cosines]:
        """Return what will be stored of the tar, and the cosines that its rows had when they were embedded."""

    @property
    def n_matched(self) -> int:
        """Number of samples with a row."""
        return int((~(self.defect_n | self.new_n | self.changed_n | self.nonfinite_n)).sum())

    @cached_property
    def key_n(self) -> npt.NDArray[np.uint64]:
        """(n,) hashes of the keys."""
        return np.array([key_hash(sample.key) for sample in self.index.samples], dtype=np.uint64)

    def names(self) -> list[str]:
        """Return the samples without a row, and why."""
        return [
            f"{self.index.location}: {self.index.samples.key(ordinal)!r}: {self.reason(ordinal)}"
            for ordinal in np.flatnonzero(self.new_n | self.changed_n).tolist()
        ]
