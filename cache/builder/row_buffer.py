"""The rows of one tar while it is embedded: filled by ordinal, whatever the order of arrival."""

import socket
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.done_record import Cosines, DoneRecord, Norms, RejectedSample
from threetowers.cache.format.dtypes import STORAGE_DTYPES, Float32Array, cosines, storage_cosines
from threetowers.cache.format.layout import RowStatus, arrays, emb_name, scale_name
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.store import write_tar_rows
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.format.views import Params
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash

MAX_BAD_SHOWN = 20


class RoundingError(ValueError):
    """A storage dtype that changes an embedding by more than is allowed."""


@dataclass(frozen=True)
class Provenance:
    """What made the rows of a tar, and the `seconds` that it took; `batch_size` are the images per forward pass."""

    source: Literal["teacher", "remap"]
    batch_size: int
    device: str
    seconds: float
    runtime: str = "torch"


class RowBuffer:
    """All arrays of a tar of n samples, by name, (n, ...) each, as they will be stored.

    `min_cosine` is the bound on the error of a stored row, by default that of the storage dtype.
    """

    def __init__(self, index: TarIndex, manifest: Manifest, min_cosine: float | None = None) -> None:
        n = len(index.samples)
        self.index = index
        self.manifest = manifest
        self.dtype = manifest.storage_dtype
        self.min_cosine = self.dtype.min_cosine if min_cosine is None else min_cosine
        self.arrays: dict[str, npt.NDArray[np.generic]] = {
            spec.name: np.full((n, *spec.row), spec.fill, spec.dtype) for spec in arrays(manifest).values()
        }
        self.arrays["key_hash"][:] = np.fromiter((key_hash(s.key) for s in index.samples), dtype=np.uint64, count=n)
        self.cosine_nV = np.full((n, manifest.views.count), np.nan)
        self.bad: list[RejectedSample] = []
        self.notes: Counter[str] = Counter()

    @property
    def status_n(self) -> npt.NDArray[np.uint8]:
        """(n,) RowStatus of each sample."""
        return self.arrays["status"].view(np.uint8)

    def reject_defects(self) -> int:
        """Record the samples that have no usable image, as far as the tar's headers tell; return their number."""
        count = 0
        for defect, ordinals in self.index.samples.defects().items():
            for ordinal in ordinals.tolist():
                self.reject(ordinal, RowStatus.of(defect), self.index.describe_defect(ordinal))
            count += len(ordinals)
        return count

    def set_image(self, ordinal: int, image_hash: int, params_V5: Params | None = None) -> None:
        """Store the xxh3_64 of a sample's image file, and the parameters of its crops."""
        self.arrays["image_hash"][ordinal] = image_hash
        if params_V5 is not None and "view_params" in self.arrays:
            self.arrays["view_params"][ordinal] = params_V5

    def set_embeddings(self, ordinals: list[int], features_bVD: Float32Array) -> None:
        """Store the embeddings of these samples, of all views; those that are nonfinite as stored are rejected.

        Raises:
            RoundingError: a row that is stored with a smaller cosine to itself than `min_cosine`.
        """
        at = np.array(ordinals)
        finite_bV = np.empty(features_bVD.shape[:2], bool)
        for view in range(features_bVD.shape[1]):
            features_bD = features_bVD[:, view]
            stored, scale = self.dtype.encode(features_bD)
            decoded = self.dtype.decode(stored, scale)
            ok = np.isfinite(decoded).all(axis=1)
            finite_bV[:, view] = ok
            self.arrays[emb_name(view)][at[ok]] = stored[ok]
            if scale is not None:
                self.arrays[scale_name(view)][at[ok]] = scale[ok]
            self.cosine_nV[at[ok], view] = cosines(features_bD[ok], decoded[ok])
        self.status_n[at] = RowStatus.OK
        ok_b = finite_bV.all(axis=1)
        for i in np.flatnonzero(~ok_b):
            self.reject(ordinals[i], RowStatus.NON_FINITE, self._why_nonfinite(features_bVD[i]))
        coarse_b = ok_b & (self.cosine_nV[at].min(axis=1, initial=np.inf) < self.min_cosine)
        if coarse_b.any():
            first = int(np.flatnonzero(coarse_b)[0])
            raise self._rounding_error(ordinals[first], features_bVD[first])

    def _why_nonfinite(self, features_VD: Float32Array) -> str:
        if np.isfinite(features_VD).all():
            return f"largest component {np.abs(features_VD).max():.6g} overflows {self.dtype.name}"
        return "the teacher's output is nonfinite"

    def _rounding_error(self, ordinal: int, features_VD: Float32Array) -> RoundingError:
        found = {name: float(storage_cosines(dtype, features_VD).min()) for name, dtype in STORAGE_DTYPES.items()}
        sufficient = [f"{name} ({cosine:.6f})" for name, cosine in found.items() if cosine >= self.min_cosine]
        return RoundingError(
            f"{self.index.location}: sample {self.index.samples[ordinal].key!r} (ordinal {ordinal}): stored as "
            f"{self.dtype.name} its cosine with itself is {found[self.dtype.name]:.6f}, expected at least "
            f"{self.min_cosine}. Choose another --dtype, sufficient here: {', '.join(sufficient) or 'none'}; or lower "
            "--min-cosine"
        )

    def reject(self, ordinal: int, status: RowStatus, reason: str) -> None:
        """Record that a sample has no embedding, and why."""
        for spec in arrays(self.manifest).values():
            if spec.chunked or spec.name.startswith("scale"):
                self.arrays[spec.name][ordinal] = spec.fill
        self.cosine_nV[ordinal] = np.nan
        self.status_n[ordinal] = status
        self.bad.append(RejectedSample(ordinal, self.index.samples[ordinal].key, int(status), reason))

    def check_complete(self) -> None:
        """Raise RuntimeError if a sample was neither stored nor rejected."""
        missing = np.flatnonzero(self.status_n == RowStatus.ABSENT)
        if len(missing):
            raise RuntimeError(f"{self.index.location}: no row for ordinals {missing[:10].tolist()} of {len(missing)}")

    def counts(self) -> dict[str, int]:
        """Return the number of samples without an embedding, by status."""
        found = {s.name.lower(): int((self.status_n == s).sum()) for s in RowStatus if s != RowStatus.OK}
        return {name: count for name, count in found.items() if count}

    def cosines(self) -> Cosines:
        """Return the cosines of the OK rows as stored with the rows as computed."""
        ok = self.cosine_nV[self.status_n == RowStatus.OK]
        return Cosines(float(ok.min()), float(ok.mean())) if len(ok) else Cosines(None, None)

    def statistics(self) -> tuple[Norms, float, float]:
        """Return L2 norms, sum and largest magnitude of the OK rows as stored, of all views, computed in float64."""
        ok = self.status_n == RowStatus.OK
        if not ok.any():
            return Norms(None, None, None), 0.0, 0.0
        norms = []
        total = 0.0
        largest = 0.0
        for view in range(self.manifest.views.count):
            scale = self.arrays[scale_name(view)][ok].view(np.float32) if self.dtype.scaled else None
            rows_nD = self.dtype.decode(self.arrays[emb_name(view)][ok], scale).astype(np.float64)
            norms.append(np.sqrt((rows_nD**2).sum(axis=1)))
            total += float(rows_nD.sum())
            largest = max(largest, float(np.abs(rows_nD).max()))
        norm_N = np.concatenate(norms)
        return Norms(float(norm_N.min()), float(norm_N.mean()), float(norm_N.max())), total, largest

    def write(self, storage: Storage, entry: TarEntry, tar_xxh3_128: str, provenance: Provenance) -> DoneRecord:
        """Write the files of the tar, and return the done record, which is not written here.

        Raises:
            WriteError: the storage cannot be written.
        """
        files, chunk_crc32c = write_tar_rows(storage, self.manifest, entry.id, self.arrays)
        norms, total, max_abs = self.statistics()
        return DoneRecord(
            tar_id=entry.id,
            fingerprint=entry.fingerprint,
            manifest=self.manifest.digest,
            n_samples=entry.n_samples,
            n_ok=int((self.status_n == RowStatus.OK).sum()),
            counts=self.counts(),
            bad=tuple(sorted(self.bad, key=lambda bad: bad.ordinal)[:MAX_BAD_SHOWN]),
            ignored_members=dict(self.index.left_aside()),
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
