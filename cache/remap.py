"""Take the rows of a cache over to other tars of the same images: split, merged, filtered or downloaded again.

A row goes with a sample when the hashes of its key and of its image's bytes are both those stored beside the row. No
image is decoded and no teacher runs; the tars are read once.
"""

from __future__ import annotations

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

from threetowers.cache.builder.opening import begin, settle
from threetowers.cache.builder.row_buffer import Made, Rows
from threetowers.cache.format.done_record import Cosines, done_record_name, read_done_record
from threetowers.cache.format.layout import RowStatus, slot_and_chunk
from threetowers.cache.format.manifest import MANIFEST, Manifest, ManifestError, read_manifest, to_json
from threetowers.cache.format.store import Arrays, fit_to_table, read_slot
from threetowers.cache.format.tar_table import TarEntry, extend, read_table
from threetowers.cache.storage.storage import Storage, open_storage
from threetowers.cache.webdataset.sample_stream import stream_images
from threetowers.cache.webdataset.tar_index import TarIndex, expand, index_tar, key_hash

OPEN_TARS = 64
SHOWN = 5
HASHES = ("key_hash", "image_hash")
Missing = Literal["error", "filtered", "build"]
UInt64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RemapReport:
    """What was taken over: `tars` now and `kept` from an earlier run, `rows` now.

    Of the samples of the tars now looked at, `missing` have no row of their key in the old cache and `changed` one of
    another image; `names` are the first few. `left` are tars that a build has to make.
    """

    storage: Storage
    tars: int
    kept: int
    rows: int
    missing: int
    changed: int
    names: tuple[str, ...]
    left: tuple[str, ...]
    seconds: float

    def text(self) -> str:
        """The report for a person."""
        lines = [
            f"{self.storage}: {self.tars} tars taken over, {self.kept} were finished before; {self.rows} rows in "
            f"{self.seconds:.1f} s",
            f"samples without a row: {self.missing} new, {self.changed} with another image",
            *(f"  {name}" for name in self.names),
        ]
        if self.left:
            lines.append(f"left for `threetowers cache build`: {len(self.left)} tars: {', '.join(self.left[:SHOWN])}")
        return "\n".join(lines)


def remap(
    old: str | Path | Storage, new: str | Path | Storage, tars: Sequence[str | Path], *, missing: Missing = "error"
) -> RemapReport:
    """Make a cache of `tars` in the place `new` from the rows of the cache `old`. Run it again to go on.

    Args:
        missing: what to do about a sample that has no row of its key and image in the old cache. `error`: refuse, and
            name it; `filtered`: give it no embedding and the status FILTERED; `build`: leave its tar to a later build.

    Raises:
        ContractError: a sample without a row (`error`); an old cache that is half built or damaged; a new place that
            holds something else.
        BadTar, ValueError: bad input, named.
    """
    began = time.monotonic()
    source, storage = _Source(open_storage(old)), open_storage(new)
    indexes = [index_tar(path) for path in expand(tars)]
    finished = _finished(storage, indexes)
    matches = [_Match(index, source) for index in indexes if index.fingerprint not in finished]
    names = [name for match in matches for name in match.names()]
    missed, changed = sum(int(m.new_n.sum()) for m in matches), sum(int(m.changed_n.sum()) for m in matches)
    if names and missing == "error":
        raise ManifestError(
            f"{missed} samples have no row of their key in {old}, {changed} have one of another image: "
            f"{'; '.join(names[:SHOWN])}. Choose missing=filtered to give them no embedding, or missing=build to leave "
            "their tars to the teacher"
        )
    left = [match for match in matches if missing == "build" and match.names()]
    whole = [match for match in matches if match not in left]
    manifest = _agree(storage, source.manifest, indexes)
    extend(storage, indexes, manifest.slot)
    table = fit_to_table(storage, manifest)
    for match in whole:
        _take_over(storage, manifest, table.find(match.index), match, source)
    return RemapReport(
        storage=storage,
        tars=len(whole),
        kept=len(indexes) - len(matches),
        rows=sum(int((match.row_n >= 0).sum()) for match in whole),
        missing=missed,
        changed=changed,
        names=tuple(names[:SHOWN]),
        left=tuple(match.index.location for match in left),
        seconds=time.monotonic() - began,
    )


class _Source:
    """The rows of the old cache by key and image: 40 bytes a row in memory, and the arrays of a few tars."""

    def __init__(self, storage: Storage) -> None:
        self.storage, self.manifest, self.table = storage, read_manifest(storage), read_table(storage)
        self.records = [read_done_record(storage, self.manifest, entry) for entry in self.table.entries]
        self._open: LRUCache[int, Arrays] = LRUCache(OPEN_TARS)
        keys, images, tars, ordinals = [], [], [], []
        for entry, record in zip(self.table.entries, self.records, strict=True):
            rows = read_slot(storage, self.manifest, entry, record, HASHES)
            keys.append(rows["key_hash"][: entry.n_samples])
            images.append(rows["image_hash"][: entry.n_samples])
            tars.append(np.full(entry.n_samples, entry.id, np.int32))
            ordinals.append(np.arange(entry.n_samples, dtype=np.int32))
        self.key_N, self.image_N = np.concatenate(keys), np.concatenate(images)
        self.tar_N, self.ordinal_N = np.concatenate(tars), np.concatenate(ordinals)
        self._order = np.argsort(_mixed(self.key_N, self.image_N), kind="stable")
        self._mixed_N = _mixed(self.key_N, self.image_N)[self._order]
        self._keys_N = np.sort(self.key_N)

    def find(self, key_n: UInt64, image_n: UInt64) -> Int64:
        """(n,) the row of each key and image, -1 where there is none."""
        at = np.minimum(np.searchsorted(self._mixed_N, _mixed(key_n, image_n)), len(self._mixed_N) - 1)
        row_n = self._order[at]
        return np.where((self.key_N[row_n] == key_n) & (self.image_N[row_n] == image_n), row_n, -1)

    def has_key(self, key_n: UInt64) -> npt.NDArray[np.bool_]:
        """(n,) whether there is a row of this key, of whatever image."""
        at = np.minimum(np.searchsorted(self._keys_N, key_n), len(self._keys_N) - 1)
        found_n: npt.NDArray[np.bool_] = self._keys_N[at] == key_n
        return found_n

    def rows(self, tar_id: int) -> Arrays:
        """All arrays of a tar of the old cache; those of the last OPEN_TARS stay in memory."""
        arrays = self._open.get(tar_id)
        if arrays is None:
            entry = self.table.entries[tar_id]
            arrays = self._open[tar_id] = read_slot(self.storage, self.manifest, entry, self.records[tar_id])
        return arrays


def _mixed(key_n: UInt64, image_n: UInt64) -> UInt64:
    """One number for a key and an image, to sort by; whoever looks it up compares both."""
    return key_n ^ (image_n * np.uint64(0x9E3779B97F4A7C15))


class _Match:
    """Which row of the old cache goes with each sample of a tar: `row_n`, -1 for samples that have none."""

    def __init__(self, index: TarIndex, source: _Source) -> None:
        self.index = index
        digest = xxhash.xxh3_128()
        n = len(index.samples)
        images = (xxhash.xxh3_64_intdigest(data) for _, _, data in stream_images(index, digest))
        self.image_n = np.fromiter(images, dtype=np.uint64)
        self.key_n = np.fromiter((key_hash(sample.key) for sample in index.samples), dtype=np.uint64, count=n)
        self.tar_xxh3_128 = digest.hexdigest()
        self.row_n = source.find(self.key_n, self.image_n)
        self.changed_n = (self.row_n < 0) & source.has_key(self.key_n)
        self.new_n = (self.row_n < 0) & ~self.changed_n

    def names(self) -> list[str]:
        """Samples without a row, and why."""
        return [
            f"{self.index.location}: {self.index.samples[ordinal].key!r}: {self.why(ordinal)}"
            for ordinal in np.flatnonzero(self.row_n < 0).tolist()
        ]

    def why(self, ordinal: int) -> str:
        return "its row is of another image" if self.changed_n[ordinal] else "no row of this key"


def _agree(storage: Storage, old: Manifest, indexes: Sequence[TarIndex]) -> Manifest:
    """The contract of the new cache: the old one, with slots for these tars."""
    if storage.size(MANIFEST) is None:
        row_bytes = old.precision.row_bytes(old.dim)
        slot, chunk_rows = slot_and_chunk(row_bytes, max(len(index.samples) for index in indexes))
        begin(storage, dataclasses.replace(old, slot=slot, chunk_rows=chunk_rows))
    held = read_manifest(storage)
    return settle(storage, dataclasses.replace(old, slot=held.slot, chunk_rows=held.chunk_rows))


def _finished(storage: Storage, indexes: Sequence[TarIndex]) -> set[str]:
    """Fingerprints of the tars that the new cache holds already."""
    if storage.size(MANIFEST) is None:
        return set()
    manifest, table = read_manifest(storage), read_table(storage, empty=True)
    done = set()
    for index in indexes:
        entry = table.by_fingerprint.get(index.fingerprint)
        if entry is not None:
            with contextlib.suppress(ManifestError):
                read_done_record(storage, manifest, entry)
                done.add(index.fingerprint)
    return done


def _take_over(storage: Storage, manifest: Manifest, entry: TarEntry, match: _Match, source: _Source) -> None:
    began = time.monotonic()
    rows = Rows(match.index, manifest)
    found = np.flatnonzero(match.row_n >= 0)
    tar_n, ordinal_n = source.tar_N[match.row_n[found]], source.ordinal_N[match.row_n[found]]
    lows, total, count = [], 0.0, 0
    for tar_id in np.unique(tar_n).tolist():
        here, old, record = tar_n == tar_id, source.rows(tar_id), source.records[tar_id]
        for name, array in rows.arrays.items():
            array[found[here]] = old[name][ordinal_n[here]]
        if record.cosines.min is not None and record.cosines.mean is not None:
            lows.append(record.cosines.min)
            total, count = total + record.cosines.mean * int(here.sum()), count + int(here.sum())
    rows.arrays["image_hash"][:] = match.image_n
    for ordinal in range(len(match.row_n)):
        if match.row_n[ordinal] < 0:
            rows.reject(ordinal, RowStatus.FILTERED, f"rekeyed: {match.why(ordinal)}")
        elif rows.status_n[ordinal] != RowStatus.OK:
            rows.reject(ordinal, RowStatus(rows.status_n[ordinal]), "as in the cache that its row was taken from")
    rows.check_complete()
    record = rows.write(storage, entry, match.tar_xxh3_128, Made("remap", 0, "none", time.monotonic() - began))
    inherited = Cosines(min(lows), total / count) if lows else Cosines(None, None)
    storage.remove_partial(str(entry.id))
    done = dataclasses.replace(record, cosines=inherited)
    storage.put(done_record_name(entry.id), to_json(done), owner=f"{entry.id}.done")
