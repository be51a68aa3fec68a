"""The rows of one tar while it is being embedded: filled by ordinal, never by arrival."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from threetowers.cache.layout import Status
from threetowers.cache.record import BadSample, Norms
from threetowers.cache.tars import TarIndex, key_hash


class Rows:
    """(n, D) embeddings (NaN where there is none), (n,) key hashes and (n,) statuses of a tar of n samples."""

    def __init__(self, index: TarIndex, dim: int, dtype: str) -> None:
        n = len(index.samples)
        self.index = index
        self.emb_nD: npt.NDArray[np.floating] = np.full((n, dim), np.nan, dtype=dtype)
        self.key_hash_n = np.fromiter((key_hash(sample.key) for sample in index.samples), dtype=np.uint64, count=n)
        self.status_n = np.full(n, Status.ABSENT, dtype=np.uint8)
        self.bad: list[BadSample] = []

    def put(self, ordinals: list[int], features_bD: npt.NDArray[np.float32]) -> None:
        """Store the features of these samples; those that are not finite as stored are rejected."""
        with np.errstate(over="ignore"):  # an overflow is found and named below
            stored = features_bD.astype(self.emb_nD.dtype)
        for ordinal, wide, row in zip(ordinals, features_bD, stored, strict=True):
            if np.isfinite(row).all():
                self.emb_nD[ordinal] = row
                self.status_n[ordinal] = Status.OK
            elif np.isfinite(wide).all():
                largest = np.abs(wide).max()
                self.reject(ordinal, Status.NON_FINITE, f"largest component {largest:.6g} overflows {row.dtype}")
            else:
                self.reject(ordinal, Status.NON_FINITE, "the teacher's output is not finite")

    def reject(self, ordinal: int, status: Status, reason: str) -> None:
        """Note that a sample has no embedding, and why."""
        self.status_n[ordinal] = status
        self.bad.append(BadSample(ordinal, self.index.samples[ordinal].key, int(status), reason))

    def check_complete(self) -> None:
        """Raise RuntimeError if a sample was neither stored nor rejected."""
        missing = np.flatnonzero(self.status_n == Status.ABSENT)
        if len(missing):
            raise RuntimeError(f"{self.index.path}: no row for ordinals {missing[:10].tolist()} of {len(missing)}")

    def counts(self) -> dict[str, int]:
        """Samples by status, OK left out, zeros left out."""
        found = {s.name.lower(): int((self.status_n == s).sum()) for s in Status if s != Status.OK}
        return {name: count for name, count in found.items() if count}

    def norms(self) -> tuple[Norms, float, float]:
        """L2 norms, sum and largest magnitude of the stored OK rows, computed in float64."""
        ok_nD = self.emb_nD[self.status_n == Status.OK].astype(np.float64)
        if not len(ok_nD):
            return Norms(None, None, None), 0.0, 0.0
        norm_n = np.sqrt((ok_nD**2).sum(axis=1))
        norms = Norms(float(norm_n.min()), float(norm_n.mean()), float(norm_n.max()))
        return norms, float(ok_nD.sum()), float(np.abs(ok_nD).max())
