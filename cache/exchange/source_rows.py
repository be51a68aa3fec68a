"""The rows of a source of embeddings, found by the hashes of their keys."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from threetowers.cache.exchange.bad_source import BadSource
from threetowers.cache.exchange.matrix import MatrixPart
from threetowers.cache.format.dtypes import Float32Array, cosines

# Of two rows of one key: the same input in another batch or on another device, as `verify --depth recompute` allows.
MIN_REPEAT_COSINE = 0.998
COMPARED_ROWS = 4096
UNIT_TOLERANCE = 0.01
UNIT_SAMPLE = 1024

Int64 = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]


class SourceRows:
    """All rows of some matrices, numbered through: 17 bytes a row in memory, about twice as many while they are sorted.

    Attributes:
        dim: width of the rows.
        repeated: rows whose key an earlier row has too, with the same values.
        used_N: (N,) which rows were asked for.
    """

    def __init__(self, parts: Sequence[MatrixPart], hash_of: Callable[[str], int]) -> None:
        """Read all keys.

        Raises:
            BadSource: The matrices differ in width, or two rows of one key in their values.
        """
        self._parts = parts
        self.dim = parts[0].rows_nD.shape[1]
        for part in parts:
            if part.rows_nD.shape[1] != self.dim:
                raise BadSource(
                    f"{part.rows_path}: rows of width {part.rows_nD.shape[1]}, expected {self.dim} as in "
                    f"{parts[0].rows_path}"
                )
        self._start_P = np.cumsum([0, *(len(part.rows_nD) for part in parts)])
        hash_N = np.zeros(self._start_P[-1], np.uint64)
        for part, start in zip(parts, self._start_P.tolist(), strict=False):
            at = start
            for keys in part.key_blocks():
                hash_N[at : at + len(keys)] = [hash_of(key) for key in keys]
                at += len(keys)
        self._row_N = np.argsort(hash_N, kind="stable")
        self._hash_N = hash_N[self._row_N]
        self.used_N = np.zeros(len(hash_N), np.bool_)
        self.repeated = self._drop_repeated()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.used_N)

    def find(self, hash_n: Hashes) -> Int64:
        """Return the (n,) row of each key, -1 where there is none."""
        if not len(self._hash_N):
            return np.full(len(hash_n), -1)
        at_n = np.minimum(np.searchsorted(self._hash_N, hash_n), len(self._hash_N) - 1)
        found_n: Int64 = np.where(self._hash_N[at_n] == hash_n, self._row_N[at_n], -1)
        return found_n

    def take(self, row_n: Int64) -> Float32Array:
        """Return (n, D) rows by number."""
        rows_nD = np.empty((len(row_n), self.dim), np.float32)
        part_n = np.searchsorted(self._start_P, row_n, side="right") - 1
        for number in np.unique(part_n).tolist():
            here = np.flatnonzero(part_n == number)
            here = here[np.argsort(row_n[here])]  # a file is read forwards
            with np.errstate(over="ignore"):  # of float64; infinite rows are rejected where they are stored
                rows_nD[here] = self._parts[number].rows_nD[row_n[here] - self._start_P[number]]
        return rows_nD

    def name(self, row: int) -> str:
        """Return the file of a row, and its number there, for messages."""
        number = int(np.searchsorted(self._start_P, row, side="right")) - 1
        return f"row {row - self._start_P[number]} of {self._parts[number].rows_path}"

    def first_unused(self, count: int) -> list[int]:
        """Return the first few rows that were not asked for, but could have been: repeated ones are passed over."""
        unused: list[int] = np.sort(self._row_N[~self.used_N[self._row_N]])[:count].tolist()
        return unused

    def have_unit_norm(self) -> bool:
        """Return whether the rows have unit norm: some of them, evenly spaced, those with NaN left out."""
        step = max(1, len(self) // UNIT_SAMPLE)
        norm_n = np.linalg.norm(self.take(np.arange(0, len(self), step)), axis=1)
        norm_n = norm_n[np.isfinite(norm_n)]
        return bool(len(norm_n)) and bool((np.abs(norm_n - 1) < UNIT_TOLERANCE).all())

    def _drop_repeated(self) -> int:
        """Keep the first row of each key, and return how many were not. Raises BadSource where they differ."""
        later = np.flatnonzero(self._hash_N[1:] == self._hash_N[:-1]) + 1
        for start in range(0, len(later), COMPARED_ROWS):
            at = later[start : start + COMPARED_ROWS]
            a_nD, b_nD = self.take(self._row_N[at - 1]), self.take(self._row_N[at])
            finite_n = np.isfinite(a_nD).all(axis=1) & np.isfinite(b_nD).all(axis=1)
            same_n = np.zeros(len(at), np.bool_)
            same_n[finite_n] = cosines(a_nD[finite_n], b_nD[finite_n]) >= MIN_REPEAT_COSINE
            if not same_n.all():
                first = int(at[np.flatnonzero(~same_n)[0]])
                raise BadSource(
                    f"{self.name(self._row_N[first - 1])} and {self.name(self._row_N[first])}: two different "
                    "embeddings of one key, expected one: keys that are not unique (--match, --key-column)"
                )
        kept = np.ones(len(self._hash_N), np.bool_)
        kept[later] = False
        self._hash_N, self._row_N = self._hash_N[kept], self._row_N[kept]
        return len(later)
