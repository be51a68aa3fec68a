"""Rows of captions by key and caption: a sample gets its run if its old run has a row of each of its captions.

So captions may have been reordered, removed or moved to another source; a sample with a new one has no row. A sample
whose embedding was nonfinite is known by its key alone: no hash of its captions is kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.done_record import Cosines
from threetowers.cache.format.layout import RowStatus, TarRoom, emb_name, scale_name, text_room
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.read.caption_runs import CaptionRuns
from threetowers.cache.remap.old_cache import AS_BEFORE, OldCache, TarMatch
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.captions import caption_hash
from threetowers.cache.webdataset.defects import BadSample
from threetowers.cache.webdataset.sample import Annotation, describe_missing_captions
from threetowers.cache.webdataset.sample_stream import stream_annotations
from threetowers.cache.webdataset.tar_index import TarIndex
from threetowers.cache.webdataset.tar_list import OnBad

RUN_COLUMNS = ("key_hash", "status", "row_end", "caption_source", "caption_hash")


class OldCaptions(OldCache):
    """The rows of a cache of text: 41 bytes a sample and 9 bytes a caption in memory."""

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        keys = []
        statuses = []
        tars = []
        ordinals = []
        self._runs = []
        for entry, record in zip(self.table.entries, self.records, strict=True):
            columns = self.columns(entry.id, RUN_COLUMNS)
            n = entry.n_samples
            keys.append(columns["key_hash"][:n])
            statuses.append(columns["status"][:n])
            tars.append(np.full(n, entry.id, np.int32))
            ordinals.append(np.arange(n, dtype=np.int32))
            rows = slice(record.n_rows)
            sources, hashes = (columns[name][rows].copy() for name in ("caption_source", "caption_hash"))
            self._runs.append(CaptionRuns.of(columns["row_end"][:n], sources, hashes))
        order = np.argsort(np.concatenate(keys), kind="stable")
        self._key_N = np.concatenate(keys)[order]
        self._status_N = np.concatenate(statuses)[order]
        self._tar_N = np.concatenate(tars)[order]
        self._ordinal_N = np.concatenate(ordinals)[order]

    def find(self, key: np.uint64, hashes: Sequence[int]) -> tuple[int, list[int]] | None:
        """Return the tar and the rows in it of a key's captions, or None where the key has not all of them.

        Raises:
            KeyError: there is no such key.
        """
        samples = self._samples(key)
        if not samples:
            raise KeyError(key)
        for at in samples:
            tar_id = int(self._tar_N[at])
            ordinal = int(self._ordinal_N[at])
            start = int(self._runs[tar_id].bound_N[ordinal])
            row = {each: start + i for i, each in enumerate(self._runs[tar_id].captions(ordinal).hash_k.tolist())}
            if all(each in row for each in hashes):
                return tar_id, [row[each] for each in hashes]
        return None

    def was_nonfinite(self, key: np.uint64) -> bool:
        """Return whether a sample of this key has no rows because an embedding of it was nonfinite."""
        return any(self._status_N[at] == RowStatus.NON_FINITE for at in self._samples(key))

    def _samples(self, key: np.uint64) -> range:
        """Return where the samples of a key are in the sorted columns: several tars may have one."""
        first, last = np.searchsorted(self._key_N, key, "left"), np.searchsorted(self._key_N, key, "right")
        return range(int(first), int(last))


class _MatchedRun(NamedTuple):
    """The captions of a sample, and the rows of them in a tar of the old cache."""

    source_k: npt.NDArray[np.uint8]
    hash_k: npt.NDArray[np.uint64]
    tar_id: int
    row_k: npt.NDArray[np.uint32]


class TextMatch(TarMatch):
    """Which rows of the old cache go with the captions of each sample of a tar."""

    def __init__(self, index: TarIndex, source: OldCaptions, on_bad: OnBad) -> None:
        """Read the captions. Raises BadSample for a sample without one where `on_bad` is error."""
        super().__init__(index)
        self._source = source
        self._missing: dict[int, str] = {}
        self._runs: dict[int, _MatchedRun] = {}
        self._n_captions = 0
        self.defect_n, self.new_n, self.changed_n, self.nonfinite_n = np.zeros((4, len(index.samples)), np.bool_)
        sources = source.manifest.caption_sources
        code = {name: number for number, name in enumerate(sources.names)}
        for ordinal, annotation in stream_annotations(index, sources.caption_format):
            self._n_captions += len(annotation.captions)
            if annotation.captions:
                codes = [code[name] for name, found in annotation.captions_by_source.items() for _ in found]
                self._match(ordinal, codes, [caption_hash(caption) for caption in annotation.captions])
            else:
                self._reject(ordinal, annotation, on_bad)

    def reason(self, ordinal: int) -> str:
        """Return why a sample has no rows."""
        return "a caption of it has no row" if self.changed_n[ordinal] else "no rows of this key"

    def room(self, row_bytes: int, largest_tar: int) -> TarRoom:
        """Return room for the captions of this tar, and for more."""
        return text_room(row_bytes, largest_tar, self._n_captions)

    def buffer(self, manifest: Manifest) -> tuple[TextRowBuffer, Cosines]:
        """Return the rows of the tar, copied from one old tar after the other; equal captions have one embedding."""
        rows = TextRowBuffer(self.index, manifest)
        origin: dict[int, tuple[int, int]] = {}  # of each caption: tar and row in the old cache
        for ordinal, run in self._runs.items():
            hashes = run.hash_k.tolist()
            rows.set_hashes(ordinal, run.source_k.tolist(), hashes)
            for each, row in zip(hashes, run.row_k.tolist(), strict=True):
                origin.setdefault(each, (run.tar_id, row))
        found = np.array([origin[each] for each in rows.hashes], np.int64).reshape(-1, 2)
        tar_u, row_u = found.T
        for tar_id in np.unique(tar_u).tolist():
            places = np.flatnonzero(tar_u == tar_id)
            old = self._source.rows(tar_id)
            scale = old[scale_name(0)][row_u[places]] if manifest.storage_dtype.scaled else None
            rows.set_stored(places, old[emb_name(0)][row_u[places]], scale)

        # Samples without an embedding.
        for ordinal, missing in self._missing.items():
            rows.reject(ordinal, RowStatus.NO_CAPTION, missing)
        for ordinal in np.flatnonzero(self.new_n | self.changed_n).tolist():
            rows.reject(ordinal, RowStatus.FILTERED, f"remapped: {self.reason(ordinal)}")
        for ordinal in np.flatnonzero(self.nonfinite_n).tolist():
            rows.reject(ordinal, RowStatus.NON_FINITE, AS_BEFORE)
        tars = [run.tar_id for run in self._runs.values() for _ in run.row_k]
        return rows, self._source.cosines(np.array(tars, np.int64))

    def _match(self, ordinal: int, codes: Sequence[int], hashes: Sequence[int]) -> None:
        try:
            found = self._source.find(self.key_n[ordinal], hashes)
        except KeyError:
            self.new_n[ordinal] = True
            return
        if found is None:
            flags = self.nonfinite_n if self._source.was_nonfinite(self.key_n[ordinal]) else self.changed_n
            flags[ordinal] = True
            return
        tar_id, old_rows = found
        self._runs[ordinal] = _MatchedRun(
            np.array(codes, np.uint8), np.array(hashes, np.uint64), tar_id, np.array(old_rows, np.uint32)
        )

    def _reject(self, ordinal: int, annotation: Annotation, on_bad: OnBad) -> None:
        found = describe_missing_captions(self.index.samples[ordinal].members, annotation.fields, annotation.notes)
        if on_bad == "error":
            raise BadSample(f"{self.index.describe(ordinal)}: {found}; --on-bad skip leaves it out", "no caption")
        self.defect_n[ordinal] = True
        self._missing[ordinal] = found
