"""What will be stored of one tar, while its samples are embedded: one buffer for images, one for captions.

Samples are taken in any order. Each ends as embedded, or rejected with a status and a reason.
"""

import socket
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.done_record import Cosines, DoneRecord, Norms, RejectedSample
from threetowers.cache.format.dtypes import STORAGE_DTYPES, Float32Array, StoredArray, cosines, storage_cosines
from threetowers.cache.format.layout import RowStatus, emb_name, scale_name
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.store import Arrays, write_tar_rows
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash

MAX_BAD_SHOWN = 20


class RoundingError(ValueError):
    """A storage dtype that changes an embedding by more than is allowed."""


@dataclass(frozen=True)
class Provenance:
    """What made the rows of a tar, and the `seconds` that it took; `batch_size` are the rows per forward pass."""

    source: Literal["teacher", "remap", "import"]
    batch_size: int
    device: str
    seconds: float
    runtime: str = "torch"


class EncodedRows(NamedTuple):
    """(b, D) rows as they are stored, their (b,) scales, whether each is finite as stored, and its cosine to itself."""

    stored_bD: StoredArray
    scale_b: Float32Array | None
    finite_b: npt.NDArray[np.bool_]
    cosine_b: npt.NDArray[np.float64]


class RowBuffer(ABC):
    """What will be stored of one tar.

    Attributes:
        index: of the tar.
        manifest: of the cache.
        min_cosine: bound on the error of a stored row, by default that of the storage dtype.
        status_n: (n,) RowStatus of each sample.
        bad: the rejected samples.
        notes: what of the embedded samples was tolerated, by what it was.
    """

    def __init__(self, index: TarIndex, manifest: Manifest, min_cosine: float | None = None) -> None:
        n = len(index.samples)
        self.index = index
        self.manifest = manifest
        self.dtype = manifest.storage_dtype
        self.min_cosine = self.dtype.min_cosine if min_cosine is None else min_cosine
        self.status_n = np.full(n, RowStatus.ABSENT, np.uint8)
        self.key_hash_n = np.fromiter((key_hash(s.key) for s in index.samples), dtype=np.uint64, count=n)
        self.bad: list[RejectedSample] = []
        self.notes: Counter[str] = Counter()

    @abstractmethod
    def stored_arrays(self) -> Arrays:
        """Return what will be stored, by the name of the array."""

    @abstractmethod
    def embedded_rows(self) -> npt.NDArray[np.bool_]:
        """Return (rows,) which of the rows of `stored_arrays` have an embedding."""

    @abstractmethod
    def row_cosines(self) -> npt.NDArray[np.float64]:
        """Return the cosines of these rows as stored with the rows as computed, of all views."""

    def reject(self, ordinal: int, status: RowStatus, reason: str) -> None:
        """Record that a sample has no embedding, and why."""
        self.status_n[ordinal] = status
        self.bad.append(RejectedSample(ordinal, self.index.samples[ordinal].key, int(status), reason))

    def check_complete(self) -> None:
        """Raise RuntimeError if a sample was neither embedded nor rejected."""
        missing = np.flatnonzero(self.status_n == RowStatus.ABSENT)
        if len(missing):
            raise RuntimeError(f"{self.index.location}: no row for ordinals {missing[:10].tolist()} of {len(missing)}")

    def counts(self) -> dict[str, int]:
        """Return the number of samples without an embedding, by status."""
        found = {s.name.lower(): int((self.status_n == s).sum()) for s in RowStatus if s != RowStatus.OK}
        return {name: count for name, count in found.items() if count}

    def cosines(self) -> Cosines:
        """Return the cosines of the rows as stored with the rows as computed."""
        found = self.row_cosines()
        return Cosines(float(found.min()), float(found.mean())) if len(found) else Cosines(None, None)

    def write(self, storage: Storage, entry: TarEntry, tar_xxh3_128: str, provenance: Provenance) -> DoneRecord:
        """Write the files of the tar, and return the done record, which is not written here.

        Raises:
            WriteError: the storage cannot be written.
        """
        stored = self.stored_arrays()
        files, chunk_crc32c = write_tar_rows(storage, self.manifest, entry.id, stored)
        norms, total, max_abs = self._statistics(stored)
        return DoneRecord(
            tar_id=entry.id,
            fingerprint=entry.fingerprint,
            manifest=self.manifest.digest,
            n_samples=entry.n_samples,
            n_rows=len(stored[emb_name(0)]),
            n_ok=int((self.status_n == RowStatus.OK).sum()),
            counts=self.counts(),
            bad=tuple(sorted(self.bad, key=lambda bad: bad.ordinal)[:MAX_BAD_SHOWN]),
            ignored_members=dict(self.index.left_aside(self.read_extensions())),
            files=files,
            chunk_crc32c=chunk_crc32c,
            norms=norms,
            cosines=self.cosines(),
            sum=total,
            max_abs=max_abs,
            tar_xxh3_128=tar_xxh3_128,
            batch_size=provenance.batch_size,
            device=provenance.device,
            seconds=round(provenance.seconds, 3),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            source=provenance.source,
            notes=dict(self.notes),
            runtime=provenance.runtime,
        )

    def read_extensions(self) -> frozenset[str]:
        """Return the extensions of members that are read beside images and the usual texts."""
        return frozenset()

    def _encode(self, features_bD: Float32Array) -> EncodedRows:
        """Return rows as they are stored; those that are nonfinite then have the cosine NaN."""
        stored, scale = self.dtype.encode(features_bD)
        decoded = self.dtype.decode(stored, scale)
        finite = np.asarray(np.isfinite(decoded).all(axis=1))
        cosine = np.full(len(features_bD), np.nan)
        cosine[finite] = cosines(features_bD[finite], decoded[finite])
        return EncodedRows(stored, scale, finite, cosine)

    def _why_nonfinite(self, features_nD: Float32Array) -> str:
        if np.isfinite(features_nD).all():
            return f"largest component {np.abs(features_nD).max():.6g} overflows {self.dtype.name}"
        return "the embedding is nonfinite"

    def _rounding_error(self, ordinal: int, what: str, features_nD: Float32Array) -> RoundingError:
        found = {name: float(storage_cosines(dtype, features_nD).min()) for name, dtype in STORAGE_DTYPES.items()}
        sufficient = [f"{name} ({cosine:.6f})" for name, cosine in found.items() if cosine >= self.min_cosine]
        return RoundingError(
            f"{self.index.location}: sample {self.index.samples[ordinal].key!r} (ordinal {ordinal}){what}: stored as "
            f"{self.dtype.name} its cosine with itself is {found[self.dtype.name]:.6f}, expected at least "
            f"{self.min_cosine}. Choose another --dtype, sufficient here: {', '.join(sufficient) or 'none'}; or lower "
            "--min-cosine"
        )

    def _statistics(self, stored: Arrays) -> tuple[Norms, float, float]:
        """Return L2 norms, sum and largest magnitude of the embeddings as stored, of all views, in float64."""
        embedded = self.embedded_rows()
        if not embedded.any():
            return Norms(None, None, None), 0.0, 0.0
        norms = []
        total = 0.0
        largest = 0.0
        for view in range(self.manifest.views.count):
            scale: Any = stored[scale_name(view)][embedded] if self.dtype.scaled else None
            rows_nD = self.dtype.decode(stored[emb_name(view)][embedded], scale).astype(np.float64)
            norms.append(np.sqrt((rows_nD**2).sum(axis=1)))
            total += float(rows_nD.sum())
            largest = max(largest, float(np.abs(rows_nD).max()))
        norm_N = np.concatenate(norms)
        return Norms(float(norm_N.min()), float(norm_N.mean()), float(norm_N.max())), total, largest
