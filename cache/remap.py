"""Carry the rows of a cache over to other tars of the same images: split, merged, filtered or downloaded again.

A row goes with a sample if the hashes of its key and of its image's bytes both equal those stored beside the row. No
image is decoded and no teacher runs; the tars are read once.
"""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash
from cachetools import LRUCache

from threetowers.cache.builder.opening import check_compatible, create
from threetowers.cache.format.done_record import Cosines, done_record_name, read_done_record
from threetowers.cache.format.image_row_buffer import ImageRowBuffer
from threetowers.cache.format.layout import RowStatus, TarRoom, image_room
from threetowers.cache.format.manifest import MANIFEST, Manifest, ManifestError, read_manifest, to_json
from threetowers.cache.format.row_buffer import Provenance
from threetowers.cache.format.store import Arrays, fit_to_table, read_tar_rows
from threetowers.cache.format.tar_table import TarEntry, extend, read_table
from threetowers.cache.storage.storage import Storage, open_storage
from threetowers.cache.webdataset.sample_stream import stream_images
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash
from threetowers.cache.webdataset.tar_list import OnBad, index_tars, refuse_defects, require_samples
from threetowers.cache.webdataset.tar_patterns import expand

OPEN_TARS = 64
MAX_NAMES_SHOWN = 5
HASH_COLUMNS = ("key_hash", "image_hash")
MissingRows = Literal["error", "filtered", "build"]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class RemapReport:
    """What was carried over.

    Attributes:
        storage: the new cache.
        tars: tars written now.
        kept: tars finished before.
        rows: rows written now.
        bad: samples without a usable image, as far as headers tell.
        missing: samples whose key has no row in the old cache.
        changed: samples whose key has a row of another image.
        names: the first few of both.
        left: tars that `cache build` has to build.
        notes: lines on tars that are not used.
        seconds: wall time.
    """

    storage: Storage
    tars: int
    kept: int
    rows: int
    bad: int
    missing: int
    changed: int
    names: tuple[str, ...]
    left: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def text(self) -> str:
        """Return the report for a person."""
        lines = [
            f"{self.storage}: {self.tars} tars written, {self.kept} already finished; {self.rows} rows in "
            f"{self.seconds:.1f} s",
            f"samples without a row: {self.missing} new, {self.changed} with another image, {self.bad} without a "
            "usable image",
            *(f"  {name}" for name in self.names),
            *self.notes,
        ]
        if self.left:
            shown = ", ".join(self.left[:MAX_NAMES_SHOWN])
            lines.append(f"left to `threetowers cache build`: {len(self.left)} tars: {shown}")
        return "\n".join(lines)


def remap(
    old: str | Path | Storage,
    new: str | Path | Storage,
    tars: Sequence[str | Path],
    *,
    missing: MissingRows = "error",
    image_member: str | None = None,
    on_bad: OnBad = "skip",
) -> RemapReport:
    """Create a cache of `tars` from the rows of another cache. Run it again to resume.

    Args:
        old: the cache that has the rows.
        new: the cache to create.
        tars: paths, URLs, globs and brace ranges.
        missing: what to do with a sample that has no row of its key and image in the old cache. `error`: stop, and
            name it; `filtered`: give it no embedding and the status FILTERED; `build`: leave its tar to a later build.
        image_member: the extension of the image of a sample in these tars; by default that of the old cache.
        on_bad: whether samples without a usable image (`skip`) and bad tars (`skip_tars`) are accepted.

    Raises:
        ManifestError: a sample has no row (`error`), the old cache is incomplete or damaged, or the new folder has
            something else in it.
        BadTar, BadSample, ValueError: bad input, named in the message.
    """
    started = time.monotonic()
    source = _OldCache(open_storage(old))
    storage = open_storage(new)

    # Match the samples of the tars that are not finished with the old rows.
    image_member = image_member or source.manifest.image_member
    listed = require_samples(index_tars(expand(tars), image_member, on_bad))
    indexes = listed.tars
    if on_bad == "error":
        refuse_defects(indexes)
    finished = _finished(storage, indexes)
    matches = [_TarMatch(index, source) for index in indexes if index.fingerprint not in finished]
    n_new = sum(int(match.new_n.sum()) for match in matches)
    n_changed = sum(int(match.changed_n.sum()) for match in matches)
    names = []
    for match in matches:
        names += match.names()
    if names and missing == "error":
        raise ManifestError(
            f"{n_new} samples have no row of their key in {old}, {n_changed} have one of another image: "
            f"{'; '.join(names[:MAX_NAMES_SHOWN])}. Choose --missing filtered to give them no embedding, or --missing "
            "build to leave their tars to the teacher"
        )
    left = [match for match in matches if missing == "build" and match.names()]
    complete = [match for match in matches if match not in left]

    # Write the new cache.
    old_manifest = dataclasses.replace(source.manifest, image_member=image_member)
    manifest = _open_or_create(storage, old_manifest, indexes)
    extend(storage, indexes, manifest.samples_per_tar)
    table = fit_to_table(storage, manifest)
    for match in complete:
        _write(storage, manifest, table.find(match.index), match, source)
    return RemapReport(
        storage=storage,
        tars=len(complete),
        kept=len(indexes) - len(matches),
        rows=sum(int((match.row_n >= 0).sum()) for match in complete),
        bad=sum(int(match.defect_n.sum()) for match in matches),
        missing=n_new,
        changed=n_changed,
        names=tuple(names[:MAX_NAMES_SHOWN]),
        left=tuple(match.index.location for match in left),
        notes=tuple(listed.notes()),
        seconds=time.monotonic() - started,
    )


class _OldCache:
    """The rows of the old cache by key and image: 40 bytes a row in memory, and the arrays of a few tars."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.manifest = read_manifest(storage)
        self.table = read_table(storage)
        self.records = [read_done_record(storage, self.manifest, entry) for entry in self.table.entries]
        self._open: LRUCache[int, Arrays] = LRUCache(OPEN_TARS)

        # Key, image, tar and ordinal of every row.
        keys = []
        images = []
        tars = []
        ordinals = []
        for entry, record in zip(self.table.entries, self.records, strict=True):
            columns = read_tar_rows(storage, self.manifest, entry, record, HASH_COLUMNS)
            keys.append(columns["key_hash"][: entry.n_samples])
            images.append(columns["image_hash"][: entry.n_samples])
            tars.append(np.full(entry.n_samples, entry.id, np.int32))
            ordinals.append(np.arange(entry.n_samples, dtype=np.int32))
        self.key_N = np.concatenate(keys)
        self.image_N = np.concatenate(images)
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

    def has_key(self, key_n: Hashes) -> npt.NDArray[np.bool_]:
        """Return (n,) whether there is a row of this key, with any image."""
        at = np.minimum(np.searchsorted(self._keys_N, key_n), len(self._keys_N) - 1)
        found_n: npt.NDArray[np.bool_] = self._keys_N[at] == key_n
        return found_n

    def rows(self, tar_id: int) -> Arrays:
        """Return all arrays of a tar of the old cache; those of the last OPEN_TARS stay in memory."""
        arrays = self._open.get(tar_id)
        if arrays is None:
            entry = self.table.entries[tar_id]
            arrays = self._open[tar_id] = read_tar_rows(self.storage, self.manifest, entry, self.records[tar_id])
        return arrays


def _combined(key_n: Hashes, image_n: Hashes) -> Hashes:
    """Return one number for a key and an image, to sort by; a look-up compares both as well."""
    return key_n ^ (image_n * np.uint64(0x9E3779B97F4A7C15))


class _TarMatch:
    """Which row of the old cache goes with each sample of a tar: `row_n`, -1 for samples that have none."""

    def __init__(self, index: TarIndex, source: _OldCache) -> None:
        self.index = index
        digest = xxhash.xxh3_128()
        self.image_n = np.zeros(len(index.samples), np.uint64)
        for ordinal, _, data in stream_images(index, digest):
            self.image_n[ordinal] = xxhash.xxh3_64_intdigest(data)
        self.defect_n = np.zeros(len(index.samples), np.bool_)
        for ordinals in index.samples.defects().values():
            self.defect_n[ordinals] = True
        self.key_n = np.array([key_hash(sample.key) for sample in index.samples], dtype=np.uint64)
        self.tar_xxh3_128 = digest.hexdigest()
        self.row_n = np.where(self.defect_n, -1, source.find(self.key_n, self.image_n))
        lacks_n = (self.row_n < 0) & ~self.defect_n
        self.changed_n = lacks_n & source.has_key(self.key_n)
        self.new_n = lacks_n & ~self.changed_n

    def names(self) -> list[str]:
        """Return the samples without a row, and why."""
        return [
            f"{self.index.location}: {self.index.samples[ordinal].key!r}: {self.reason(ordinal)}"
            for ordinal in np.flatnonzero(self.new_n | self.changed_n).tolist()
        ]

    def reason(self, ordinal: int) -> str:
        """Return why a sample has no row."""
        return "its row is of another image" if self.changed_n[ordinal] else "no row of this key"


def _open_or_create(storage: Storage, old: Manifest, indexes: Sequence[TarIndex]) -> Manifest:
    """Return the manifest of the new cache: the old one, with as many rows per tar as these tars need."""
    if storage.size(MANIFEST) is None:
        row_bytes = old.storage_dtype.row_bytes(old.dim)
        room = image_room(row_bytes, max(len(index.samples) for index in indexes))
        create(storage, dataclasses.replace(old, **room._asdict()))
    manifest = read_manifest(storage)
    room = TarRoom(manifest.samples_per_tar, manifest.rows_per_tar, manifest.chunk_rows)
    requested = dataclasses.replace(old, **room._asdict())
    check_compatible(storage, manifest, requested)
    return manifest


def _finished(storage: Storage, indexes: Sequence[TarIndex]) -> set[str]:
    """Return the fingerprints of the tars that are complete in the new cache."""
    if storage.size(MANIFEST) is None:
        return set()
    manifest = read_manifest(storage)
    table = read_table(storage, allow_empty=True)
    finished = set()
    for index in indexes:
        entry = table.by_fingerprint.get(index.fingerprint)
        if entry is not None:
            with contextlib.suppress(ManifestError):
                read_done_record(storage, manifest, entry)
                finished.add(index.fingerprint)
    return finished


def _write(storage: Storage, manifest: Manifest, entry: TarEntry, match: _TarMatch, source: _OldCache) -> None:
    """Write the rows of a tar, and its done record with the cosines of the records that the rows come from."""
    started = time.monotonic()
    rows = ImageRowBuffer(match.index, manifest)

    # Copy the rows, from one old tar after the other.
    found = np.flatnonzero(match.row_n >= 0)
    tar_n = source.tar_N[match.row_n[found]]
    ordinal_n = source.ordinal_N[match.row_n[found]]
    min_cosines = []
    total = 0.0
    count = 0
    for tar_id in np.unique(tar_n).tolist():
        here = tar_n == tar_id
        old = source.rows(tar_id)
        for name, array in rows.arrays.items():
            array[found[here]] = old[name][ordinal_n[here]]
        cosines = source.records[tar_id].cosines
        if cosines.min is not None and cosines.mean is not None:
            n = int(here.sum())
            min_cosines.append(cosines.min)
            total += cosines.mean * n
            count += n
    rows.arrays["image_hash"][:] = match.image_n

    # Samples without an embedding.
    rows.reject_defects()
    for ordinal in np.flatnonzero(~match.defect_n).tolist():
        if match.row_n[ordinal] < 0:
            rows.reject(ordinal, RowStatus.FILTERED, f"remapped: {match.reason(ordinal)}")
        elif rows.status_n[ordinal] != RowStatus.OK:
            rows.reject(ordinal, RowStatus(rows.status_n[ordinal]), "as in the cache that its row was taken from")
    rows.check_complete()

    provenance = Provenance("remap", 0, "none", time.monotonic() - started, "none")
    record = rows.write(storage, entry, match.tar_xxh3_128, provenance)
    storage.remove_partial(str(entry.id))
    inherited = Cosines(min(min_cosines), total / count) if min_cosines else Cosines(None, None)
    done = dataclasses.replace(record, cosines=inherited)
    storage.put(done_record_name(entry.id), to_json(done), owner=f"{entry.id}.done")
