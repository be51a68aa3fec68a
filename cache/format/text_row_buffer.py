"""The rows of a tar of captions: a run for each sample, one row a caption, packed when all are known."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.dtypes import Float32Array, StoredArray
from threetowers.cache.format.layout import RowStatus, emb_name, scale_name
from threetowers.cache.format.manifest import Manifest, ManifestError
from threetowers.cache.format.row_buffer import RowBuffer
from threetowers.cache.format.store import Arrays
from threetowers.cache.webdataset.captions import caption_hash, shortened
from threetowers.cache.webdataset.tar_index import TarIndex


class _Run(NamedTuple):
    """The captions of one sample: (k,) their places in the list of different captions, and their sources."""

    caption_k: npt.NDArray[np.uint32]
    source_k: npt.NDArray[np.uint8]


class TextRowBuffer(RowBuffer):
    """The runs of a tar of n samples, and the embedding of each different caption.

    First all samples are given their captions, then these are embedded, in any order. A sample is embedded if all of
    its captions are. Captions are told apart by their hashes, as they are in the cache.

    Attributes:
        captions: the u different captions of the samples, by place; fewer where only hashes were given.
        hashes: of all of these.
    """

    def __init__(self, index: TarIndex, manifest: Manifest, min_cosine: float | None = None) -> None:
        super().__init__(index, manifest, min_cosine)
        self._sources = manifest.caption_sources
        self._code = {source: code for code, source in enumerate(self._sources.names)}
        self.captions: list[str] = []
        self.hashes: list[int] = []
        self._place: dict[int, int] = {}  # of each of `hashes` in it
        self._runs: dict[int, _Run] = {}
        self._n_rows = 0

    def set_captions(self, ordinal: int, captions_by_source: Mapping[str, Sequence[str]]) -> None:
        """Take the captions of a sample, at least one, in the order of their rows.

        Raises:
            ManifestError: the tar has more captions than the cache has room for.
        """
        sources = []
        hashes = []
        for source, captions in captions_by_source.items():
            for caption in captions:
                sources.append(self._code[source])
                hashes.append(caption_hash(caption))
                if hashes[-1] not in self._place:
                    self._add_place(hashes[-1])
                    self.captions.append(caption)
        self.set_hashes(ordinal, sources, hashes)

    def set_hashes(self, ordinal: int, sources: Sequence[int], hashes: Sequence[int]) -> None:
        """Take the captions of a sample by their hashes and the numbers of their sources, like `set_captions`.

        Raises:
            ManifestError: as for `set_captions`.
        """
        for each in hashes:
            if each not in self._place:
                self._add_place(each)
        places = np.array([self._place[each] for each in hashes], np.uint32)
        self._runs[ordinal] = _Run(places, np.array(sources, np.uint8))
        self.status_n[ordinal] = RowStatus.OK
        self._n_rows += len(hashes)
        if self._n_rows > self.manifest.rows_per_tar:
            raise ManifestError(
                f"{self.index.location}: {self._n_rows} captions in the first {len(self._runs)} samples, expected at "
                f"most {self.manifest.rows_per_tar}, the rows per tar of this cache: split the tar, or build a new "
                "cache with more (--rows-per-tar)"
            )

    def set_embeddings(self, places: Sequence[int], features_bD: Float32Array) -> None:
        """Store the embeddings of some of `captions`; samples with one that is nonfinite as stored are rejected.

        Args:
            places: (b,) places in `captions`.
            features_bD: their embeddings.

        Raises:
            RoundingError: a row that is stored with a smaller cosine to itself than `min_cosine`.
        """
        at = np.array(places)
        rows = self._encode(features_bD)
        self._stored_uD[at] = rows.stored_bD
        if rows.scale_b is not None:
            self._scale_u[at] = rows.scale_b
        self._cosine_u[at] = rows.cosine_b
        self._embedded_u[at] = True
        if not rows.finite_b.all():
            self._reject_nonfinite(at[~rows.finite_b], features_bD[~rows.finite_b])
        coarse = np.flatnonzero(rows.finite_b & (rows.cosine_b < self.min_cosine))
        if len(coarse):
            place = int(at[coarse[0]])
            ordinal = next(ordinal for ordinal, run in self._runs.items() if place in run.caption_k)
            raise self._rounding_error(ordinal, f", caption {shortened(self.captions[place])}", features_bD[coarse[:1]])

    def set_stored(self, places: npt.NDArray[np.int64], stored_bD: StoredArray, scale_b: StoredArray | None) -> None:
        """Store the embeddings of the captions at these places, as another cache of this dtype has them."""
        self._stored_uD[places] = stored_bD
        if scale_b is not None:
            self._scale_u[places] = scale_b
        self._embedded_u[places] = True

    def reject(self, ordinal: int, status: RowStatus, reason: str) -> None:
        """Record that a sample has no embedding, and why. Its run is empty."""
        self._runs.pop(ordinal, None)
        super().reject(ordinal, status, reason)

    def check_complete(self) -> None:
        """Raise RuntimeError if a sample was neither embedded nor rejected."""
        super().check_complete()
        if missing := [ordinal for ordinal, run in self._runs.items() if not self._embedded_u[run.caption_k].all()]:
            raise RuntimeError(f"{self.index.location}: captions of ordinals {missing[:10]} were not embedded")

    def stored_arrays(self) -> Arrays:
        """Return what will be stored, by the name of the array: the runs of the embedded samples, packed."""
        ordinals = sorted(self._runs)
        length_n = np.zeros(len(self.index.samples), np.int64)
        length_n[ordinals] = [len(self._runs[ordinal].caption_k) for ordinal in ordinals]
        caption_r = self._packed_captions
        hash_u = np.array(self.hashes, np.uint64)
        stored: Arrays = {
            emb_name(0): self._stored_uD[caption_r],
            "caption_hash": hash_u[caption_r],
            "caption_source": _concatenated([self._runs[ordinal].source_k for ordinal in ordinals], np.uint8),
            "key_hash": self.key_hash_n,
            "status": self.status_n,
            "row_end": np.cumsum(length_n).astype(np.uint32),
        }
        if self.dtype.scaled:
            stored[scale_name(0)] = self._scale_u[caption_r]
        return stored

    def embedded_rows(self) -> npt.NDArray[np.bool_]:
        """Return (rows,) that each row has an embedding."""
        return np.ones(len(self._packed_captions), bool)

    def row_cosines(self) -> npt.NDArray[np.float64]:
        """Return the (rows,) cosines of the rows as stored with the rows as computed."""
        return self._cosine_u[self._packed_captions]

    def read_extensions(self) -> frozenset[str]:
        """Return the extensions of the text members that captions are read from."""
        return self._sources.caption_format.extensions

    def _add_place(self, hash_of_caption: int) -> None:
        self._place[hash_of_caption] = len(self.hashes)
        self.hashes.append(hash_of_caption)

    @property
    def _packed_captions(self) -> npt.NDArray[np.uint32]:
        """(rows,) the place of each row's caption."""
        return _concatenated([self._runs[ordinal].caption_k for ordinal in sorted(self._runs)], np.uint32)

    @cached_property
    def _stored_uD(self) -> StoredArray:
        return np.full((len(self.hashes), self.manifest.dim), self.dtype.fill, self.dtype.stored)

    @cached_property
    def _scale_u(self) -> Float32Array:
        return np.full(len(self.hashes), np.nan, np.float32)

    @cached_property
    def _cosine_u(self) -> npt.NDArray[np.float64]:
        return np.full(len(self.hashes), np.nan)

    @cached_property
    def _embedded_u(self) -> npt.NDArray[np.bool_]:
        return np.zeros(len(self.hashes), bool)

    def _reject_nonfinite(self, places: npt.NDArray[np.int64], features_bD: Float32Array) -> None:
        """Reject the samples that have one of these captions, whose embeddings are nonfinite as stored."""
        row = {place: i for i, place in enumerate(places.tolist())}
        for ordinal, run in sorted(self._runs.items()):
            found = [place for place in run.caption_k.tolist() if place in row]
            if found:
                why = self._why_nonfinite(features_bD[row[found[0]]][None])
                self.reject(ordinal, RowStatus.NON_FINITE, f"caption {shortened(self.captions[found[0]])}: {why}")


def _concatenated(parts: Sequence[npt.NDArray[np.generic]], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts])
