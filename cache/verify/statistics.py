"""What the numbers of a cache look like: norms, and rows that no healthy teacher gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.format.tar_table import TarEntry

SHOWN = 5
BINS = 10
Name = Callable[[int], str]
Float32 = npt.NDArray[np.float32]


@dataclass
class Odd:
    """Rows of one odd kind: how many, and the first few by tar and key."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, examples: Sequence[str]) -> None:
        self.count += count
        self.examples += examples[: SHOWN - len(self.examples)]

    def __str__(self) -> str:
        return f"{self.count} ({', '.join(self.examples)}{', ...' if self.count > len(self.examples) else ''})"


class Numbers:
    """Gathers the OK rows of tar after tar: 4 bytes a row and view for norms, 24 a row for duplicates."""

    def __init__(self) -> None:
        self.zero, self.constant, self.uniform = Odd(), Odd(), Odd()
        self._norms: list[Float32] = []
        self._digests: list[npt.NDArray[np.uint64]] = []
        self._images: list[npt.NDArray[np.uint64]] = []
        self._places: list[npt.NDArray[np.int32]] = []

    def add(
        self,
        entry: TarEntry,
        name: Name,
        ordinals: npt.NDArray[np.int64],
        views_VnD: Sequence[Float32],
        image_hash_n: npt.NDArray[np.uint64],
    ) -> None:
        """The OK rows of one tar, of every view, their ordinals and image hashes; `name` says a sample in words."""
        for rows_nD in views_VnD:
            zero = ~rows_nD.any(axis=1)
            constant = ~zero & (np.ptp(rows_nD, axis=1) == 0) & (rows_nD.shape[1] > 1) if len(rows_nD) else zero
            for odd, found in ((self.zero, zero), (self.constant, constant)):
                odd.add(int(found.sum()), [name(i) for i in ordinals[found][:SHOWN].tolist()])
            self._norms.append(np.linalg.norm(rows_nD.astype(np.float64), axis=1).astype(np.float32))
        first_nD = views_VnD[0]
        if len(first_nD) > 1 and (first_nD == first_nD[0]).all() and len(np.unique(image_hash_n)) > 1:
            self.uniform.add(1, [f"{entry.path} ({entry.id})"])
        self._digests.append(np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in first_nD], dtype=np.uint64))
        self._images.append(image_hash_n)
        self._places.append(np.stack([np.full(len(ordinals), entry.id), ordinals], axis=1).astype(np.int32))

    @property
    def norms(self) -> Float32:
        """(N,) L2 norms of all rows of all views."""
        return np.concatenate(self._norms) if self._norms else np.zeros(0, np.float32)

    def duplicates(self) -> tuple[int, Odd]:
        """How many rows equal an earlier one bit for bit; and of these, those whose pictures are different files."""
        if not self._digests:
            return 0, Odd()
        digest_N, image_N = np.concatenate(self._digests), np.concatenate(self._images)
        place_N2 = np.concatenate(self._places)
        order = np.lexsort((image_N, digest_N))
        digest_N, image_N, place_N2 = digest_N[order], image_N[order], place_N2[order]
        same = digest_N[1:] == digest_N[:-1]
        strange = np.flatnonzero(same & (image_N[1:] != image_N[:-1]))
        pairs = [
            f"tar {a[0]} ordinal {a[1]} = tar {b[0]} ordinal {b[1]}"
            for a, b in zip(place_N2[strange[:SHOWN]].tolist(), place_N2[strange[:SHOWN] + 1].tolist(), strict=True)
        ]
        return int(same.sum()), Odd(len(strange), pairs)

    def histogram(self) -> tuple[list[int], list[float]]:
        """Counts of norms in BINS equal bins, and the edges of the bins."""
        counts, edges = np.histogram(self.norms, bins=BINS)
        return counts.tolist(), edges.tolist()

    def norm_lines(self) -> list[str]:
        """The norms for a person."""
        norms = self.norms
        if not len(norms):
            return ["norms      no rows"]
        low, median, high = np.percentile(norms, [1, 50, 99])
        lines = [f"norms      1 % {low:.4g}, median {median:.4g}, 99 % {high:.4g}"]
        counts, edges = self.histogram()
        for count, a, b in zip(counts, edges[:-1], edges[1:], strict=True):
            lines.append(f"  {a:10.4g} to {b:10.4g}  {count:9d} {'#' * int(np.ceil(40 * count / max(counts)))}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The same for a script."""
        duplicates, strange = self.duplicates()
        counts, edges = self.histogram()
        norms = self.norms
        percentiles = np.percentile(norms, [0, 1, 50, 99, 100]).tolist() if len(norms) else []
        return {
            "rows": len(norms),
            "norm_percentiles": dict(zip(("0", "1", "50", "99", "100"), percentiles, strict=False)),
            "norm_histogram": {"counts": counts, "edges": edges},
            "duplicates": duplicates,
            **{
                kind: {"count": odd.count, "examples": odd.examples}
                for kind, odd in (
                    ("zero", self.zero),
                    ("constant", self.constant),
                    ("duplicates_of_other_images", strange),
                    ("tars_of_one_row", self.uniform),
                )
            },
        }
