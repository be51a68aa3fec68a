"""The rows of one tar while it is being embedded: filled by ordinal, never by arrival."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import numpy.typing as npt

from threetowers.cache.format.done_record import Cosines, DoneRecord, Norms, RejectedSample
from threetowers.cache.format.dtypes import PRECISIONS, Precision, cosines, fidelity
from threetowers.cache.format.layout import RowStatus, arrays, emb_name, scale_name
from threetowers.cache.format.manifest import Manifest
from threetowers.cache.format.store import write_slot
from threetowers.cache.format.tar_table import TarEntry
from threetowers.cache.format.views import Params
from threetowers.cache.storage.storage import Storage
from threetowers.cache.webdataset.tar_index import TarIndex, key_hash

Float32 = npt.NDArray[np.float32]
MAX_BAD_SHOWN = 20


class PrecisionError(ValueError):
    """A precision tier that changes embeddings by more than was allowed."""


@dataclass(frozen=True)
class Made:
    """Who made the rows of a tar, and how: `seconds` for the whole tar, `batch_size` images a forward pass."""

    source: Literal["teacher", "remap"]
    batch_size: int
    device: str
    seconds: float


class Rows:
    """All arrays of a tar of n samples, by name, (n, ...) each, as they will be stored.

    `min_cosine` is the bound on what storing may do to a row, by default that of the precision tier.
    """

    def __init__(self, index: TarIndex, manifest: Manifest, min_cosine: float | None = None) -> None:
        n = len(index.samples)
        self.index, self.manifest = index, manifest
        self.tier = manifest.precision
        self.min_cosine = self.tier.min_cosine if min_cosine is None else min_cosine
        self.arrays: dict[str, npt.NDArray[np.generic]] = {
            spec.name: np.full((n, *spec.row), spec.fill, spec.dtype) for spec in arrays(manifest).values()
        }
        self.arrays["key_hash"][:] = np.fromiter((key_hash(s.key) for s in index.samples), dtype=np.uint64, count=n)
        self.cosine_nV = np.full((n, manifest.views.count), np.nan)
        self.bad: list[RejectedSample] = []

    @property
    def status_n(self) -> npt.NDArray[np.uint8]:
        """(n,) Status of each sample."""
        return self.arrays["status"].view(np.uint8)

    def note(self, ordinal: int, image_hash: int, params_V5: Params | None = None) -> None:
        """Note of a sample the xxh3_64 of its image's bytes, and the boxes of its crops."""
        self.arrays["image_hash"][ordinal] = image_hash
        if params_V5 is not None and "view_params" in self.arrays:
            self.arrays["view_params"][ordinal] = params_V5

    def put(self, ordinals: list[int], features_bVD: Float32) -> None:
        """Store the features of these samples, of all views; those that are not finite as stored are rejected.

        Raises:
            PrecisionError: a row that is stored with a smaller cosine to itself than `min_cosine`.
        """
        at = np.array(ordinals)
        finite_bV = np.empty(features_bVD.shape[:2], bool)
        for view in range(features_bVD.shape[1]):
            wide_bD = features_bVD[:, view]
            stored, scale = self.tier.encode(wide_bD)
            decoded = self.tier.decode(stored, scale)
            ok = finite_bV[:, view] = np.isfinite(decoded).all(axis=1)
            self.arrays[emb_name(view)][at[ok]] = stored[ok]
            if scale is not None:
                self.arrays[scale_name(view)][at[ok]] = scale[ok]
            self.cosine_nV[at[ok], view] = cosines(wide_bD[ok], decoded[ok])
        self.status_n[at] = RowStatus.OK
        for i in np.flatnonzero(~finite_bV.all(axis=1)):
            self._reject_numbers(ordinals[i], features_bVD[i])
        ok_b = finite_bV.all(axis=1)
        low = ok_b & (self.cosine_nV[at].min(axis=1, initial=np.inf) < self.min_cosine)
        for i in np.flatnonzero(low)[:1]:
            raise self._too_coarse(ordinals[i], features_bVD[i])

    def _reject_numbers(self, ordinal: int, features_VD: Float32) -> None:
        if np.isfinite(features_VD).all():
            largest = np.abs(features_VD).max()
            reason = f"largest component {largest:.6g} overflows {self.tier.name}"
        else:
            reason = "the teacher's output is not finite"
        self.reject(ordinal, RowStatus.NON_FINITE, reason)

    def _too_coarse(self, ordinal: int, features_VD: Float32) -> PrecisionError:
        def worst(tier: Precision) -> float:
            return float(fidelity(tier, features_VD).min())

        would = [f"{name} ({worst(tier):.6f})" for name, tier in PRECISIONS.items() if worst(tier) >= self.min_cosine]
        return PrecisionError(
            f"{self.index.location}: sample {self.index.samples[ordinal].key!r} (ordinal {ordinal}): stored as "
            f"{self.tier.name} its cosine with itself is {worst(self.tier):.6f}, expected at least {self.min_cosine}. "
            f"Of dtype, these would do for it: {', '.join(would) or 'none'}; or lower min_cosine"
        )

    def reject(self, ordinal: int, status: RowStatus, reason: str) -> None:
        """Note that a sample has no embedding, and why."""
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
        """Samples by status, OK left out, zeros left out."""
        found = {s.name.lower(): int((self.status_n == s).sum()) for s in RowStatus if s != RowStatus.OK}
        return {name: count for name, count in found.items() if count}

    def cosines(self) -> Cosines:
        """How well the OK rows are stored."""
        ok = self.cosine_nV[self.status_n == RowStatus.OK]
        return Cosines(float(ok.min()), float(ok.mean())) if len(ok) else Cosines(None, None)

    def norms(self) -> tuple[Norms, float, float]:
        """L2 norms, sum and largest magnitude of the OK rows as stored, of all views, computed in float64."""
        ok = self.status_n == RowStatus.OK
        if not ok.any():
            return Norms(None, None, None), 0.0, 0.0
        norms, total, largest = [], 0.0, 0.0
        for view in range(self.manifest.views.count):
            scale = self.arrays[scale_name(view)][ok].view(np.float32) if self.tier.scaled else None
            rows_nD = self.tier.decode(self.arrays[emb_name(view)][ok], scale).astype(np.float64)
            norms.append(np.sqrt((rows_nD**2).sum(axis=1)))
            total, largest = total + float(rows_nD.sum()), max(largest, float(np.abs(rows_nD).max()))
        norm_N = np.concatenate(norms)
        return Norms(float(norm_N.min()), float(norm_N.mean()), float(norm_N.max())), total, largest

    def write(self, storage: Storage, entry: TarEntry, tar_xxh3_128: str, made: Made) -> DoneRecord:
        """Write the files of the tar, and return the done record, which is not written here.

        Raises:
            WriteError: the place does not take it.
        """
        files, chunk_crc32c = write_slot(storage, self.manifest, entry.id, self.arrays)
        norms, total, max_abs = self.norms()
        return DoneRecord(
            tar_id=entry.id,
            fingerprint=entry.fingerprint,
            manifest=self.manifest.digest,
            n_samples=entry.n_samples,
            n_ok=int((self.status_n == RowStatus.OK).sum()),
            counts=self.counts(),
            bad=tuple(sorted(self.bad, key=lambda bad: bad.ordinal)[:MAX_BAD_SHOWN]),
            ignored_members=self.index.ignored,
            files=files,
            chunk_crc32c=chunk_crc32c,
            norms=norms,
            cosines=self.cosines(),
            sum=total,
            max_abs=max_abs,
            tar_xxh3_128=tar_xxh3_128,
            batch_size=made.batch_size,
            device=made.device,
            seconds=round(made.seconds, 3),
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            host=socket.gethostname(),
            source=made.source,
        )
