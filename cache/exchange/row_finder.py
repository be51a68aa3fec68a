"""Which row of a source goes with each sample of a tar, or with each of its captions.

An image is found by the key of its sample. A caption is found by its words: a frozen encoder gives equal captions equal
embeddings, whatever sample they are of.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.exchange.bad_source import BadSource
from threetowers.cache.exchange.source_rows import Int64, SourceRows
from threetowers.cache.format.done_record import DoneRecord
from threetowers.cache.format.image_row_buffer import ImageRowBuffer
from threetowers.cache.format.layout import RowStatus
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.row_buffer import RowBuffer
from threetowers.cache.format.store import read_tar_rows
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.format.text_row_buffer import TextRowBuffer
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.captions import CaptionFormat, caption_hash, shortened
from threetowers.cache.webdataset.sample import describe_missing_captions
from threetowers.cache.webdataset.sample_stream import stream_annotations, stream_images
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash

BLOCK_ROWS = 4096  # taken from the source at a time


@dataclass(frozen=True, eq=False)
class JoinedTar:
    """What will be stored of a tar, and which of its samples have no row in the source: (ordinal, what has none)."""

    rows: RowBuffer
    tar_xxh3_128: str
    missing: Sequence[tuple[int, str]]


class RowFinder(ABC):
    """Takes the rows of tars from a source."""

    def __init__(self, source: SourceRows, min_cosine: float | None) -> None:
        self._source = source
        self._min_cosine = min_cosine

    @abstractmethod
    def has_any(self, index: TarIndex) -> bool:
        """Return whether a sample of a tar has a row."""

    @abstractmethod
    def take(self, index: TarIndex, manifest: Manifest) -> JoinedTar:
        """Return the rows of a tar. Raises RoundingError, BadTar or ManifestError as the buffers and streams do."""

    @abstractmethod
    def mark_used(
        self, index: TarIndex, storage: Storage, manifest: Manifest, entry: TarEntry, record: DoneRecord
    ) -> None:
        """Count the rows of a tar that is finished as used."""


class ImageRowFinder(RowFinder):
    """Finds rows by the key of the sample, or by its name alone.

    Raises:
        BadSource: A row would go with two samples.
    """

    def __init__(
        self, source: SourceRows, indexes: Sequence[TarIndex], by_name: bool, min_cosine: float | None = None
    ) -> None:
        super().__init__(source, min_cosine)
        self._by_name = by_name
        self._refuse_shared(indexes)

    def has_any(self, index: TarIndex) -> bool:
        """Return whether a sample of a tar has a row."""
        return bool((self._find(index) >= 0).any())

    def take(self, index: TarIndex, manifest: Manifest) -> JoinedTar:
        """Return the rows of a tar."""
        rows = ImageRowBuffer(index, manifest, self._min_cosine)
        digest = xxhash.xxh3_128()
        for ordinal, _, data in stream_images(index, digest):
            rows.set_image(ordinal, xxhash.xxh3_64_intdigest(data))
        rows.reject_defects()
        usable_n = rows.status_n == RowStatus.ABSENT
        row_n = self._find(index)
        found = np.flatnonzero(usable_n & (row_n >= 0))
        for start in range(0, len(found), BLOCK_ROWS):
            ordinals = found[start : start + BLOCK_ROWS]
            rows.set_embeddings(ordinals.tolist(), self._source.take(row_n[ordinals])[:, None])
        self._source.used_N[row_n[found]] = True
        missing = [(int(ordinal), "its key") for ordinal in np.flatnonzero(usable_n & (row_n < 0))]
        return _finished(rows, digest.hexdigest(), missing)

    def mark_used(
        self, index: TarIndex, storage: Storage, manifest: Manifest, entry: TarEntry, record: DoneRecord
    ) -> None:
        """Count the rows of a tar that is finished as used."""
        row_n = self._find(index)
        self._source.used_N[row_n[row_n >= 0]] = True

    def _find(self, index: TarIndex) -> Int64:
        """Return the (n,) row of each sample, -1 where there is none."""
        hashes = [key_hash(sample_name(sample.key) if self._by_name else sample.key) for sample in index.samples]
        return self._source.find(np.array(hashes, np.uint64))

    def _refuse_shared(self, indexes: Sequence[TarIndex]) -> None:
        taken_N = np.zeros(len(self._source), np.bool_)
        for index in indexes:
            row_n = self._find(index)
            found = np.flatnonzero(row_n >= 0)
            _, first = np.unique(row_n[found], return_index=True)
            again = np.setdiff1d(np.arange(len(found)), first)
            again = np.union1d(again, np.flatnonzero(taken_N[row_n[found]]))
            if len(again):
                ordinal = int(found[again[0]])
                raise BadSource(
                    f"{index.describe(ordinal)}: {self._source.name(int(row_n[ordinal]))} goes with another sample "
                    "too, expected keys that are unique in all of the tars (--match key compares the whole key)"
                )
            taken_N[row_n[found]] = True


class CaptionRowFinder(RowFinder):
    """Finds rows by the captions."""

    def __init__(self, source: SourceRows, captions: CaptionFormat, min_cosine: float | None = None) -> None:
        super().__init__(source, min_cosine)
        self._captions = captions

    def has_any(self, index: TarIndex) -> bool:
        """Return whether a caption of a tar has a row."""
        for _, annotation in stream_annotations(index, self._captions):
            if (self._find([caption_hash(caption) for caption in annotation.captions]) >= 0).any():
                return True
        return False

    def take(self, index: TarIndex, manifest: Manifest) -> JoinedTar:
        """Return the rows of a tar; a sample gets its rows if each of its captions has one."""
        rows = TextRowBuffer(index, manifest, self._min_cosine)
        missing = []
        for ordinal, annotation in stream_annotations(index, self._captions):
            captions = annotation.captions
            if not captions:
                members = index.samples[ordinal].members
                reason = describe_missing_captions(members, annotation.fields, annotation.notes)
                rows.reject(ordinal, RowStatus.NO_CAPTION, reason)
                continue
            row_k = self._find([caption_hash(caption) for caption in captions])
            if (row_k >= 0).all():
                rows.set_captions(ordinal, annotation.captions_by_source)
                rows.notes.update(annotation.notes)
            else:
                missing.append((ordinal, f"caption {shortened(captions[int(np.argmax(row_k < 0))])}"))
        row_u = self._find(rows.hashes)
        for start in range(0, len(row_u), BLOCK_ROWS):
            places = range(start, min(start + BLOCK_ROWS, len(row_u)))
            rows.set_embeddings(places, self._source.take(row_u[places.start : places.stop]))
        self._source.used_N[row_u] = True
        return _finished(rows, "", missing)

    def mark_used(
        self, index: TarIndex, storage: Storage, manifest: Manifest, entry: TarEntry, record: DoneRecord
    ) -> None:
        """Count the rows of a tar that is finished as used."""
        stored = read_tar_rows(storage, manifest, entry, record, ["caption_hash"])["caption_hash"][: record.n_rows]
        row_n = self._source.find(stored.astype(np.uint64))
        self._source.used_N[row_n[row_n >= 0]] = True

    def _find(self, hashes: Sequence[int]) -> npt.NDArray[np.int64]:
        return self._source.find(np.array(hashes, np.uint64))


def sample_name(key: str) -> str:
    """Return the last part of a key, or of the path of a file, up to its first dot.

    Examples:
        >>> sample_name("/data/00012/000120007.jpg"), sample_name("part/000120007")
        ('000120007', '000120007')
    """
    return key.replace("\\", "/").rpartition("/")[2].partition(".")[0]


def _finished(rows: RowBuffer, tar_xxh3_128: str, missing: Sequence[tuple[int, str]]) -> JoinedTar:
    for ordinal, what in missing:
        rows.reject(ordinal, RowStatus.FILTERED, f"imported: no row of {what}")
    return JoinedTar(rows, tar_xxh3_128, missing)
