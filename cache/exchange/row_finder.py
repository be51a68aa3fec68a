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
from threetowers.cache.exchange.import_source import ImportSource, Int64
from threetowers.cache.exchange.sample_keys import Match, key_hashes
from threetowers.cache.exchange.source_rows import SourceRows
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
from threetowers.cache.webdataset.tar_index import TarIndex

BLOCK_ROWS = 4096  # taken from the source at a time
NO_KEY = "no row of its key"


@dataclass(frozen=True, eq=False)
class JoinedTar:
    """What will be stored of a tar, and which of its samples have no row in the source: (ordinal, why)."""

    rows: RowBuffer
    tar_xxh3_128: str
    missing: Sequence[tuple[int, str]]


class RowFinder(ABC):
    """Takes the rows of tars from a source."""

    def __init__(self, source: ImportSource, min_cosine: float | None) -> None:
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


class KeyRowFinder(RowFinder):
    """Finds what a source has of a sample by the sample's key, by its name alone, or by its `uid`.

    Raises:
        BadSource: Something would go with two samples.
    """

    def __init__(
        self, source: ImportSource, indexes: Sequence[TarIndex], match: Match, min_cosine: float | None = None
    ) -> None:
        super().__init__(source, min_cosine)
        self._numbers = {index.location: source.find(key_hashes(index, match)) for index in indexes}
        self._refuse_shared(indexes)

    def has_any(self, index: TarIndex) -> bool:
        """Return whether a sample of a tar has a row."""
        return bool((self.find(index) >= 0).any())

    def mark_used(
        self, index: TarIndex, storage: Storage, manifest: Manifest, entry: TarEntry, record: DoneRecord
    ) -> None:
        """Count the rows of a tar that is finished as used."""
        row_n = self.find(index)
        self._source.used_N[row_n[row_n >= 0]] = True

    def find(self, index: TarIndex) -> Int64:
        """Return the (n,) row of each sample of a tar, -1 where there is none."""
        return self._numbers[index.location]

    def _refuse_shared(self, indexes: Sequence[TarIndex]) -> None:
        taken_N = np.zeros(len(self._source), np.bool_)
        for index in indexes:
            row_n = self.find(index)
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


class ImageRowFinder(KeyRowFinder):
    """Finds the rows of images in matrices."""

    def __init__(
        self, source: SourceRows, indexes: Sequence[TarIndex], match: Match, min_cosine: float | None = None
    ) -> None:
        super().__init__(source, indexes, match, min_cosine)
        self._rows = source

    def take(self, index: TarIndex, manifest: Manifest) -> JoinedTar:
        """Return the rows of a tar."""
        rows = ImageRowBuffer(index, manifest, self._min_cosine)
        digest = xxhash.xxh3_128()
        for ordinal, _, data in stream_images(index, digest):
            rows.set_image(ordinal, xxhash.xxh3_64_intdigest(data))
        rows.reject_defects()
        usable_n = rows.status_n == RowStatus.ABSENT
        row_n = self.find(index)
        found = np.flatnonzero(usable_n & (row_n >= 0))
        for start in range(0, len(found), BLOCK_ROWS):
            ordinals = found[start : start + BLOCK_ROWS]
            rows.set_embeddings(ordinals.tolist(), self._rows.take(row_n[ordinals])[:, None])
        self._source.used_N[row_n[found]] = True
        missing = [(int(ordinal), NO_KEY) for ordinal in np.flatnonzero(usable_n & (row_n < 0))]
        return finish(rows, digest.hexdigest(), missing)


class CaptionRowFinder(RowFinder):
    """Finds the rows of captions in matrices, by their words."""

    def __init__(self, source: SourceRows, captions: CaptionFormat, min_cosine: float | None = None) -> None:
        super().__init__(source, min_cosine)
        self._rows = source
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
                missing.append((ordinal, no_caption_row(captions[int(np.argmax(row_k < 0))])))
        row_u = self._find(rows.hashes)
        for start in range(0, len(row_u), BLOCK_ROWS):
            places = range(start, min(start + BLOCK_ROWS, len(row_u)))
            rows.set_embeddings(places, self._rows.take(row_u[places.start : places.stop]))
        self._source.used_N[row_u] = True
        return finish(rows, "", missing)

    def mark_used(
        self, index: TarIndex, storage: Storage, manifest: Manifest, entry: TarEntry, record: DoneRecord
    ) -> None:
        """Count the rows of a tar that is finished as used."""
        stored = read_tar_rows(storage, manifest, entry, record, ["caption_hash"])["caption_hash"][: record.n_rows]
        row_n = self._source.find(stored.astype(np.uint64))
        self._source.used_N[row_n[row_n >= 0]] = True

    def _find(self, hashes: Sequence[int]) -> npt.NDArray[np.int64]:
        return self._source.find(np.array(hashes, np.uint64))


def no_caption_row(caption: str) -> str:
    """Return why a sample with this caption is missing."""
    return f"no row of caption {shortened(caption)}"


def finish(rows: RowBuffer, tar_xxh3_128: str, missing: Sequence[tuple[int, str]]) -> JoinedTar:
    """Give the samples that are missing their status, and return what will be stored."""
    for ordinal, why in missing:
        rows.reject(ordinal, RowStatus.FILTERED, f"imported: {why}")
    return JoinedTar(rows, tar_xxh3_128, missing)
