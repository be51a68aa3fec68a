"""Rows of images by key and image: a row goes with a sample if the hashes of both equal those stored beside it."""

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.format.done_record import Cosines
from threetowers.cache.format.image_row_buffer import ImageRowBuffer
from threetowers.cache.format.layout import RowStatus, TarRoom, image_room
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.remap.old_cache import AS_BEFORE, Flags, OldCache, TarMatch
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.sample_stream import stream_images
from threetowers.cache.webdataset.tar_index import TarIndex

SAMPLE_COLUMNS = ("key_hash", "image_hash", "status")
Hashes = npt.NDArray[np.uint64]


class OldImages(OldCache):
    """The rows of a cache of images: 41 bytes a row in memory."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)

        # Key, image, status, tar and ordinal of every row.
        keys = []
        images = []
        statuses = []
        tars = []
        ordinals = []
        for entry in self.table.entries:
            columns = self.columns(entry.id, SAMPLE_COLUMNS)
            keys.append(columns["key_hash"][: entry.n_samples])
            images.append(columns["image_hash"][: entry.n_samples])
            statuses.append(columns["status"][: entry.n_samples])
            tars.append(np.full(entry.n_samples, entry.id, np.int32))
            ordinals.append(np.arange(entry.n_samples, dtype=np.int32))
        self.key_N = np.concatenate(keys)
        self.image_N = np.concatenate(images)
        self.status_N = np.concatenate(statuses)
        self.tar_N = np.concatenate(tars)
        self.ordinal_N = np.concatenate(ordinals)

        # Sorted for look-up by key and image, and by key alone.
        combined_N = _combined(self.key_N, self.image_N)
        self._order = np.argsort(combined_N, kind="stable")
        self._combined_N = combined_N[self._order]
        self._keys_N = np.sort(self.key_N)

    def find(self, key_n: Hashes, image_n: Hashes) -> npt.NDArray[np.int64]:
        """Return the (n,) row of each key and image, -1 where there is none."""
        at = np.minimum(np.searchsorted(self._combined_N, _combined(key_n, image_n)), len(self._combined_N) - 1)
        row_n = self._order[at]
        return np.where((self.key_N[row_n] == key_n) & (self.image_N[row_n] == image_n), row_n, -1)

    def has_key(self, key_n: Hashes) -> Flags:
        """Return (n,) whether there is a row of this key, with any image."""
        at = np.minimum(np.searchsorted(self._keys_N, key_n), len(self._keys_N) - 1)
        found_n: Flags = self._keys_N[at] == key_n
        return found_n


def _combined(key_n: Hashes, image_n: Hashes) -> Hashes:
    """Return one number for a key and an image, to sort by; a look-up compares both as well."""
    return key_n ^ (image_n * np.uint64(0x9E3779B97F4A7C15))


class ImageMatch(TarMatch):
    """Which row of the old cache goes with each sample of a tar: `row_n`, -1 for samples that have none."""

    def __init__(self, index: TarIndex, source: OldImages) -> None:
        super().__init__(index)
        self._source = source
        digest = xxhash.xxh3_128()
        self.image_n = np.zeros(len(index.samples), np.uint64)
        for ordinal, _, data in stream_images(index, digest):
            self.image_n[ordinal] = xxhash.xxh3_64_intdigest(data)
        self.tar_xxh3_128 = digest.hexdigest()
        self.defect_n = np.zeros(len(index.samples), np.bool_)
        for ordinals in index.samples.defects().values():
            self.defect_n[ordinals] = True
        self.row_n = np.where(self.defect_n, -1, source.find(self.key_n, self.image_n))
        lacks_n = (self.row_n < 0) & ~self.defect_n
        self.changed_n = lacks_n & source.has_key(self.key_n)
        self.new_n = lacks_n & ~self.changed_n
        self.nonfinite_n = (self.row_n >= 0) & (source.status_N[self.row_n] == RowStatus.NON_FINITE)

    def reason(self, ordinal: int) -> str:
        """Return why a sample has no row."""
        return "its row is of another image" if self.changed_n[ordinal] else "no row of this key"

    def room(self, row_bytes: int, largest_tar: int) -> TarRoom:
        """Return a row for each sample."""
        return image_room(row_bytes, largest_tar)

    def buffer(self, manifest: Manifest) -> tuple[ImageRowBuffer, Cosines]:
        """Return the rows of the tar, copied from one old tar after the other."""
        rows = ImageRowBuffer(self.index, manifest)
        found = np.flatnonzero(self.row_n >= 0)
        tar_n = self._source.tar_N[self.row_n[found]]
        ordinal_n = self._source.ordinal_N[self.row_n[found]]
        for tar_id in np.unique(tar_n).tolist():
            here = tar_n == tar_id
            old = self._source.rows(tar_id)
            for name, array in rows.arrays.items():
                array[found[here]] = old[name][ordinal_n[here]]
        rows.arrays["image_hash"][:] = self.image_n

        # Samples without an embedding.
        rows.reject_defects()
        for ordinal in np.flatnonzero(~self.defect_n).tolist():
            if self.row_n[ordinal] < 0:
                rows.reject(ordinal, RowStatus.FILTERED, f"remapped: {self.reason(ordinal)}")
            elif rows.status_n[ordinal] != RowStatus.OK:
                rows.reject(ordinal, RowStatus(rows.status_n[ordinal]), AS_BEFORE)
        return rows, self._source.cosines(tar_n)
