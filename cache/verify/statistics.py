"""Statistics of the rows of a cache: norms, and rows that no working teacher would produce."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from threetowers.cache.format.dtypes import Float32Array
from threetowers.cache.format.tar_table import TarEntry

EXAMPLES_SHOWN = 5
BINS = 10
NORM_PERCENTILES = (0, 1, 50, 99, 100)


@dataclass
class Anomaly:
    """Anomalous rows of one kind: how many, and the first few by tar and key."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, examples: Sequence[str]) -> None:
        """Count more rows, and keep some of them as examples."""
        self.count += count
        self.examples += examples[: EXAMPLES_SHOWN - len(self.examples)]

    def __str__(self) -> str:
        """Return the count with the examples."""
        return f"{self.count} ({', '.join(self.examples)}{', ...' if self.count > len(self.examples) else ''})"


class RowStatistics:
    """Collects the embeddings of tar after tar.

    Memory: 4 bytes a row and view for norms, 24 bytes a row for duplicates.
    """

    def __init__(self) -> None:
        self.zero = Anomaly()
        self.constant = Anomaly()
        self.uniform = Anomaly()
        self._norms: list[Float32Array] = []
        self._digests: list[npt.NDArray[np.uint64]] = []
        self._contents: list[npt.NDArray[np.uint64]] = []
        self._addresses: list[npt.NDArray[np.int32]] = []

    def add(
        self,
        entry: TarEntry,
        name: Callable[[int], str],
        rows: npt.NDArray[np.int64],
        views_VnD: Sequence[Float32Array],
        content_hash_n: npt.NDArray[np.uint64],
    ) -> None:
        """Add the embeddings of one tar.

        Args:
            entry: the tar.
            name: names a row of the tar for a person.
            rows: (n,) which of its rows have an embedding.
            views_VnD: these, of each view.
            content_hash_n: hashes of the images or captions.
        """
        for rows_nD in views_VnD:
            zero = ~rows_nD.any(axis=1)
            constant = ~zero & (np.ptp(rows_nD, axis=1) == 0) & (rows_nD.shape[1] > 1) if len(rows_nD) else zero
            self.zero.add(int(zero.sum()), [name(i) for i in rows[zero][:EXAMPLES_SHOWN].tolist()])
            self.constant.add(int(constant.sum()), [name(i) for i in rows[constant][:EXAMPLES_SHOWN].tolist()])
            self._norms.append(np.linalg.norm(rows_nD.astype(np.float64), axis=1).astype(np.float32))
        first_nD = views_VnD[0]
        if len(first_nD) > 1 and (first_nD == first_nD[0]).all() and len(np.unique(content_hash_n)) > 1:
            self.uniform.add(1, [f"{entry.path} ({entry.id})"])
        self._digests.append(np.array([xxhash.xxh3_64_intdigest(row.tobytes()) for row in first_nD], dtype=np.uint64))
        self._contents.append(content_hash_n)
        self._addresses.append(np.stack([np.full(len(rows), entry.id), rows], axis=1).astype(np.int32))

    @property
    def norms(self) -> Float32Array:
        """(N,) L2 norms of all rows of all views."""
        return np.concatenate(self._norms) if self._norms else np.zeros(0, np.float32)

    def duplicates(self) -> tuple[int, Anomaly]:
        """Return how many rows equal an earlier one bit for bit, and those among them whose contents differ."""
        if not self._digests:
            return 0, Anomaly()
        digest_N = np.concatenate(self._digests)
        content_N = np.concatenate(self._contents)
        address_N2 = np.concatenate(self._addresses)
        order = np.lexsort((content_N, digest_N))
        digest_N = digest_N[order]
        content_N = content_N[order]
        address_N2 = address_N2[order]
        equal = digest_N[1:] == digest_N[:-1]
        anomalous = np.flatnonzero(equal & (content_N[1:] != content_N[:-1]))
        examples = []
        for i in anomalous[:EXAMPLES_SHOWN].tolist():
            (tar, row), (other_tar, other_row) = address_N2[i : i + 2].tolist()
            examples.append(f"tar {tar} row {row} = tar {other_tar} row {other_row}")
        return int(equal.sum()), Anomaly(len(anomalous), examples)

    def histogram(self) -> tuple[list[int], list[float]]:
        """Return the counts of norms in BINS equal bins, and the edges of the bins."""
        counts, edges = np.histogram(self.norms, bins=BINS)
        return counts.tolist(), edges.tolist()

    def norm_lines(self) -> list[str]:
        """Return percentiles and histogram of the norms for a person."""
        norms = self.norms
        if not len(norms):
            return ["norms      no rows"]
        low, median, high = np.percentile(norms, [1, 50, 99])
        lines = [f"norms      1 % {low:.4g}, median {median:.4g}, 99 % {high:.4g}"]
        counts, edges = self.histogram()
        for count, left, right in zip(counts, edges[:-1], edges[1:], strict=True):
            lines.append(f"  {left:10.4g} to {right:10.4g}  {count:9d} {'#' * int(np.ceil(40 * count / max(counts)))}")
        return lines

    def as_dict(self) -> dict[str, Any]:
        """Return the statistics for a script."""
        duplicates, of_others = self.duplicates()
        counts, edges = self.histogram()
        norms = self.norms
        percentiles = np.percentile(norms, NORM_PERCENTILES).tolist() if len(norms) else []
        anomalies = {
            "zero": self.zero,
            "constant": self.constant,
            "duplicates_of_others": of_others,
            "tars_of_one_row": self.uniform,
        }
        return {
            "rows": len(norms),
            "norm_percentiles": dict(zip(map(str, NORM_PERCENTILES), percentiles, strict=False)),
            "norm_histogram": {"counts": counts, "edges": edges},
            "duplicates": duplicates,
            **{kind: {"count": found.count, "examples": found.examples} for kind, found in anomalies.items()},
        }
